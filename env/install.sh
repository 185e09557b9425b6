#!/usr/bin/env bash
# Install the project and what it needs: with uv if present, else with pip; into the active environment, else .venv.
#
#   SFT_EXTRAS   dev, unsloth, data, json, serve, liger, gguf, harness, bench, sweep, deepspeed, wandb, trackio (commas or spaces between); what was asked for before stays
#   SFT_TORCH    auto (default): the CPU-only build where there is no NVIDIA GPU and it can be had; cpu: only that build;
#                cuda: the build with CUDA, card or not (an image that is built on another machine)
#   SFT_FORCE    1: take every package anew (a damaged one, or one that was removed or changed by hand)
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

# a CPU-only torch fits the pins too, so it would stay on a machine that has a GPU by now
cpu_torch_beside_gpu() {
    local found
    if ! for_gpu; then return 1; fi
    for found in "$environment"/lib/python3*/site-packages/torch-*+cpu.dist-info "$environment"/Lib/site-packages/torch-*+cpu.dist-info; do
        if [ -e "$found" ]; then return; fi
    done
    return 1
}

uninstall() { # ARGUMENTS OF pip uninstall
    if [ -n "$uv" ]; then
        "$uv" pip uninstall --quiet --python "$python" "$@"
    else
        "$python" -m pip uninstall --quiet --yes --disable-pip-version-check "$@"
    fi
}

if_missing=no
case "${1:-}" in
    "") ;;
    --if-missing) if_missing=yes ;;
    *) fail 2 "unknown argument $1" "there is only --if-missing" ;;
esac

torch=${SFT_TORCH:-auto}
case "$torch" in auto | cpu | cuda) ;; *) fail 2 "TORCH=$torch" "TORCH is auto, cpu or cuda" ;; esac
for_gpu() { [ "$torch" = cuda ] || { [ "$torch" = auto ] && sft_has_gpu; }; }
sorted_words() { printf '%s\n' "$*" | tr -s ', ' '\n' | sed '/^$/d' | sort -u; }
wanted=$(sorted_words "${SFT_EXTRAS:-}")
for extra in $wanted; do
    case "$extra" in
        dev | unsloth | data | json | serve | liger | gguf | harness | bench | sweep | deepspeed | wandb | trackio) ;;
        *) fail 2 "EXTRAS: unknown extra $extra" "known are dev, unsloth, data, json, serve, liger, gguf, harness, bench, sweep, deepspeed, wandb and trackio" ;;
    esac
done

environment=$(sft_environment)
python=$(sft_bin "$environment")/python
stamp=$environment/.sft-play-installed

if [ "$if_missing" = yes ] && [ -x "$python" ]; then
    for found in "$environment"/lib/python3*/site-packages/transformers-*.dist-info "$environment"/Lib/site-packages/transformers-*.dist-info "$stamp"; do
        if [ -e "$found" ]; then exit 0; fi
    done
fi

# what was installed before, as three lines: state, extras, torch
old_state="" old_extras="" old_torch=""
if [ -f "$stamp" ]; then { read -r old_state; read -r old_extras; read -r old_torch; } <"$stamp" || true; fi
extras=$(sorted_words "$wanted" "$old_extras" | tr '\n' ' ')
state="$(cat pyproject.toml env/constraints.txt env/*.sh | cksum | tr ' ' '-') $PWD"
again=yes
case "${SFT_FORCE:-}" in "" | 0 | no | false) again=no ;; esac
if [ "$again" = no ] && [ "$state" = "$old_state" ] && [ "$extras" = "${old_extras:+$old_extras }" ] && [ -x "$python" ] &&
    { [ "$torch" != cpu ] || [ "$old_torch" = cpu ]; } && ! cpu_torch_beside_gpu; then
    say "up to date ($environment; extras: ${old_extras:-none})"
    exit 0
fi

started=$(date +%s)
uv=$(command -v uv || true)
# uv has its own variable for pip's find-links, with commas
if [ -n "$uv" ] && [ -z "${UV_FIND_LINKS:-}" ] && [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${PIP_FIND_LINKS// /,}"; fi
aside=$PWD/.cache/venv-before
restore() { # what worked before comes back where the new one cannot be made
    if [ -d "$aside" ] && [ ! -f "$stamp" ]; then rm -rf "$environment" && mv "$aside" "$environment"; fi
    rm -rf "$aside"
}
if [ "$again" = yes ] && [ "$environment" = "$PWD/.venv" ] && [ -d "$environment" ]; then
    mkdir -p .cache && rm -rf "$aside" && mv "$environment" "$aside"
    trap restore EXIT
fi
if ! sft_supported "$python"; then
    if [ "$environment" != "$PWD/.venv" ]; then
        fail 4 "the active environment $environment has no Python 3.11, 3.12 or 3.13" "activate one that has, or deactivate it (then .venv is made)"
    fi
    make_environment "$environment"
fi
say "into $environment with ${uv:-pip}${extras:+; extras: ${extras% }}"
rm -f "$stamp"
if [ "$again" = yes ] && [ "$environment" != "$PWD/.venv" ]; then
    uninstall -r env/constraints.txt || say "some packages could not be removed; those that can be are taken anew"
elif cpu_torch_beside_gpu; then
    say "there is a GPU now: torch's CPU-only build makes room for the one with CUDA"
    uninstall torch || true
fi
# off a terminal pip has no progress bar, only four lines a package
quiet=""
if ! [ -t 1 ]; then quiet=--quiet; fi

torch_build=default
if [ "$torch" = cpu ] || { [ "$(uname -s)" = Linux ] && ! for_gpu; }; then
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
options=(-c env/constraints.txt --only-binary :all: --no-binary rouge-score --no-binary sqlitedict --no-binary word2number --no-binary deepspeed)
export DS_BUILD_OPS=0 # DeepSpeed can compile kernels of its own; none is used here
project_extras=$extras
case " $extras" in
    *" unsloth "*)
        if ! for_gpu; then
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
