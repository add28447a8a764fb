# ttt_jax on an NVIDIA GPU: jax with CUDA 13, whose libraries come from pip. The host needs a driver
# for CUDA 13 (580 or newer) and the NVIDIA Container Toolkit.
#
#   docker build -t ttt-jax .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" ttt-jax train
#   docker run --rm --gpus all -it -v "$PWD/models:/work/models" ttt-jax chat --model models/qwen3
FROM python:3.12-slim

# gcc: triton compiles a small launcher at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
# The versions of CI first: this layer stays while only the code changes.
COPY constraints/ci-py312.txt constraints/
RUN pip install --no-cache-dir --require-hashes -r constraints/ci-py312.txt
COPY . .
# What the GPU adds is not pinned by hash; the versions that are installed already stay.
RUN pip freeze --exclude-editable > /tmp/installed.txt \
    && pip install --no-cache-dir -c /tmp/installed.txt '.[gpu]'

# A user of its own; what it writes lies in mounted folders.
RUN useradd --create-home --uid 1000 ttt && mkdir -p /work/runs && chown -R ttt /work
USER ttt
WORKDIR /work
ENTRYPOINT ["ttt-jax"]
CMD ["--help"]
