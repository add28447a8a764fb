#!/usr/bin/env bash
# What memories of novels hold in SmolLM2 with TTT in its last layer: memory_study.py, on one GPU.
#
#   bash benchmarks/memory_smollm2.sh MODEL HELDOUT OUT [SECONDS [TEXT]]
#
# MODEL is a run, a converted or a Hugging Face folder with TTT, or SmolLM2 without: then TTT is
# calibrated first, from TEXT, which must not be one of the novels. HELDOUT has a novel a line (JSON
# lines). SmolLM2 knows 8,192 positions, so attention starts anew every 8,192 tokens,
# or more often: the best of three ways is kept. OUT/study has
# the results of every part that is done when the SECONDS are over.
set -u
model=$1 heldout=$2 out=$3 seconds=${4:-150} text=${5:-}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false} # the card is shared
made=$(mktemp -d) # 540 MB that are not to be brought home
trap 'rm -rf "$made"' EXIT
if [[ -e $model/config.json ]] && ! grep -q '"ttt_layers"' "$model/config.json"; then
  timeout "$seconds" python3 -m ttt_jax convert "$model" "$made/ttt" --to hf \
    --ttt.calibrate "$text" 2>&1 | tee "$out/calibrate.log" | tail -n 12
  model=$made/ttt
  [[ -e $model/config.json ]] || { echo "not calibrated" && exit 1; }
  cp "$model/config.json" "$out/config.json"
  echo "calibrated after $SECONDS s"
fi
timeout $((seconds - SECONDS)) python3 benchmarks/memory_study.py "$model" "$heldout" \
  --out "$out/study" --read 2048,4096,8192,16384 --context 8192 --contexts 512,2048 \
  --far 8192 --score 2048 --piece 2048 --dtype bfloat16 "${@:6}" 2>&1 | tee "$out/study.log"
echo "study: exit ${PIPESTATUS[0]}, $SECONDS s in all"
