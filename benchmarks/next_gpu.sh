#!/usr/bin/env bash
# The next minutes on one H100, prepared: what ridge gives at equal time, its rate, and the ceiling.
#
#   bash benchmarks/next_gpu.sh FOLDER PART [SECONDS]
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz and books_tokenizer.json
# (examples/books_tokenizer.py). Each part fits 590 seconds. Results are printed as they come; $OUT
# gets them, if it is set. What is not done in time goes on when the same part is called again on
# the warm machine; reading the books takes the first call 50 to 100 s more.
#
# Known (docs/lab/2026-11-24-writes.md): 300 steps, last 2k of 16k, seed 0: no TTT 5.080, sum 4.834,
# ridge at lr 1 4.663; 0.293, 0.410 and 0.606 s a step.
#
#   time     no TTT for 619 steps and sum for 444, as long as ridge trains for 300.
#            Prediction: 4.83 and 4.71, so ridge wins by 0.17 and 0.05 at equal time.
#   rate     ridge at lr 3 and 10, seed 0. Prediction: 4.60 and 4.60; no step is skipped.
#   rate12   ridge at lr 3, seeds 1 and 2. Only if lr 3 was better than 4.663.
#   full     full attention without TTT, seed 0. Prediction: 5.02, so 300 steps are too few for it.
#   cost     times of the writes on this card; then where to save: keeping the root for the backward
#            (ttt_write among remat_save), fewer leaves, cuSOLVER's Cholesky.
set -u
data=$1
part=$2
seconds=${3:-570}
out=${OUT:-/tmp/study}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
nvidia-smi --query-gpu=name,power.limit --format=csv,noheader

base="--data.train $data/books_train.jsonl.xz --data.heldout $data/books_heldout.jsonl.xz"
base="$base --data.tokenizer $data/books_tokenizer.json --eval.rows 30 --eval.buckets 8"
base="$base --log.probe_every 0 --log.tensorboard false --compile_cache null"
ridge="--steps 300 --model.ttt.write ridge --model.ttt.lr"

# One run at a time: two at once take 29 GiB each and slow each other down.
study() {
  timeout "$seconds" python3 benchmarks/study.py configs/books.yaml --out "/tmp/books/$part" \
    --base "$base" --seconds "$((seconds - 240))" "$@"
  cp "/tmp/books/$part/results.jsonl" "$out/$part.jsonl" 2> /dev/null
  tar czf "$out/$part-logs.tgz" -C "/tmp/books/$part" --exclude checkpoints --exclude '*.npy' .
}

case $part in
  time) study --arm "none619: --steps 619 --model.ttt.layers=[]" \
    --arm "sum444: --steps 444 --model.ttt.lr 0.002" ;;
  rate) study --arm "ridge3: $ridge 3" --arm "ridge10: $ridge 10" ;;
  rate12) study --seeds 1 2 --arm "ridge3: $ridge 3" ;;
  full) study --arm "full: --steps 300 --model.ttt.layers=[] --model.sliding_window null" ;;
  cost) timeout "$seconds" python3 benchmarks/writes.py | tee "$out/writes.txt" ;;
  *) echo "PART is time, rate, rate12, full or cost" && exit 2 ;;
esac
exit 0
