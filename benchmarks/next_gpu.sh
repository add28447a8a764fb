#!/usr/bin/env bash
# The next minutes on a GPU, prepared on 2026-12-01. Delete what has been run.
#
#   bash benchmarks/next_gpu.sh PART FOLDER [GPU] [SECONDS]
#
# FOLDER holds, for smollm2 and better, smollm2/ (examples/smollm2.py), books_small.jsonl.xz
# (the first 30 books, 23 MB of text), books_heldout.jsonl.xz (20 novels) and unseen.jsonl.xz (books
# 60 to 71); for the others books_train.jsonl.xz, books_heldout.jsonl.xz, books_tokenizer.json.
# $OUT gets results; a caller may see no more than the end of what is printed. Two runs of books do
# not fit on one card at once; two of smollm2 do (XLA_PYTHON_CLIENT_MEM_FRACTION=0.42), but take as
# long together as one after the other.
#
#   smollm2  330 s: the curve over budgets of 100, 200 and 400 steps, with and without, on 30 books
#            (800 steps learn them by heart). 200 is in docs/results/2026-12-01-smollm2, none400 in
#            2026-11-30-smollm2. Predictions of the gain at 8k: 0.021 after 100, 0.027 after 400.
#   better   90 s, behind smollm2: the start with ridge 0.1, shrink 0.1, scale 0.3, which was 5 %
#            better on a model that knows novels. Prediction: 0.002 better at 8k.
#   more     330 s: none and error, 400 steps, with the first 60 books as books_small.jsonl.xz, so
#            that each is read as often as 30 in 200 steps. Prediction: 0.029 at 8k.
#   long     690 s in two calls: books, no TTT and the preset, four times the steps, at equal time
#            (docs/lab/2026-12-01-longer.md). Prediction: 0.413 becomes 0.20, and "off" is worse
#            than no TTT.
#   last     190 s a seed: books with prediction errors in the last layer alone, embeddings in the
#            others. Predictions: last tokens 4.16 with seed 0 (`noproj` 4.242, six layers of errors
#            4.163), 5 % more time, so 0.05 ahead at equal time.
#   sums     370 s: two more seeds of `sum` without W_target, and recall of all three beside ridge's
#            0.32 (three times is asked; prediction: 0.08).
#   reading  90 s: tests of decoding and reading scanned models (S = 0 must not come back).
# Also: benchmarks/speed_gpu.sh (large, ridge, curves), benchmarks/ablations.sh books.
set -u
part=$1
data=$2
gpu=${3:-0}
seconds=${4:-570}
export CUDA_VISIBLE_DEVICES=$gpu PYTHONUNBUFFERED=1
export OUT=${OUT:-/tmp/next_gpu}
mkdir -p "$OUT"
begin=$SECONDS
left() { echo $((seconds - SECONDS + begin)); }
smollm2() { bash benchmarks/smollm2.sh "$data" "$gpu" "$(left)" "$@" | tee -a "$OUT/smollm2.txt"; }
start() { # a setting of drop_in.py -> FOLDER/start, FOLDER/words.txt
  rm -rf "$data/start"
  timeout 60 python3 benchmarks/drop_in.py --data "$data" --texts "$data/unseen.jsonl.xz" \
    --out "$data" --passages 4 --override=--model.sliding_window=null --seconds 50 \
    --setting "$1" | tee -a "$OUT/drop_in.txt"
}

case $part in
  smollm2)
    start '{"scales": {"29": 0.6}, "read_cap": 0.06}'
    MODES=on smollm2 errorx100 nonex100 errorx400 ;;
  better)
    rm -rf /tmp/smollm2_out/error-0* # an evaluation replaces none
    start '{"scales": {"29": 0.3}, "read_cap": 0.06, "ridge": 0.1, "shrink": 0.1}'
    MODES=on smollm2 error ;;
  more)
    start '{"scales": {"29": 0.6}, "read_cap": 0.06}'
    MODES=on smollm2 errorx400:6 nonex400:6 ;;
  long)
    SEEDS=0 bash benchmarks/books.sh "$data" "$gpu" "$seconds" \
      "nonelong: --steps 1400 --model.ttt.layers=[]" "long: --steps 1160" ;;
  sums)
    sum="sumnoproj: --steps 358 --model.ttt.write sum --model.ttt.lr 0.0011"  # as seed 0
    SEEDS="0 1 2" bash benchmarks/books.sh "$data" "$gpu" "$(left)" "$sum"
    timeout "$(left)" python3 benchmarks/books_eval.py "/tmp/books/gpu$gpu"/sumnoproj-? \
      --data "$data/books_heldout.jsonl.xz" --out "$OUT/eval" --seconds "$(($(left) - 50))" ;;
  last)
    last="--steps 358 --model.ttt.last_target prediction_error"
    SEEDS="${SEEDS:-0}" bash benchmarks/books.sh "$data" "$gpu" "$seconds" "last: $last" ;;
  reading)
    JAX_PLATFORMS=cuda,cpu timeout "$seconds" python3 -m pytest tests/gpu -m gpu -q \
      -k "completes_a_chunk or scanned_model" ;;
  *) echo "PART is one of the names above" && exit 2 ;;
esac
exit 0
