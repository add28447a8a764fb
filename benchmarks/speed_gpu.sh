#!/usr/bin/env bash
# What docs/performance.md has not timed since 83e0756, on one H200. Delete what has been run.
#
#   [OUT=FOLDER] bash benchmarks/speed_gpu.sh PART...          # in this order: right large ridge
#   DATA=FOLDER [SEEDS="0 1 2"] bash benchmarks/speed_gpu.sh curves
#
# Everything is printed and also added to $OUT/speed.txt, times to $OUT/speed.jsonl. `op` and `step` of
# 2026-12-01 are in docs/lab; run them again when a kernel has changed.
#
#   right   50 s, in four processes: a case takes 20 to 40 s. The kernels against float64. All
#           pass; if not, time nothing.
#   step   100 s behind right. Over none without loops: six fused layers 13.5 %, four 8.5 %; in loops
#           six 17.7 %, fused 16.9 % at fb2a825. Then a profile.
#   ridge   60 s. Prediction: a write with gradients 2.9 ms at books.
#   large  270 s. Prediction: 1.7B 4.6 %, fused 4.0 % (5.3 % at 83e0756), 500M 11.5 % (13.8 %), and
#           9 % fused without loops.
#   op      60 s. Results compared with XLA's before they are timed.
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
      export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
      local jobs=() code=0
      for cases in "float64_reference and pallas_gpu and boundaries" "stretches and 3-256" \
        "ridge_writes and 1024" "one_product and 1-boundaries"; do
        timeout 150 python3 -m pytest -q -x -m gpu tests/gpu/test_kernels.py -k "$cases" &
        jobs+=($!)
      done
      for job in "${jobs[@]}"; do wait "$job" || code=1; done
      unset JAX_PLATFORMS XLA_PYTHON_CLIENT_PREALLOCATE
      return "$code" ;;
    op)
      both=xla:1+pallas_gpu:1
      parts 45 --skip step,op,parts --rows packed \
        --ops "768x2048:512:8:16384:0.9=$both,2560x9728:1024:1:32768=$both" ;;
    large)
      keep='[attention, ttt_target, mlp_gate, mlp_up]'
      parts 100 --skip op,parts --preset qwen3_1p7b --steps on,none,on+fused --documents 1 \
        --data.seq_len=8192 --data.batch_size=4 --model.ttt.chunk_size=1024 --remat_save="$keep"
      parts 150 --skip op,parts --preset 500m --steps none+unroll,on+fused+unroll,on,none \
        --documents 2 --data.batch_size=2 --remat_save="$keep" ;;
    step)
      parts "${STEP_SECONDS:-150}" --skip op,parts \
        --steps none,6+fused+unroll,none+unroll,4+fused+unroll,6
      timeout 90 python3 benchmarks/step_kernels.py --steps none,6,6+fused --rows 14 --repeats 2 \
        --out "$out" | cut -c1-110 ;;
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
