#!/bin/sh
# What an image is made by: installs the package with its extras, and PyTorch for the device that the image is for.
# usage: launch/container.sh cpu|cuda
set -eu
cd "$(dirname "$0")/.."
case "$1" in
    cpu) index=https://download.pytorch.org/whl/cpu ;; # the usual wheels bring CUDA, several GB of it
    cuda) index= ;;
    *)
        echo "DEVICE: got '$1'; expected cpu or cuda" >&2
        exit 2
        ;;
esac
exec python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    --constraint launch/constraints.txt ${index:+"--extra-index-url=$index"} ".[hf,onnx,timm]"
