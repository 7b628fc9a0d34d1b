# Sourced by the other scripts: makes .venv with the tested versions, and installs only when something has changed.
# usage: source launch/environment.sh; ensure_environment [EXTRA]

ensure_environment() {
    local extra="${1:-}" python="${PYTHON:-python3}" wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "needs Python >= 3.11, but $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
        return 1
    }
    wanted="$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -d' ' -f1) ${extra:-core}"
    # the environment of the tests serves the demo too
    if grep -qsxF -e "$wanted" -e "${wanted%core}dev" .venv/installed; then
        return 0
    fi
    echo "setting up .venv (several GB with PyTorch; only the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || {
        echo "python -m venv failed; on Debian: apt-get install python3-venv" >&2
        return 1
    }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint launch/constraints.txt --editable ".${extra:+[$extra]}" || return 1
    echo "$wanted" >.venv/installed
}
