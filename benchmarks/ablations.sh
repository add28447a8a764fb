#!/usr/bin/env bash
# Study 2: what the target and the number of layers and chunks are worth. Predictions are in
# docs/lab/2026-11-30-ablations.md.
#
#   bash benchmarks/ablations.sh books DATA GPU SECONDS     110M on one GPU, 2.7 minutes an arm
#   bash benchmarks/ablations.sh default PARALLEL SECONDS   the default run on CPUs, two cores each
#
# The base is today's presets, without W_target: `noproj` in docs/results, 358 steps on books. Where
# the chunk changes, decay is a power of it, so that S remembers as many tokens. The words are the
# same the next time, so a second call on the same machine goes on. ARMS="layers2 noconv" chooses;
# the order is that below.
set -u
part=$1
shift

choose() { # name: words, one a line; keeps those that $ARMS names
  while read -r line; do
    for name in ${ARMS:-${line%%:*}}; do
      [ "$name" = "${line%%:*}" ] && arms+=("$line")
    done
  done
}
arms=()
case $part in
  books)
    choose <<'END'
layers12: --steps 358 --model.ttt.layers [0,1,2,3,4,5,6,7,8,9,10,11]
rate3: --steps 358 --model.ttt.lr 3
chunk256: --steps 358 --model.ttt.chunk_size 256 --model.ttt.decay 0.949
layers4: --steps 358 --model.ttt.layers [2,5,8,11]
noconv: --steps 358 --taps 2
nodecay: --steps 358 --model.ttt.decay 1
drop: --steps 358 --optimizer.ttt_drop 0.2
layers2: --steps 358 --model.ttt.layers [5,11]
chunk2048: --steps 358 --model.ttt.chunk_size 2048 --model.ttt.decay 0.656
raw: --steps 358 --model.ttt.normalize_source false
chunk1024: --steps 358 --model.ttt.chunk_size 1024 --model.ttt.decay 0.81
END
    bash benchmarks/books.sh "$1" "$2" "$3" "${arms[@]}"
    ;;
  default)
    export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES='' PYTHONUNBUFFERED=1
    choose <<'END'
noproj:
noproj+layers4: --model.ttt.layers [0,1,2,3]
noproj+rate3: --model.ttt.lr 3
noproj+chunk32: --model.ttt.chunk_size 32 --model.ttt.decay 0.949
noproj+noconv: --taps 2
noproj+nodecay: --model.ttt.decay 1
noproj+drop: --optimizer.ttt_drop 0.2
noproj+raw: --model.ttt.normalize_source false
noproj+next: --taps 3
noproj+past: --taps 0 1 2
noproj+layer1: --model.ttt.layers [3]
noproj+chunk128: --model.ttt.chunk_size 128 --model.ttt.decay 0.81
END
    words=()
    for arm in "${arms[@]}"; do words+=(--arm "$arm"); done
    out=${OUT:-/tmp/ablations}
    mkdir -p "$out" /tmp/ablations
    nice timeout "$2" python3 benchmarks/study.py default --out /tmp/ablations --parallel "$1" \
      --cores 2 --seconds "$(($2 - 130))" --seeds 0 1 2 "${words[@]}" --base "--log.probe_every 0 \
      --log.tensorboard false --compile_cache null --checkpoint.every 0"
    cp /tmp/ablations/results.jsonl "$out/ablations_default.jsonl"
    ;;
  *) echo "books DATA GPU SECONDS, or default PARALLEL SECONDS" && exit 2 ;;
esac
exit 0
