#!/usr/bin/env bash
# The next minutes on one H100, prepared: why `ridge` failed there, then the study on books.
#
#   bash benchmarks/next_gpu.sh FOLDER [SECONDS]
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz and books_tokenizer.json
# (examples/books_tokenizer.py). Results are printed as they come; $OUT gets them, if it is set.
#
# Predictions. (1) With XLA's Triton matmuls the ridge write is wrong or not the same twice; without
# them it is right. (2) `books`, 300 steps, last 2k of 16k: no TTT 5.08, sum 4.83, ridge at most 4.78.
set -u
data=$1
seconds=${2:-480}
out=${OUT:-/tmp/study}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
nvidia-smi --query-gpu=name,power.limit --format=csv,noheader

timeout 90 python3 benchmarks/writes.py
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=false"
timeout 90 python3 benchmarks/writes.py
if [ $? -ne 0 ]; then
  echo "ridge is wrong without Triton's matmuls, too: only sum is trained"
fi

base="--data.train $data/books_train.jsonl.xz --data.heldout $data/books_heldout.jsonl.xz"
base="$base --data.tokenizer $data/books_tokenizer.json --steps 300 --eval.rows 30 --eval.buckets 8"
base="$base --log.probe_every 0 --log.tensorboard false --compile_cache null"
# One run at a time: two at once take 29 GiB each and slow each other down.
timeout "$seconds" python3 benchmarks/study.py configs/books.yaml --out /tmp/books --base "$base" \
  --seconds "$((seconds - 150))" \
  --arm "ridge: --model.ttt.write ridge --model.ttt.lr 0.5" \
  --arm "sum: --model.ttt.lr 0.002"
cp /tmp/books/results.jsonl "$out/" 2> /dev/null
cp /tmp/books/*.log "$out/" 2> /dev/null
exit 0
