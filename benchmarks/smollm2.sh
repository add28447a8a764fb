#!/usr/bin/env bash
# Study 3: SmolLM2-135M with a window of 1,024, trained on books at 8k, then read at 8k and 32k.
#
#   bash benchmarks/smollm2.sh FOLDER GPU SECONDS ARM...
#
# FOLDER holds smollm2/ (examples/smollm2.py), books_small.jsonl.xz and books_heldout.jsonl.xz.
# ARM is NAME or NAME:SEED; the names are below. What is done is not repeated. $OUT gets
# all results, packed.
set -u
data=$1
export CUDA_VISIBLE_DEVICES=$2 PYTHONUNBUFFERED=1
seconds=$3
shift 3
out=/tmp/smollm2_out
runs=/tmp/smollm2_runs
mkdir -p "$out" "$runs" "${OUT:=/tmp/smollm2_packed}"
started=$SECONDS
target=(--optimizer.groups "[{pattern: mlp.target, lr_multiplier: 100}]")

for arm in "$@"; do
  name=${arm%%:*}
  seed=0
  from=$data/smollm2
  [[ $arm == *:* ]] && seed=${arm##*:}
  case $name in
    none) words=("--model.ttt.layers=[]") ;;
    full) words=(--model.ttt.layers=[] --model.sliding_window=null) ;;
    ridge) words=("${target[@]}") ;;
    ridge10) words=("${target[@]}" --model.ttt.layers=[2,5,8,11,14,17,20,23,26,29]) ;;
    decay) words=("${target[@]}" --model.ttt.decay 0.9) ;;
    ridge3) words=("${target[@]}" --model.ttt.lr 3) ;;
    slow) words=(--optimizer.groups "[{pattern: mlp.target, lr_multiplier: 10}]") ;;
    late) words=(--optimizer.groups "[{pattern: mlp.target, lr_multiplier: 5}]" \
      --model.ttt.layers=[22,24,26,27]) ;;
    # From benchmarks/drop_in.py --out FOLDER, with five times the rate for the target.
    start5 | start5decay | start5x*)
      words=(--optimizer.groups "[{pattern: mlp.target, lr_multiplier: 5}]" \
        --model.ttt.layers "$(cat "$data/layers.json")")
      [[ $name == start5decay ]] && words+=(--model.ttt.decay 0.9)
      [[ $name == start5x* ]] && words+=(--steps "${name#start5x}")
      from=$data/start ;;
    # From benchmarks/drop_in_error.py --out FOLDER.
    error | error5 | errorx*)
      read -ra words < "$data/words.txt"
      [[ $name == error5 ]] && words+=(--optimizer.groups "[{pattern: mlp.target, lr_multiplier: 5}]")
      [[ $name == errorx* ]] && words+=(--steps "${name#errorx}")
      from=$data/start_error ;;
    sum) words=("${target[@]}" --model.ttt.write sum --model.ttt.lr 0.002) ;;
    steps*) words=("${target[@]}" --steps "${name#steps}") ;;
    none-steps*) words=(--model.ttt.layers=[] --steps "${name#none-steps}") ;;
    *) echo "no arm $name" && exit 2 ;;
  esac
  left=$((seconds - SECONDS + started))
  ((left < 60)) && echo "$arm: not started, the time is up" && continue
  run=$name-$seed
  if [[ ! -e $runs/$run/report.json ]]; then
    timeout "$left" python3 train.py benchmarks/smollm2_books.yaml --init_from "$from" \
      --data.tokenizer "$data/smollm2" --data.train "$data/books_small.jsonl.xz" \
      --data.heldout "$data/books_heldout.jsonl.xz" --runs_dir "$runs" --name "$run" \
      --seed "$seed" --log.tensorboard false --log.probe_every 0 --compile_cache null "${words[@]}" \
      > "$out/$run.log" 2>&1
  fi
  grep -E "init_from|error|mean|tokens/s" "$out/$run.log" | tail -6 | sed "s/^/$run: /"
  lengths=8k,32k
  [[ $name == full ]] && lengths=8k
  modes=both
  [[ $name == none* || $name == full ]] && modes=off
  left=$((seconds - SECONDS + started))
  ((left < 20)) && echo "$arm: not evaluated, the time is up" && continue
  timeout "$left" python3 -m ttt_jax eval --model "$runs/$run" \
    --perplexity "$data/books_heldout.jsonl.xz" --lengths $lengths --documents 20 --block 2048 \
    --batch-size 4 --dtype bfloat16 --ttt $modes --out "$out/$run-eval" > "$out/$run-eval.log" 2>&1
  tail -12 "$out/$run-eval.log" | sed "s/^/$run: /"
  cp "$out/$run-eval/results.json" "$out/$run.json" 2> /dev/null
done
tar czf "$OUT/smollm2-gpu$CUDA_VISIBLE_DEVICES.tgz" -C "$out" .
exit 0
