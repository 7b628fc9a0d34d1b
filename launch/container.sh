#!/bin/sh
# What an image is made by: installs the package with its extras, and PyTorch for NVIDIA GPUs and CPUs or, where an index of
# wheels for CPUs alone is given (pytorch.org, "Get started", names PyTorch's), from there: several GB less.
# usage: launch/container.sh [INDEX]
set -eu
cd "$(dirname "$0")/.."
exec python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    --constraint launch/constraints.txt ${1:+"--extra-index-url=$1"} ".[hf,onnx,timm]"
