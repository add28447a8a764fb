#!/usr/bin/env bash
# Study 1's missing runs and their evaluation in one call, and what CPUs can do beside it.
#
#   OUT=FOLDER bash benchmarks/study1.sh DATA SECONDS       570 s are right for one and two GPUs
#
# One GPU: `decay358` with seeds 1 and 2, then books_eval.py. Two GPUs: on the second one `decay358`
# and `sum358` with seed 0. Four cores go with each GPU. On the others the inner rate over shapes is
# trained, then study 2 at the default run's size, with CPUS=1. What is not done in time goes on
# with the same words on the same machine. What to do with the results: benchmarks/books_tables.py.
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

left() { echo $((limit - SECONDS + begin)); }

train_and_judge() { # GPU, seeds, arms
  local gpu=$1 cores=$((4 * $1))-$((4 * $1 + 3))
  SEEDS=$2 taskset -c "$cores" bash benchmarks/books.sh "$data" "$gpu" $(($(left) - 70)) "${@:3}"
  cp "/tmp/books/gpu$gpu/results.jsonl" "$OUT/books_gpu$gpu.jsonl"
  CUDA_VISIBLE_DEVICES=$gpu taskset -c "$cores" timeout "$(left)" python3 benchmarks/books_eval.py \
    "/tmp/books/gpu$gpu"/*-[0-9] --data "$data/books_heldout.jsonl.xz" --out "$OUT/eval_gpu$gpu" \
    --seconds $(($(left) - 60))
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
(train_and_judge 0 "1 2" "decay358: --steps 358" 2>&1 | sed 's/^/G0 /') &
if [ "$gpus" -gt 1 ]; then
  (train_and_judge 1 0 "decay358: --steps 358" \
    "sum358: --steps 358 --model.ttt.write sum" 2>&1 | sed 's/^/G1 /') &
fi
wait
ls -la "$OUT"
exit 0
