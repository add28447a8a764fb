#!/usr/bin/env bash
# The next minutes on a GPU, prepared on 2026-11-30. Delete what has been run.
#
#   bash benchmarks/next_gpu.sh PART FOLDER [GPU] [SECONDS]
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz, books_tokenizer.json, and for smollm2
# also smollm2/ (examples/smollm2.py) and books_small.jsonl.xz (the first 30 books, 23 MB of text).
# $OUT gets results; a caller may see no more than the end of what is printed. Two runs of books do
# not fit on one card at once; two of smollm2 do (XLA_PYTHON_CLIENT_MEM_FRACTION=0.42).
#
#   speed    260 s, FIRST: what docs/lab/2026-11-30-speed-timed.md changed has never run on a card.
#            `right` compares with float64 and stops the rest. Then `large` and `ridge`, 260 s, and
#            `curves`, if there is time.
#   reading  60 s: tests of decoding and reading scanned models (S = 0 must not come back).
#   smollm2  400 s: no TTT, the sweep of drop_in.py on it with books that it has not seen, training
#            from its start. Predictions: with layers added at a scale of their own 0.024 behind the
#            first 2,048 tokens before training (the last layer alone: 0.019), and `error5` 0.005
#            better than `error` (0.020 below none at 8k). Then more seeds, as time allows.
#   longer   500 s, on the same machine: 800 steps with and without TTT side by side. Prediction:
#            0.029 at 8k (0.020 after 200, 0.025 after 400).
#   memories 400 s, behind smollm2: memories of the held-out novels (predictions:
#            docs/lab/2026-11-30-memories-smollm2.md), and the names that come back
#            (2026-11-30-book-names.md). FOLDER holds leavenworth.txt too, "The Leavenworth Case" of
#            books_train. Then: results.json to docs/results/2026-11-30-memory-smollm2.json, and
#            benchmarks/books_tables.py.
#   sums     370 s: two more seeds of `sum` without W_target, and recall of all three beside ridge's
#            0.32 (three times is asked; prediction: 0.08).
#   last     530 s: books with prediction errors in the last layer alone, embeddings in the others,
#            three seeds. Predictions: last tokens 4.16 with seed 0 (`noproj` 4.242, six layers of
#            errors 4.163), 5 % more time, so 0.05 ahead at equal time; three seeds agree.
# Study 2 has a script of its own: benchmarks/ablations.sh books FOLDER GPU SECONDS.
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

case $part in
  speed) timeout "$seconds" bash benchmarks/speed_gpu.sh right op books ;;
  reading)
    JAX_PLATFORMS=cuda,cpu timeout "$seconds" python3 -m pytest tests/gpu -m gpu -q \
      -k "completes_a_chunk or scanned_model" ;;
  smollm2)
    smollm2 none
    python3 - "$data" <<'END'
import itertools, lzma, sys
with lzma.open(f"{sys.argv[1]}/books_train.jsonl.xz", "rt") as books:
    with open(f"{sys.argv[1]}/unseen.jsonl", "w") as unseen:
        unseen.writelines(itertools.islice(books, 60, 72))
END
    timeout 120 python3 benchmarks/drop_in.py --data "$data" --texts "$data/unseen.jsonl" \
      --out "$data" --model /tmp/smollm2_runs/none-0 --seconds 100 | tee "$OUT/drop_in.txt"
    cp "$data/drop_in.jsonl" "$data/words.txt" "$OUT"
    smollm2 error error5 error:1 none:1 error:2 none:2 ;;
  longer)
    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.42
    smollm2 nonex800 & smollm2 errorx800
    wait ;;
  memories)
    bash benchmarks/memory_smollm2.sh "$data/smollm2" "$data/books_heldout.jsonl.xz" \
      "$OUT/memories" 150 "$data/leavenworth.txt"
    python3 -m ttt_jax convert "$data/smollm2" /tmp/calibrated --to hf \
      --ttt.calibrate "$data/leavenworth.txt"
    timeout "$(left)" python3 benchmarks/book_names.py /tmp/calibrated \
      "$data/books_heldout.jsonl.xz" --count 20 --factors 0.5,1,2 --context 512 \
      --out "$OUT/names.jsonl" --memories /tmp/book_memories
    python3 benchmarks/book_names_tables.py "$OUT/names.jsonl" ;;
  sums)
    sum="sumnoproj: --steps 358 --model.ttt.write sum --model.ttt.lr 0.0011"  # as seed 0
    SEEDS="0 1 2" bash benchmarks/books.sh "$data" "$gpu" "$(left)" "$sum"
    timeout "$(left)" python3 benchmarks/books_eval.py "/tmp/books/gpu$gpu"/sumnoproj-? \
      --data "$data/books_heldout.jsonl.xz" --out "$OUT/eval" --seconds "$(($(left) - 50))" ;;
  last)
    last="--steps 358 --model.ttt.last_target prediction_error"
    SEEDS="0 1 2" bash benchmarks/books.sh "$data" "$gpu" "$seconds" "last: $last" ;;
  *) echo "PART is one of the names above" && exit 2 ;;
esac
exit 0
