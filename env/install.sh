#!/usr/bin/env bash
# Install the project and what it needs: with uv if present, else with pip; into the active environment, else .venv.
#
#   SFT_EXTRAS   dev, unsloth, data, json, serve, liger, gguf, harness, bench, sweep, wandb, trackio (commas or spaces between); what was asked for before stays
#   SFT_TORCH    auto (default): the CPU-only build where there is no NVIDIA GPU and it can be had; cpu: only that build
#   SFT_PYTHON   the Python that a new .venv is made with (default: the first of 3.11-3.13 on the PATH)
#   --if-missing do nothing where the steps can already run
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/environment.sh
. env/environment.sh

say() { printf 'install: %s\n' "$*" >&2; }
fail() { # CODE MESSAGE HINT
    printf 'error: %s\nhint: %s\ninstall: exit code %s\n' "$2" "$3" "$1" >&2
    exit "$1"
}
pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" env/constraints.txt | head -n 1; }

make_environment() { # FOLDER
    local base
    if [ -e "$1" ]; then say "$1 does not work any more; it is made anew"; fi
    if base=$(sft_find_python); then
        if [ -n "$uv" ]; then
            "$uv" venv --quiet --clear --python "$base" "$1"
        elif ! "$base" -m venv --clear "$1"; then
            rm -rf "$1"
            fail 4 "$base cannot make a virtual environment" "install its venv package (Debian: apt install python3-venv), or uv"
        fi
    elif [ -z "$uv" ] || ! "$uv" venv --quiet --clear --python '>=3.11,<3.14' "$1"; then
        fail 4 "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1 || echo missing))" \
            "install one of them, or name it: make install PYTHON=/path/to/python3.12"
    fi
}

install() { # ARGUMENTS OF pip install
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$python" "$@"
    else
        # compiling every file takes half of pip's time; Python compiles what is really imported, on first use
        "$python" -m pip install --no-compile --no-input --disable-pip-version-check ${quiet:+"$quiet"} "$@"
    fi
}

# torch's CPU-only build carries a local version (2.13.0+cpu), which package indexes do not have; a wheel folder
# (find-links) may, and uv knows where the build's makers keep it
install_cpu_torch() {
    local version fetcher=$uv
    version=$(pinned torch)
    if install --quiet --no-deps --only-binary :all: "torch==$version+cpu" 2>/dev/null; then return; fi
    if [ -z "$fetcher" ]; then
        "$python" -m pip install --quiet --no-input --disable-pip-version-check uv || return 1
        fetcher="$(dirname "$python")/uv"
    fi
    "$fetcher" pip install --python "$python" --torch-backend cpu -c env/constraints.txt torch
}

if_missing=no
case "${1:-}" in
    "") ;;
    --if-missing) if_missing=yes ;;
    *) fail 2 "unknown argument $1" "there is only --if-missing" ;;
esac

torch=${SFT_TORCH:-auto}
case "$torch" in auto | cpu) ;; *) fail 2 "TORCH=$torch" "TORCH is auto or cpu" ;; esac
sorted_words() { printf '%s\n' "$*" | tr -s ', ' '\n' | sed '/^$/d' | sort -u; }
wanted=$(sorted_words "${SFT_EXTRAS:-}")
for extra in $wanted; do
    case "$extra" in
        dev | unsloth | data | json | serve | liger | gguf | harness | bench | sweep | wandb | trackio) ;;
        *) fail 2 "EXTRAS: unknown extra $extra" "known are dev, unsloth, data, json, serve, liger, gguf, harness, bench, sweep, wandb and trackio" ;;
    esac
done

environment=$(sft_environment)
python=$environment/bin/python
stamp=$environment/.sft-play-installed

if [ "$if_missing" = yes ] && [ -x "$python" ]; then
    for found in "$environment"/lib/python3*/site-packages/transformers-*.dist-info "$stamp"; do
        if [ -e "$found" ]; then exit 0; fi
    done
fi

# what was installed before, as three lines: state, extras, torch
old_state="" old_extras="" old_torch=""
if [ -f "$stamp" ]; then { read -r old_state; read -r old_extras; read -r old_torch; } <"$stamp" || true; fi
extras=$(sorted_words "$wanted" "$old_extras" | tr '\n' ' ')
state="$(cat pyproject.toml env/constraints.txt env/*.sh | cksum | tr ' ' '-') $PWD"
if [ "$state" = "$old_state" ] && [ "$extras" = "${old_extras:+$old_extras }" ] && [ -x "$python" ] &&
    { [ "$torch" = auto ] || [ "$old_torch" = cpu ]; }; then
    say "up to date ($environment; extras: ${old_extras:-none})"
    exit 0
fi

started=$(date +%s)
uv=$(command -v uv || true)
# uv has its own variable for pip's find-links, with commas
if [ -n "$uv" ] && [ -z "${UV_FIND_LINKS:-}" ] && [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${PIP_FIND_LINKS// /,}"; fi
if ! sft_supported "$python"; then
    if [ "$environment" != "$PWD/.venv" ]; then
        fail 4 "the active environment $environment has no Python 3.11, 3.12 or 3.13" "activate one that has, or deactivate it (then .venv is made)"
    fi
    make_environment "$environment"
fi
say "into $environment with ${uv:-pip}${extras:+; extras: ${extras% }}"
rm -f "$stamp"
# off a terminal pip has no progress bar, only four lines a package
quiet=""
if ! [ -t 1 ]; then quiet=--quiet; fi

torch_build=default
if [ "$torch" = cpu ] || { [ "$(uname -s)" = Linux ] && ! sft_has_gpu; }; then
    if [ "$(uname -s)" = Darwin ]; then
        torch_build=cpu # there is no other build
    elif install_cpu_torch; then
        torch_build=cpu
    elif [ "$torch" = cpu ]; then
        fail 4 "the CPU-only build of torch $(pinned torch) cannot be fetched" \
            "put its wheel into a folder and name that in PIP_FIND_LINKS, or take the default build: make install"
    else
        say "no GPU here, but the CPU-only build of torch cannot be fetched: taking the default build"
    fi
fi

# wheels only, so that no compiler is needed; these are plain Python and published as source
options=(-c env/constraints.txt --only-binary :all: --no-binary rouge-score --no-binary sqlitedict --no-binary word2number)
project_extras=$extras
case " $extras" in
    *" unsloth "*)
        if ! sft_has_gpu; then
            # most of its dependencies are for GPUs only; with these two it trains on a CPU as well
            say "no GPU here: unsloth comes without its GPU-only dependencies"
            { install --no-deps -c env/constraints.txt "unsloth==$(pinned unsloth)" "unsloth_zoo==$(pinned unsloth-zoo)" &&
                install -c env/constraints.txt --only-binary :all: datasets requests; } ||
                fail 4 "unsloth cannot be installed (see above)" "check the connection to the package index, or leave it out of EXTRAS"
            project_extras=${extras/unsloth /}
        fi
        ;;
esac
project=.
if [ -n "$project_extras" ]; then
    trimmed=${project_extras% }
    project=".[${trimmed// /,}]"
fi
install "${options[@]}" -e "$project" ||
    fail 4 "the packages cannot be installed (see above)" "check the connection to the package index and the free disk space, then run it again"

printf '%s\n%s\n%s\n' "$state" "${extras% }" "$torch_build" >"$stamp"
versions=$("$python" -c 'import platform, importlib.metadata as m; print("Python", platform.python_version() + ", torch", m.version("torch") + ", transformers", m.version("transformers"))')
say "done in $(($(date +%s) - started)) s: $versions"
