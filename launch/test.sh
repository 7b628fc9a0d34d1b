#!/usr/bin/env bash
# All tests. From a fresh clone: sets up .venv first. Further arguments go to pytest: launch/test.sh tests/unit -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment dev
exec .venv/bin/python -m pytest "$@"
