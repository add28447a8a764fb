#!/usr/bin/env bash
# Study 1's missing runs and their evaluation in one call, and what CPUs can do beside it.
#
#   OUT=FOLDER bash benchmarks/study1.sh DATA SECONDS
#
# Runs are dealt to the GPUs in the order below, 165 s each; then each GPU evaluates its own with
# books_eval.py, 60 to 80 s. So 270 s are right for four GPUs or eight, 430 s for one or two. Four
# cores go with each GPU. On the others the inner rate over shapes is trained, then study 2 at the
# default run's size (CPUS=0: not). What is not done in time goes on with the same words on the same
# machine. What to do with the results: benchmarks/books_tables.py.
set -u
data=$1
limit=$2
export OUT PYTHONUNBUFFERED=1
mkdir -p "$OUT" /tmp/rates
begin=$SECONDS
gpus=$(nvidia-smi -L | wc -l)
first=$((4 * gpus))
last=$(($(nproc) - 1))
parallel=$(((last - first + 1) / 2))

runs=( # seed, arm
  "1 decay358: --steps 358"
  "2 decay358: --steps 358"
  "0 sum358: --steps 358 --model.ttt.write sum"
  "0 decay358: --steps 358"
  "0 noproj: --steps 358 --model.ttt.proj false"
  "0 drop: --steps 358 --optimizer.ttt_drop 0.2"
  "0 noconv: --steps 358 --taps 2"
  "0 layers12: --steps 358 --model.ttt.layers [0,1,2,3,4,5,6,7,8,9,10,11]"
  "0 chunk2048: --steps 358 --model.ttt.chunk_size 2048 --model.ttt.decay 0.656"
)

left() { echo $((limit - SECONDS + begin)); }

train_and_judge() { # GPU
  local gpu=$1 cores=$((4 * $1))-$((4 * $1 + 3)) n
  for ((n = gpu; n < ${#runs[@]}; n += gpus)); do
    if [ "$(left)" -gt 290 ] || [ "$n" = "$gpu" ]; then
      SEEDS=${runs[n]%% *} taskset -c "$cores" bash benchmarks/books.sh "$data" "$gpu" \
        $(($(left) - 60)) "${runs[n]#* }"
    fi
  done
  cp "/tmp/books/gpu$gpu/results.jsonl" "$OUT/books_gpu$gpu.jsonl"
  CUDA_VISIBLE_DEVICES=$gpu taskset -c "$cores" timeout "$(left)" python3 benchmarks/books_eval.py \
    "/tmp/books/gpu$gpu"/*-[0-9] --data "$data/books_heldout.jsonl.xz" --out "$OUT/eval_gpu$gpu" \
    --seconds $(($(left) - 50))
}

rates() { # words of inner_rate.py; a run takes 60 to 180 s
  JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES='' taskset -c "$first-$last" nice timeout "$(left)" \
    python3 benchmarks/inner_rate.py --out /tmp/rates --parallel "$parallel" --cores 2 \
    --seconds $((limit - 150 - SECONDS + begin)) "$@" > /tmp/rates/log.txt 2>&1
}

on_cpus() {
  rates --shapes wide long narrow short base
  rates --shapes large.chunk small.chunk
  cp /tmp/rates/results.jsonl "$OUT/inner_rate.jsonl"
  python3 benchmarks/inner_rate.py --table /tmp/rates/results.jsonl
  if [ "$(left)" -gt 200 ]; then
    taskset -c "$first-$last" bash benchmarks/ablations.sh default "$parallel" "$(left)"
  fi
}

if [ "${CPUS:-1}" = 1 ]; then
  (on_cpus 2>&1 | sed 's/^/CPU /') &
fi
for ((gpu = 0; gpu < gpus; gpu++)); do
  (train_and_judge "$gpu" 2>&1 | sed "s/^/G$gpu /") &
done
wait
ls -la "$OUT"
exit 0
