#!/usr/bin/env bash
# The next minutes on GPUs, prepared on 2026-11-30. Delete what has been run.
#
#   bash benchmarks/next_gpu.sh PART FOLDER [GPU] [SECONDS]
#
# FOLDER holds books_train.jsonl.xz, books_heldout.jsonl.xz, books_tokenizer.json, and for smollm2
# also smollm2/ (examples/smollm2.py) and books_small.jsonl.xz (the first 30 to 72 MB of the texts).
# On a machine of two GPUs two parts run side by side, each with its own GPU. $OUT gets results.
#
#   tests    120 s, FIRST: nothing of the sweeps, the ridge's products, the targets' convolution,
#            the one-pass loss, write_chunk and the barriers has passed tests/gpu. Prediction: all
#            pass.
#   curves   100 s, SECOND: 40 steps of books with the kernels and with `xla`, same seed. Prediction:
#            the losses differ by less than 0.02 at every step. If not, one kernel is wrong: take
#            it out (`products_for` returns Matmuls; `_pallas_gpu_pays` returns False).
#   steps    210 s. Books: none, six, four, fused, sum. Prediction: six layers of ridge 0.330 s of
#            0.261 (26 %), sum 0.300; the op at C = 512 beside its bound.
#   ridge    150 s. Prediction: one write with gradients 4.2 ms at books, 7 to 8 at 4B; the step
#            10 % over `sum`.
#   kernels  100 s: what the step with TTT computes more than the one without, kernel by kernel.
#   large    170 s: 1.7B at 4 x 8k and 500M at 2 x 32k. Prediction: MFU 73 %, TTT 3 %, 500M 6 %.
#   study1   430 s. decay358, seeds 0 and 2 (seed 1 is docs/results/2026-11-30-books-*): 4.50, 4.52;
#            then books_eval: another book's S below off, recall above 0 on and 0 off.
#   memory   240 s: own and other books' memories of a books run in FOLDER/run (study1 leaves some).
#   smollm2  each arm 60 to 100 s. Is it the start or the place of the layers; what more steps give;
#            what decay gives at 32k. Predictions: late 0.004, start5x600 0.012 below no TTT at 8k;
#            with decay no worse at 32k than at 8k.
# Study 2 has a script of its own: benchmarks/ablations.sh books FOLDER GPU SECONDS. `noproj` first:
# it gained 0.11 and 0.15 on the default run.
set -u
part=$1
data=$2
gpu=${3:-0}
seconds=${4:-570}
export CUDA_VISIBLE_DEVICES=$gpu PYTHONUNBUFFERED=1
out=${OUT:-/tmp/next_gpu}
mkdir -p "$out"
parts() { timeout "$seconds" python3 benchmarks/step_parts.py --skip "$1" --rounds 5 "${@:2}"; }

case $part in
  tests) JAX_PLATFORMS=cuda,cpu timeout "$seconds" python3 -m pytest tests/gpu -m gpu -q ;;
  curves)
    for implementation in null xla; do
      timeout "$seconds" python3 train.py configs/books.yaml --runs_dir "$out/curves" \
        --name "$implementation" --steps 40 --eval.rows 2 --log.every 5 --log.tensorboard false \
        --data.train "$data/books_train.jsonl.xz" --data.tokenizer "$data/books_tokenizer.json" \
        --model.ttt.implementation "$implementation" > "$out/$implementation.log" 2>&1
      grep -o "^step [0-9]*/40  loss [0-9.]*" "$out/$implementation.log" \
        > "$out/$implementation.txt"
    done
    paste "$out/null.txt" "$out/xla.txt" ;;
  steps)
    parts op --steps none,6,4,6+fused,6+sum --rows packed --seconds 72
    parts step,op,parts --rows "one document,packed" --seconds 60 \
      --ops 2560x9728:1024:1:32768=pallas_gpu:1
    parts step,op,parts --rows "one document" --seconds 75 \
      --ops 2560x9728:512:1:32768=pallas_gpu:1+pallas_gpu:2+pallas_gpu:1:fused ;;
  ridge)
    timeout 100 python3 benchmarks/writes.py --repeats 5
    for write in ridge sum; do
      timeout 95 python3 benchmarks/train_step.py --preset books --seq 16384 --batch 8 --only on \
        --steps 8 --model.ttt.write $write 2>&1 | tail -2
    done ;;
  kernels) timeout "$seconds" python3 benchmarks/step_kernels.py --steps none,6 --rows 30 ;;
  large)
    keep='[attention, ttt_target, mlp_gate, mlp_up]'
    parts op,parts --preset qwen3_1p7b --steps none,on --documents 1 --seconds 85 \
      --data.seq_len=8192 --data.batch_size=4 --model.ttt.chunk_size=1024 --remat_save="$keep"
    parts op,parts --preset 500m --steps none,on --documents 2 --seconds 70 \
      --data.batch_size=2 --remat_save="$keep" ;;
  study1) OUT=$out/study1 bash benchmarks/study1.sh "$data" "$seconds" ;;
  memory)
    heldout=$data/books_heldout.jsonl.xz
    bash benchmarks/memory_gpu.sh "$data/run" "$heldout" "$out/memory" 240 ;;
  smollm2)
    timeout 115 python3 benchmarks/drop_in.py --data "$data" --out "$out/drop_in" --seconds 100
    cp -r "$out/drop_in/start" "$out/drop_in/layers.json" "$data/"
    bash benchmarks/smollm2.sh "$data" "$gpu" "$seconds" none start5 late none-steps600 start5x600 \
      start5decay ;;
  *) echo "PART is one of the names above" && exit 2 ;;
esac
exit 0
