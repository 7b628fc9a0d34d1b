#!/usr/bin/env bash
# The tests that need nothing but a CPU and some minutes; .ci/run runs all (docs/testing.md). From a fresh clone: sets up
# .venv first. With arguments it is pytest with these, on all tests: launch/test.sh tests/unit -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment dev
if [ $# = 0 ]; then
    set -- --numprocesses=2 --dist=loadgroup -m "not (gpu or real or index or slurm or browser or jobs or matrix)"
fi
exec .venv/bin/python -m pytest "$@"
