#!/usr/bin/env bash
# What docs/lab/2026-11-30-speed-timed.md changed and could not time. One H200: 280 s for the first
# three parts. Delete what has been run.
#
#   [OUT=FOLDER] bash benchmarks/speed_gpu.sh PART...     # in this order: right op books large ridge
#   DATA=FOLDER [SEEDS="0 1 2"] bash benchmarks/speed_gpu.sh curves
#
# Everything is printed and also added to $OUT/speed.txt, times to $OUT/speed.jsonl.
#
#   right  100 s (five cases of 15 to 20 s). The changed kernels against float64, stretches against
#          each other. All pass; if not, time nothing.
#   op      55 s. Results compared with XLA's before they are timed. Prediction, forward + backward:
#              books, packed, decay    5.8 ms (6.59 at c70a538)     4B, packed  21.7 (23.61)
#   books  110 s. Prediction, over none: six layers 16.7 %, fused 15.3 % (23.4 % at 83e0756). Also
#          asked: how many seconds a step takes to compile.
#   large  200 s. Prediction: 1.7B 4.8 %, fused 4.2 % (5.3 % at 83e0756), 500M 12.0 % (13.8 %).
#   ridge   60 s. Prediction: a write with gradients 2.9 ms at books.
#   curves 330 s a seed. Whether fused can be the default of training: both arms on books, DATA as in
#          benchmarks/books.sh. Yes, if the last tokens differ by at most 0.01 on the mean of three
#          seeds and no seed is worse by 0.03. Prediction: 0.00, with 0.02 of noise.
set -u
export PYTHONUNBUFFERED=1
out=${OUT:-/tmp/speed_gpu}
mkdir -p "$out"

parts() {  # seconds, words
  timeout "$(($1 + 10))" python3 benchmarks/step_parts.py --rounds 5 --json "$out/speed.jsonl" \
    --seconds "$1" "${@:2}"
}

run() {
  case $1 in
    right)
      float64="match_the_float64 and pallas_gpu and boundaries"
      JAX_PLATFORMS=cuda,cpu timeout 130 python3 -m pytest -q -x -m gpu tests/gpu/test_kernels.py \
        -k "($float64) or (stretches and boundaries) or (ridge_writes and 1024)" || return 1 ;;
    op)
      both=xla:1+pallas_gpu:1
      parts 45 --skip step,op,parts --rows packed \
        --ops "768x2048:512:8:16384:0.9=$both,2560x9728:1024:1:32768=$both" ;;
    books)
      parts 100 --skip op,parts --steps 6,none,6+fused ;;
    large)
      keep='[attention, ttt_target, mlp_gate, mlp_up]'
      parts 100 --skip op,parts --preset qwen3_1p7b --steps on,none,on+fused --documents 1 \
        --data.seq_len=8192 --data.batch_size=4 --model.ttt.chunk_size=1024 --remat_save="$keep"
      parts 80 --skip op,parts --preset 500m --steps on,none --documents 2 \
        --data.batch_size=2 --remat_save="$keep" ;;
    ridge) timeout 60 python3 benchmarks/writes.py --repeats 5 ;;
    curves)
      for seed in ${SEEDS:-0}; do
        SEEDS=$seed OUT=$out bash benchmarks/books.sh "$DATA" 0 480 "split: --steps 358" \
          "fused: --steps 358 --model.ttt.apply fused"
      done ;;
    *) echo "no such part: $1" && return 2 ;;
  esac
}

all() {
  local code=0
  for part in "$@"; do
    echo "== $part"
    run "$part" || code=$?
    [ "$part" = right ] && [ "$code" != 0 ] && break
  done
  return "$code"
}

all "$@" 2>&1 | tee -a "$out/speed.txt"
exit "${PIPESTATUS[0]}"
