#!/usr/bin/env bash
# The next minutes on GPUs, prepared on 2026-11-30. Delete what has been run.
#
#   bash benchmarks/next_gpu.sh PART FOLDER [GPU] [SECONDS]
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz, books_tokenizer.json, and for smollm2
# also smollm2/ (examples/smollm2.py) and books_small.jsonl.xz (the first 72 MB of the texts). On a
# machine of two GPUs two parts run side by side, each with its own GPU. $OUT gets results.
#
#   tests    what has not run on a card: decay, fused, pairs with documents, ridge at C = 1024, the
#            root's halving. Prediction: all pass. jax-triton's wheel is needed.
#   steps    150 s. Prediction: books step with six layers 0.31 s or less of 0.27 (23 % before the
#            default kernel and the rewritten fix-up loop); packed pairs at 4B below 14 ms.
#   equal    ridge + decay at equal time, seeds 0 to 2, as today's preset: 358 steps against none512
#            of docs/results/2026-11-30-books-h200.jsonl (4.770, 4.676, 4.717 on the last tokens).
#            Prediction: 4.50, 4.53, 4.52. Measure the step first (part steps), and choose the
#            number of steps by it.
#   fused    books with `apply: fused`, seed 0, 300 steps. Prediction: no difference in loss.
#   study 2 has a script of its own: benchmarks/ablations.sh books DATA GPU SECONDS
#   smollm2  study 3 with a hundred times the rate for the target's parameters. Prediction: 0.01
#            below no TTT at 8k. One arm takes 100 s.
#   memory   own and other books' memories of a books run in FOLDER/run.
set -u
part=$1
data=$2
gpu=${3:-0}
seconds=${4:-570}
export CUDA_VISIBLE_DEVICES=$gpu PYTHONUNBUFFERED=1
out=${OUT:-/tmp/next_gpu}
mkdir -p "$out"
books() { bash benchmarks/books.sh "$data" "$gpu" "$seconds" "$@"; }

case $part in
  tests) JAX_PLATFORMS=cuda,cpu timeout "$seconds" python3 -m pytest tests/gpu -m gpu -q -x ;;
  steps) timeout "$seconds" python3 benchmarks/step_parts.py --seconds 150 \
    --variants pallas_gpu:1,pallas_gpu:1:fused --json "$out/parts.jsonl" \
    --ops 2560x9728:512:1:16384=pallas_gpu:1+pallas_gpu:2,1024x3072:512:8:8192=pallas_gpu:1 ;;
  equal) SEEDS="0 1 2" books "decay358: --steps 358" ;;
  fused) books "fused: --steps 300 --model.ttt.apply fused" ;;
  smollm2) bash benchmarks/smollm2.sh "$data" "$gpu" "$seconds" none ridge decay full ;;
  memory) timeout "$seconds" python3 benchmarks/memory_study.py "$data/run" \
    "$data/books_heldout.jsonl.xz" --out "$out/memory" ;;
  *) echo "PART is tests, steps, equal, fused, smollm2 or memory" && exit 2 ;;
esac
exit 0
