# The toolkit with all that it runs on, for a CPU or for NVIDIA GPUs.
#   docker build -t novelgpt .
#   docker build -t novelgpt:cuda --build-arg VARIANT=cuda .
#   docker run --rm -it --init --user "$(id -u):$(id -g)" -v "$PWD:/data" novelgpt demo
#   docker run --rm -it --init --user "$(id -u):$(id -g)" -v "$PWD:/data" --gpus all --ipc host novelgpt:cuda \
#     lora --model Qwen/Qwen3-0.6B --train_files my.jsonl
# The folder that is mounted at /data is where files are read and output/ is written. Models of the hub stay in
# /data/.cache/huggingface.
ARG VARIANT=cpu
# DeepSpeed compiles with the toolkit of the image, whose CUDA has to be the one that torch was built for.
ARG CUDA=13.0.2
ARG CUDA_WHEELS=cu130

FROM ubuntu:24.04 AS base-cpu
ARG WHEELS=cpu

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS base-cuda
ARG CUDA_WHEELS
ARG WHEELS=${CUDA_WHEELS}

# hadolint ignore=DL3006
FROM base-${VARIANT}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A compiler for what DeepSpeed and torch build, ssh for HOSTFILE, and letters for the Chinese in pictures. Of Ubuntu's
# packages, the release's own versions are wanted, with their mends.
# hadolint ignore=DL3008
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    build-essential ca-certificates fonts-noto-cjk git openssh-client python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/novelgpt
ENV PATH="/opt/novelgpt/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch by itself, from its own index, in a layer that changes seldom; then the rest of the requirements.
WORKDIR /src
COPY requirements.txt ./
RUN pip install "$(grep '^torch==' requirements.txt)" --index-url "https://download.pytorch.org/whl/${WHEELS}" \
  && pip install -r requirements.txt
COPY . .
RUN pip install --no-deps . && rm -rf /src/*

# Whoever runs it, by --user, has a home to write to.
RUN mkdir -m 1777 /home/any
ENV HOME=/home/any HF_HOME=/data/.cache/huggingface
WORKDIR /data
RUN chmod 1777 /data
USER 1000:1000
ENTRYPOINT ["novelgpt"]
CMD ["--help"]
