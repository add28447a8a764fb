#!/usr/bin/env bash
# The next minutes on a GPU, prepared on 2026-11-30. Delete what has been run.
#
#   bash benchmarks/next_gpu.sh PART FOLDER [GPU] [SECONDS]
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz, books_tokenizer.json, and for smollm2
# also smollm2/ (examples/smollm2.py) and books_small.jsonl.xz (the first 30 to 72 MB of the texts).
# $OUT gets results. An arm of `books` takes 180 s, those with prediction errors more.
#
#   speed    260 s, FIRST: what docs/lab/2026-11-30-speed-timed.md changed has never run on a card.
#            `right` compares with float64 and stops the rest. Then `large` and `ridge`, 195 s, if
#            there is time.
#   reading  60 s: tests of decoding and reading scanned models (S = 0 must not come back).
#   errors   400 s: prediction errors on books, in the last layer and in all six, beside `noproj` of
#            docs/results (last tokens 4.242 with seed 0). Predictions: six layers 4.16 with 30 %
#            more time a step, the last alone 4.30 with 5 %; so at equal time six layers win.
#   seeds    370 s: seeds 1 and 2 of the arm that won.  ARM="error: ..." bash ... seeds ...
#   smollm2  560 s: no TTT, the sweep of drop_in_error.py on it, training from its start.
#            Predictions: 0.03 on training books and 0.025 on held-out novels before training;
#            `error` ends 0.03 below no TTT at 8k (40 % of the way to full attention), and is no
#            worse at 32k.
#   sums     370 s: two more seeds of `sum` without W_target, and recall of all three beside ridge's
#            0.32 (three times is asked; prediction: 0.08).
# Study 2 has a script of its own: benchmarks/ablations.sh books FOLDER GPU SECONDS.
set -u
part=$1
data=$2
gpu=${3:-0}
seconds=${4:-570}
export CUDA_VISIBLE_DEVICES=$gpu PYTHONUNBUFFERED=1
out=${OUT:-/tmp/next_gpu}
mkdir -p "$out"
begin=$SECONDS
left() { echo $((seconds - SECONDS + begin)); }
errors="--steps 358 --model.ttt.target prediction_error"

case $part in
  speed) timeout "$seconds" bash benchmarks/speed_gpu.sh right op books ;;
  reading)
    JAX_PLATFORMS=cuda,cpu timeout "$seconds" python3 -m pytest tests/gpu -m gpu -q \
      -k "completes_a_chunk or scanned_model" ;;
  errors)
    OUT=$out bash benchmarks/books.sh "$data" "$gpu" "$seconds" "error: $errors" \
      "error1: $errors --model.ttt.layers [11]" ;;
  seeds) SEEDS="1 2" OUT=$out bash benchmarks/books.sh "$data" "$gpu" "$seconds" "$ARM" ;;
  smollm2)
    OUT=$out bash benchmarks/smollm2.sh "$data" "$gpu" "$(left)" none
    timeout 230 python3 benchmarks/drop_in_error.py --data "$data" --out "$data" \
      --model /tmp/smollm2_runs/none-0 --seconds 200 | tee "$out/drop_in_error.txt"
    OUT=$out bash benchmarks/smollm2.sh "$data" "$gpu" "$(left)" error ;;
  sums)
    sum="sumnoproj: --steps 358 --model.ttt.write sum --model.ttt.lr 0.0011"  # as seed 0
    SEEDS="0 1 2" OUT=$out bash benchmarks/books.sh "$data" "$gpu" "$(left)" "$sum"
    timeout "$(left)" python3 benchmarks/books_eval.py "/tmp/books/gpu$gpu"/sumnoproj-? \
      --data "$data/books_heldout.jsonl.xz" --out "$out/eval" --seconds "$(($(left) - 50))" ;;
  *) echo "PART is one of the names above" && exit 2 ;;
esac
exit 0
