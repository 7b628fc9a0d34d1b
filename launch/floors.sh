#!/usr/bin/env bash
# The unit tests with the lowest version of every dependency that pyproject.toml admits, in an environment of their own
# (.floors, several GB). Further arguments go to pytest: launch/floors.sh -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .floors/bin/python ] || "${PYTHON:-python3}" -m venv .floors
.floors/bin/python -m pip install --quiet --disable-pip-version-check uv
.floors/bin/uv pip install --quiet --python .floors/bin/python --resolution lowest-direct --editable '.[dev]'
exec .floors/bin/python -m pytest tests/unit "$@"
