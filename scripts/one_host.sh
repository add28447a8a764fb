#!/usr/bin/env bash
# All GPUs of one host: one process drives them, nothing has to be started beside it.
#
#   scripts/one_host.sh configs/qwen3_0p6b.yaml --mesh.context 2
#
# CUDA_VISIBLE_DEVICES=0,1,2,3 takes some of them.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 CONFIG [--FIELD VALUE ...]" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
# jax takes three quarters of the memory unless told otherwise.
exec env XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}" python train.py "$@"
