#!/usr/bin/env bash
# The main job on the digits that come with the package, with two ranks. From a fresh clone: sets up .venv first.
# Further arguments are Hydra overrides: launch/demo.sh student.rank=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment
exec .venv/bin/python -m distill launch.nproc_per_node=2 launch.threads_per_rank=1 run.name=demo "$@"
