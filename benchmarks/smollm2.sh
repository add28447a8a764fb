#!/usr/bin/env bash
# Study 3: SmolLM2-135M with a window of 1,024, trained on books at 8k, then read at 8k and 32k.
#
#   bash benchmarks/smollm2.sh FOLDER GPU SECONDS ARM...
#
# FOLDER holds smollm2/ (examples/smollm2.py), books_small.jsonl.xz and books_heldout.jsonl.xz.
# ARM is NAME, NAMExSTEPS, and :SEED behind either; the names are below. What is done is not repeated.
# $OUT gets all results, packed. MODES=on evaluates with TTT alone. All arms are read at the same
# lengths, because these decide which tokens are scored.
set -u
data=$1
export CUDA_VISIBLE_DEVICES=$2 PYTHONUNBUFFERED=1
seconds=$3
shift 3
out=/tmp/smollm2_out
runs=/tmp/smollm2_runs
mkdir -p "$out" "$runs" "${OUT:=/tmp/smollm2_packed}"
started=$SECONDS

for arm in "$@"; do
  seed=0
  [[ $arm == *:* ]] && seed=${arm##*:}
  arm=${arm%%:*}
  from=$data/smollm2
  case ${arm%%x*} in
    none) words=("--model.ttt.layers=[]") ;;
    full) words=(--model.ttt.layers=[] --model.sliding_window=null) ;;
    error | error5) # from benchmarks/drop_in.py --out FOLDER
      read -ra words < "$data/words.txt"
      [[ $arm == error5* ]] && words+=(--optimizer.groups "[{pattern: mlp.target, lr_multiplier: 5}]")
      from=$data/start ;;
    *) echo "no arm $arm" && exit 2 ;;
  esac
  [[ $arm == *x* ]] && words+=(--steps "${arm##*x}")
  left=$((seconds - SECONDS + started))
  ((left < 60)) && echo "$arm: not started, the time is up" && continue
  run=$arm-$seed
  if [[ ! -e $runs/$run/report.json ]]; then
    timeout "$left" python3 train.py benchmarks/smollm2_books.yaml --init_from "$from" \
      --data.tokenizer "$data/smollm2" --data.train "$data/books_small.jsonl.xz" \
      --data.heldout "$data/books_heldout.jsonl.xz" --runs_dir "$runs" --name "$run" \
      --seed "$seed" --log.tensorboard false --log.probe_every 0 --compile_cache /tmp/smollm2_cache "${words[@]}" \
      > "$out/$run.log" 2>&1
  fi
  grep -E "init_from|error|mean|tokens/s" "$out/$run.log" | tail -6 | sed "s/^/$run: /"
  modes=${MODES:-both}
  [[ $arm == none* || $arm == full* ]] && modes=off
  left=$((seconds - SECONDS + started))
  ((left < 20)) && echo "$arm: not evaluated, the time is up" && continue
  timeout "$left" python3 -m ttt_jax eval --model "$runs/$run" \
    --perplexity "$data/books_heldout.jsonl.xz" --lengths 8k,32k --documents 20 --block 2048 \
    --batch-size 4 --dtype bfloat16 --ttt $modes --out "$out/$run-eval" > "$out/$run-eval.log" 2>&1
  tail -12 "$out/$run-eval.log" | sed "s/^/$run: /"
  cp "$out/$run-eval/results.json" "$out/$run.json" 2> /dev/null
done
tar czf "$OUT/smollm2-gpu$CUDA_VISIBLE_DEVICES.tgz" -C "$out" .
exit 0
