#!/usr/bin/env bash
# Candidates of issue 18 (docs/lab/2026-11-30-candidates.md), on a machine with many CPUs and a GPU.
#
#   bash benchmarks/candidates.sh FOLDER PART [SECONDS]
#
#   small   the default run for every candidate, three seeds (SEEDS), on all CPUs, two each.
#           FOLDER is not read. Runs go seed by seed, so what is cut off is the last seed.
#   rule    the rule for the inner rate at seven shapes (benchmarks/inner_rate.py), on all CPUs.
#   books   the candidates of NAMES on configs/books.yaml, one GPU, 300 steps, seed 0.
#           FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz, books_tokenizer.json.
#
# Results are printed as they come; $OUT gets them, if it is set. The same command again goes on.
set -u
data=$1
part=$2
seconds=${3:-560}
out=${OUT:-/tmp/candidates}
cores=${CORES:-2}
processes=${PROCESSES:-$(($(getconf _NPROCESSORS_ONLN) / cores))}
work=${WORK:-/tmp/candidates-work}/$part
seeds=${SEEDS:-0 1 2}
export PYTHONUNBUFFERED=1
mkdir -p "$out" "$work"

declare -A change=(
  [decay]="--model.ttt.decay 0.9"
  [decay8]="--model.ttt.decay 0.8"
  [decaylearnt]="--model.ttt.decay 0.95 --model.ttt.learn_decay true"
  [rate]="--model.ttt.learn_lr true"
  [gate]="--model.ttt.gate true"
  [hidden]="--model.ttt.target hidden_states"
  [hiddenstop]="--model.ttt.target hidden_states --model.ttt.stop_source true"
  [keys]="--model.ttt.normalize_keys true --model.ttt.lr 0.48" # sum only: 0.05 m
  [cap]="--model.ttt.max_update 0.05"
)
names=${NAMES:-decay decay8 decaylearnt gate hidden cap hiddenstop rate keys}
ridge="--model.ttt.write ridge --model.ttt.lr 1"

arms=()
for base in ${BASES:-ridge sum}; do
  settings=""
  [ "$base" = ridge ] && settings=$ridge
  [ "$base" = sum ] && [ "$part" = books ] && settings="--model.ttt.lr 0.002"
  [ "${SKIPBASE:-}" ] || arms+=(--arm "$base: $settings")
  for name in ${NAMES:-$( [ "$base" = ridge ] && echo $names || echo ${SUMNAMES:-$names})}; do
    [ "$base$name" = ridgekeys ] || arms+=(--arm "$base+$name: $settings ${change[$name]}")
  done
done
quiet="--log.probe_every 0 --log.tensorboard false --compile_cache null --checkpoint.every 0"

study() {
  # shellcheck disable=SC2086
  timeout "$seconds" python3 benchmarks/study.py "$@" --out "$work" --seeds $seeds "${arms[@]}"
  cp "$work/results.jsonl" "$out/$part.jsonl" 2> /dev/null
  tar czf "$out/$part-logs.tgz" -C "$work" --exclude checkpoints --exclude '*.npy' .
}

case $part in
  small)
    export JAX_PLATFORMS=cpu
    echo "$processes processes"
    lscpu | grep -E 'Model name|^CPU\(s\)|Thread'
    study configs/default.yaml --parallel "$processes" --cores "$cores" \
      --seconds $((seconds - 110)) --base "$quiet"
    ;;
  rule)
    export JAX_PLATFORMS=cpu
    timeout "$seconds" python3 benchmarks/inner_rate.py --out "$work" --parallel \
      "$processes" --cores "$cores" --seconds $((seconds - 110))
    cp "$work/results.jsonl" "$out/$part.jsonl" 2> /dev/null
    ;;
  books)
    seeds=${SEEDS:-0}
    nvidia-smi --query-gpu=name,power.limit --format=csv,noheader
    study configs/books.yaml --seconds $((seconds - 240)) --base "--steps 300 $quiet \
      --data.train $data/books_train.jsonl.xz --data.heldout $data/books_heldout.jsonl.xz \
      --data.tokenizer $data/books_tokenizer.json --eval.rows 30 --eval.buckets 8"
    ;;
  *) echo "PART is small, rule or books" && exit 2 ;;
esac
exit 0
