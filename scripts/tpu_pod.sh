#!/usr/bin/env bash
# One command on every host of a TPU pod slice; jax finds the other hosts through the TPU's
# metadata.
#
#   scripts/tpu_pod.sh my-v5p-128 us-east5-a configs/qwen3_8b_longct.yaml --runs_dir=/mnt/shared/runs
#
# On every host, the same path (TTT_JAX_DIR, default ttt_jax in the home folder) holds this project,
# installed with `pip install -e '.[tpu]'`; data, checkpoints and runs_dir lie on a file system that
# all hosts share (Filestore, or a bucket mounted by gcsfuse). Stop it with SIGTERM or Ctrl-C: the
# step is saved, the same command continues.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $0 TPU_NAME ZONE CONFIG [--FIELD VALUE ...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
words=$(printf ' %q' "$@") # the remote shell splits again

exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd ${TTT_JAX_DIR:-ttt_jax} && exec python3 train.py$words"
