#!/usr/bin/env bash
# Style, types and configuration files, as CI looks at them. From a fresh clone: sets up .venv first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
ensure_environment dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/yamllint --strict conf .github .pre-commit-config.yaml
