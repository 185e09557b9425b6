# shellcheck shell=bash
# Sourced by install.sh and the workflows: which Python environment the project uses.
# The active one, else .venv in the current folder (conda's base is not taken: it belongs to all projects).
# The Makefile holds the same rule.
sft_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        printf '%s\n' "$VIRTUAL_ENV"
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
        printf '%s\n' "$CONDA_PREFIX"
    else
        printf '%s\n' "$PWD/.venv"
    fi
}

# where an environment keeps its programs; on Windows (in the shell that comes with git) under another name
sft_bin() { # FOLDER
    if [ "${OS:-}" = Windows_NT ]; then printf '%s\n' "$1/Scripts"; else printf '%s\n' "$1/bin"; fi
}

# true for a Python that the project runs on
sft_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

# the path of the first one that serves: SFT_PYTHON, then those on the PATH
sft_find_python() {
    local candidate
    for candidate in ${SFT_PYTHON:+"$SFT_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if sft_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

sft_has_gpu() { nvidia-smi -L >/dev/null 2>&1; }
