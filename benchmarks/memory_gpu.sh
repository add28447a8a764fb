#!/usr/bin/env bash
# What the memory commands and benchmarks/memory_study.py give on one GPU, in at most SECONDS.
#
#   bash benchmarks/memory_gpu.sh RUN HELDOUT OUT [SECONDS [OPTIONS OF THE STUDY]]
#
# RUN is a run of configs/books.yaml, HELDOUT its held-out books (books_heldout.jsonl.xz). The study
# comes first and writes OUT/study after each of its parts. Then, as long as there is time: all books
# read by `memory read` with its rate, what merge and lora write and weigh, recall and strict mode of
# `eval`.
set -u
run=$1 heldout=$2 out=$3 seconds=${4:-240}
mkdir -p "$out"
big=$(mktemp -d) # what is too large to bring home
trap 'rm -rf "$big"' EXIT
export PYTHONUNBUFFERED=1
step() { # NAME COMMAND...: what is left of the time is its limit
  local left=$((seconds - SECONDS)) began=$SECONDS name=$1
  shift
  [ "$left" -gt 5 ] || { echo "no time for $name" && return; }
  timeout "$left" "$@" 2>&1 | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-15}"
  echo "$name: exit ${PIPESTATUS[0]}, $((SECONDS - began)) s"
}
ttt_jax() { step "$1" python3 -m ttt_jax "${@:2}"; }

LINES_SHOWN=200 step study python3 benchmarks/memory_study.py "$run" "$heldout" --out "$out/study" "${@:5}"
ttt_jax read memory read "$run" "$heldout" --each --out "$big/each" --batch-size 30
first=$(find "$big/each" -name '*.memory' | sort | head -n 1)
ttt_jax info memory info "$first"
ttt_jax merge memory merge "$run" "$first" "$big/merged" --dtype bfloat16
ttt_jax lora memory lora "$first" "$big/adapter" --rank 16
du -sk "$big"/* "$first"
ttt_jax recall eval --model "$run" --recall "$heldout" --lengths 8k,16k --documents 20 \
  --batch-size 20 --out "$out/recall"
ttt_jax strict eval --model "$run" --perplexity "$heldout" --lengths 8k,32k --block 4096 \
  --documents 20 --batch-size 20 --strict --no-shuffled --out "$out/strict"
