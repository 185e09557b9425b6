#!/usr/bin/env bash
# Every data set (data/raw, or those named) with every config, or the runs of a plan: see --help. The work is in
# scripts/batch.py; `make sweep` is the same.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=env/environment.sh
. "$root/env/environment.sh"

"$root/env/install.sh" --if-missing
# paths in the arguments are relative to the caller's folder, so this does not leave it
environment=$(cd "$root" && sft_environment)
exec "$environment/bin/python" "$root/scripts/batch.py" "$@"
