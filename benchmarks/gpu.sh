#!/usr/bin/env bash
# All GPU tests and GPU measurements in one call: benchmarks/gpu.sh OUTPUT_FOLDER
# Needs a Python with torch, torchvision and this package's dependencies importable; commit what lands in the folder
# under benchmarks/results/ with the date, the hardware and the commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER}"
python="${PYTHON:-python3}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv"
"$python" -m pytest tests/gpu -ra -p no:cacheprovider 2>&1 | tee "$out/tests.log"
for precision in off bf16; do
    "$python" -m distill device=cuda distill.amp="$precision" distill.steps=500 data.image_size=32 data.batch_size=128 \
        finetune.epochs=0 run.dir="$out/run-$precision" 2>&1 | tee "$out/run-$precision.log"
done
