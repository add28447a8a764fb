#!/usr/bin/env bash
# What SmolLM2, trained on books, keeps of novels that it has not seen, and what it says from it:
# figures for docs/memory.md, text for examples/smollm2.md. One card, three parts side by side.
#
#   bash benchmarks/smollm2_example.sh FOLDER OUT SECONDS [RUN]
#
# FOLDER holds books_heldout.jsonl.xz. RUN is a run of benchmarks/smollm2.sh (default: its
# error-0), or a folder that --ttt.calibrate made. OUT gets two files, also when the time is up:
# example.txt to read, and example.tgz:
#
#   memory/   benchmarks/memory_smollm2.sh: memories of BOOKS novels on their later chapters
#   talk/     memories of NOVELS (numbers in the file), chat and generate from them
#   names/    benchmarks/book_names.py on BOOKS novels: what is written, answered, likely; counted
#
# Sizes are variables, so that a CPU can try all of it: MORE has further words for memory_study.py.
set -u
data=$1 out=$2 seconds=$3 run=${4:-/tmp/smollm2_runs/error-0}
BOOKS=${BOOKS:-20} NOVELS=${NOVELS:-2 9 4} CHARACTERS=${CHARACTERS:-36000}
NAMES=${NAMES:---read 8192 --seeds 4 --factors 1,2 --kinds own,other} ANSWER=${ANSWER:-40}
books=$data/books_heldout.jsonl.xz
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
chunk=$(grep -rhoE '(chunk_size|ttt_chunk)"?: *[0-9]+' "$run"/config.* | grep -oE '[0-9]+$' | head -1)
[[ -n $chunk ]] || { echo "$run: no run and no folder with TTT" && exit 2; }
here=$(mktemp -d) # what comes back is small; memories stay here
mkdir -p "$out" "$here/memory/study" "$here/talk" "$here/names" "$here/novels"
left() { echo $((seconds - SECONDS - 6)); }
say() { echo "$SECONDS s: $*" | tee -a "$here/log.txt"; }

collect() {
  {
    cat "$here/log.txt"
    echo "== memories" && cut -c1-150 "$here/memory/study/tables.md"
    echo "== names" && cat "$here/names/tables.md"
    for file in "$here"/talk/*.txt; do echo "== ${file##*/}" && cat "$file"; done
  } > "$here/example.$BASHPID" 2> /dev/null
  tar czf "$here/packed.$BASHPID" -C "$here" log.txt memory talk names
  mv "$here/packed.$BASHPID" "$out/example.tgz" && mv "$here/example.$BASHPID" "$out/example.txt"
}
trap 'collect; rm -rf "$here"' EXIT
trap 'exit 1' TERM INT

memories() {
  bash benchmarks/memory_smollm2.sh "$run" "$books" "$here/memory" "$(left)" "" --count "$BOOKS" \
    --contexts "$chunk,$((4 * chunk))" ${MORE:-} > "$here/memory/log.txt" 2>&1
  say "memories: $(tail -n 1 "$here/memory/log.txt")"
}

names() {
  timeout "$(left)" python3 benchmarks/book_names.py "$run" "$books" --count "$BOOKS" \
    --context "$chunk" --out "$here/names/names.jsonl" $NAMES > "$here/names/log.txt" 2>&1
  timeout 60 env JAX_PLATFORMS=cpu python3 benchmarks/book_names_tables.py \
    "$here/names/names.jsonl" > "$here/names/tables.md" 2>> "$here/names/log.txt"
  say "names: $(wc -l < "$here/names/names.jsonl") novels; $(tail -n 1 "$here/names/log.txt")"
}

# The same questions at 1, 3/2 and twice the memory, each for itself, with and without it.
chat() { # MEMORY NAME
  for stronger in "" "/forget 3/2" "/forget 4/3"; do
    echo "$stronger"
    for question in "Who opened the door?" "What is his name?" "Who is she in love with?" \
      "Where do they live?" "Who wrote the letter?" "Tell me about the people of this story."; do
      printf '%s\n/ttt off\n/undo\n' "$question"
    done
  done > "$here/$2.turns"
  timeout "$(left)" python3 -m ttt_jax chat --model "$run" --memory "$1" \
    --max-new-tokens "$ANSWER" < "$here/$2.turns" > "$here/talk/$2.txt" 2>&1
  say "talk: $2"
}

write() {
  timeout "$(left)" python3 -m ttt_jax generate --model "$run" --no-ttt --max-new-tokens "$ANSWER" \
    --prompt '"I do not believe it," said' --prompt '"My name is' \
    --prompt 'Then the door opened, and' --prompt 'The letter was from' \
    --prompt 'It was raining when they reached' --prompt 'Chapter II' "$@"
}

talk() {
  python3 - "$books" "$here" "$CHARACTERS" $NOVELS << 'END'
import json, lzma, re, sys

books, here, characters, *numbers = sys.argv[1:]
for i, line in enumerate(lzma.open(books, "rt", encoding="utf-8")):
    if str(i) in numbers:
        record = json.loads(line)
        text = re.sub(r"[ \t\r]+\n", "\n", record["text"][5000:])[: int(characters)]
        with open(f"{here}/novels/{record['title'].split()[0]}.txt", "w", encoding="utf-8") as file:
            file.write(text)
END
  timeout "$(left)" python3 -m ttt_jax memory read "$run" "$here"/novels/*.txt --each \
    --context "$chunk" --out "$here/memories" > "$here/talk/read.log" 2>&1
  say "talk: $(tail -n 1 "$here/talk/read.log")"
  write > "$here/talk/generate-none.txt" 2>&1 &
  for memory in "$here"/memories/*.memory; do
    name=${memory##*/0*-} && name=${name%.txt.memory}
    chat "$memory" "$name" &
    {
      python3 -m ttt_jax memory scale "$memory" 3/2 --out "$here/$name.memory"
      write --memory "$here/$name.memory"
    } > "$here/talk/generate-$name-times-3_2.txt" 2>&1 &
  done
  wait
}

say "chunk $chunk, run $run, $(git rev-parse --short HEAD 2> /dev/null)"
memories & names & talk &
for _ in 1 2 3; do wait -n; collect; done
say "end"
head -c 5500 "$here/memory/study/tables.md"
cat "$here/names/tables.md"
head -c 1500 "$here"/talk/[!g]*.txt
exit 0
