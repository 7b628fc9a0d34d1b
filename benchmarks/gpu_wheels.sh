#!/usr/bin/env bash
# Wheels for benchmarks/gpu.sh on a machine without network whose Python has torch and all else but these:
# benchmarks/gpu_wheels.sh [PACKAGE...]. They land in .wheels/, which git ignores; take that folder along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf .wheels
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --constraint launch/constraints.txt --wheel-dir .wheels \
    hydra-core omegaconf antlr4-python3-runtime "$@"
du -sh .wheels
