# syntax=docker/dockerfile:1
# An image with everything but models and data. Written and linted, never built: see README, Platforms.
#   docker build --tag sft-play .
#   docker run --rm -it --gpus all -v "$PWD/data:/home/sft/sft-play/data" -v "$PWD/outputs:/home/sft/sft-play/outputs" \
#       -v "$PWD/adapters:/home/sft/sft-play/adapters" -v sft-models:/home/sft/sft-play/.cache sft-play make check
# Tokens are given when it runs (--env-file .env); none is ever part of the image.

# torch brings its own CUDA libraries; of this image it needs what lets the driver's in
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS system
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc and Python's headers: Triton compiles its kernels when they are first used
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends \
        ca-certificates gcc git less libc6-dev make python3 python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1001 sft
# sft, by number: some hosts insist on seeing that it is not root
USER 1001
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM system AS project
WORKDIR /home/sft/sft-play
ARG EXTRAS=data
COPY --chown=sft:sft pyproject.toml LICENSE README.md Makefile ./
COPY --chown=sft:sft env env
COPY --chown=sft:sft scripts scripts
# the versions of env/constraints.txt, with CUDA though no card is here while it is built
RUN --mount=type=cache,target=/home/sft/.cache/pip,uid=1001,gid=1001 \
    make install TORCH=cuda EXTRAS="$EXTRAS"
COPY --chown=sft:sft . .
RUN make setup-dirs && mkdir -p .cache
CMD ["make"]
