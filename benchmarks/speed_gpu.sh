#!/usr/bin/env bash
# What docs/lab/2026-11-30-merged-speed.md changed and could not time: one H200, 200 s for the first
# three parts. Delete what has been run.
#
#   bash benchmarks/speed_gpu.sh PART...          # in this order: right op books large ridge
#
#   right   60 s. The changed kernels against float64, and stretches bit for bit. All pass; if not,
#           time nothing.
#   op      75 s. Results compared with XLA's before they are timed. Prediction, in ms:
#               4B, C = 1024, one document      forward 7.7 (9.5 before)   both 21.2 (24.6 before)
#               4B, packed                      forward 7.7                both 23.3 (23.6, c5c6708)
#               books, one document, decay      forward 2.25 (2.35)        both 6.45 (7.1)
#           If 4B misses by as much as books does, the clock did it. If books alone misses, the
#           epilogues of 64 columns and two buffers do not pay: see the lab page.
#   books   65 s. Prediction: six layers of ridge 21.4 % over none (23.4 % before).
#   large  135 s. Prediction: 1.7B 5.0 % (5.3 before), 500M 13.1 % (13.8 before).
#   ridge   60 s. Prediction: a write with gradients 4.1 ms at books.
set -u
export PYTHONUNBUFFERED=1
parts() {  # seconds, words
  timeout "$(($1 + 15))" python3 benchmarks/step_parts.py --rounds 5 --seconds "$1" "${@:2}"
}

for part in "$@"; do
  echo "== $part"
  case $part in
    right)
      JAX_PLATFORMS=cuda,cpu timeout 75 python3 -m pytest -q -x -m gpu tests/gpu \
        -k "(match_the_float64 and pallas_gpu) or stretches or one_product or ridge_writes" \
        || exit 1 ;;
    op)  # 4B packed first: it was the last to be compiled
      both=xla:1+pallas_gpu:1
      parts 75 --skip step,op,parts --rows "packed,one document" \
        --ops "2560x9728:1024:1:32768=$both,768x2048:512:8:16384:0.9=$both" ;;
    books)
      parts 65 --skip op,parts --steps 6,none --model.ttt.proj=false ;;
    large)
      keep='[attention, ttt_target, mlp_gate, mlp_up]'
      parts 70 --skip op,parts --preset qwen3_1p7b --steps on,none --documents 1 \
        --data.seq_len=8192 --data.batch_size=4 --model.ttt.chunk_size=1024 --remat_save="$keep"
      parts 65 --skip op,parts --preset 500m --steps on,none --documents 2 \
        --data.batch_size=2 --remat_save="$keep" ;;
    ridge) timeout 60 python3 benchmarks/writes.py --repeats 5 ;;
    *) echo "no such part: $part" && exit 2 ;;
  esac
done
