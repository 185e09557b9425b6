#!/usr/bin/env bash
# What must be clean before a change lands: ruff, mypy, and the linters of shell and Dockerfile.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/environment.sh
. env/environment.sh
bin=$(sft_bin "$(sft_environment)")

linter() { # NAME ARGUMENTS…
    local name=$1
    shift
    if [ -x "$bin/$name" ]; then
        "$bin/$name" "$@"
    else
        printf 'lint: there is no %s for this system; passed over\n' "$name" >&2
    fi
}

"$bin/python" -m ruff check .
"$bin/python" -m ruff format --check .
"$bin/python" -m mypy
linter shellcheck -x workflows/*.sh env/*.sh .ci/run
linter hadolint Dockerfile
