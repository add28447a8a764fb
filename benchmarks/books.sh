#!/usr/bin/env bash
# Study 1 on one GPU: configs/books.yaml with and without TTT, arms by name, seeds as asked.
#
#   SEEDS="0 1 2" bash benchmarks/books.sh FOLDER GPU SECONDS "NAME: --field value ..." ...
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz and books_tokenizer.json
# (examples/books_tokenizer.py). One run at a time; no run starts in the last 150 seconds. Results
# are printed as they come, and $OUT gets them packed, if it is set. What is not done in time goes
# on when the same words are used again on the same machine. Equal time, full attention:
#
#   "none460: --steps 460 --model.ttt.layers=[]"
#   "full: --steps 300 --model.ttt.layers=[] --model.sliding_window null"
set -u
data=$1
export CUDA_VISIBLE_DEVICES=$2 PYTHONUNBUFFERED=1
seconds=$3
shift 3
runs=/tmp/books/gpu$CUDA_VISIBLE_DEVICES
mkdir -p "$runs" "${OUT:=/tmp/books/packed}"

arms=()
for arm in "$@"; do arms+=(--arm "$arm"); done
base="--data.train $data/books_train.jsonl.xz --data.heldout $data/books_heldout.jsonl.xz"
base="$base --data.tokenizer $data/books_tokenizer.json --eval.rows 30 --eval.buckets 8"
base="$base --log.probe_every 0 --log.tensorboard false --compile_cache null"

# shellcheck disable=SC2086
timeout "$seconds" python3 benchmarks/study.py configs/books.yaml --out "$runs" --base "$base" \
  --seconds "$((seconds - 150))" --seeds ${SEEDS:-0} "${arms[@]}"
tar czf "$OUT/books-gpu$CUDA_VISIBLE_DEVICES.tgz" -C "$runs" --exclude checkpoints --exclude '*.npy' .
exit 0
