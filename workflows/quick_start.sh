#!/usr/bin/env bash
# From a fresh clone to a tuned model and its before/after table. Run it again at any time: what is done is reused.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=env/environment.sh
. env/environment.sh

embedded=embedded/smollm2-135m-instruct
logs=.cache/quick_start

usage() {
    cat <<'END'
usage: ./workflows/quick_start.sh [--yes] [--help]

Checks what is needed, installs into .venv (or the active environment), then runs
process, style, render, train and eval, and shows base against tuned model.

  --yes   ask nothing (also where there is no terminal)

Without answers: your data in data/raw, else the sample; with a GPU and a reachable
model hub a 1.5B model, else the embedded one. The variables of the Makefile choose
otherwise:  make quickstart RAW=my.jsonl MODEL=some/model RUN=try1
END
}

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    bold=$'\e[1m' cyan=$'\e[36m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
else
    bold="" cyan="" red="" green="" yellow="" plain=""
fi
heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
finish() { # CODE MESSAGE HINT
    printf '%serror:%s %s\n%shint:%s %s\nquick_start: exit code %s\n' "$red" "$plain" "$2" "$yellow" "$plain" "$3" "$1" >&2
    exit "$1"
}

ask=yes
case "${SFT_YES:-}" in "" | 0 | no | false) ;; *) ask=no ;; esac
for argument in "$@"; do
    case "$argument" in
        --yes | -y) ask=no ;;
        --help | -h) usage && exit 0 ;;
        *) usage >&2 && finish 2 "unknown argument: $argument" "there are --yes and --help" ;;
    esac
done
if ! [ -t 0 ] || ! [ -t 1 ]; then ask=no; fi

question() { # TEXT DEFAULT -> answer
    answer=$2
    if [ "$ask" = no ]; then return; fi
    printf '%s [%s%s%s] ' "$1" "$cyan" "$2" "$plain"
    IFS= read -r answer || answer=""
    answer=${answer:-$2}
}

present() { printf '  %sok%s       %s\n' "$green" "$plain" "$*"; }
missing() { printf '  %smissing%s  %s\n' "$red" "$plain" "$*" && lacking=yes; }

check_machine() {
    local python free needed=5
    lacking=no
    heading "What this needs"
    environment=$(sft_environment)
    if sft_supported "$(sft_bin "$environment")/python"; then
        present "$("$(sft_bin "$environment")/python" --version) in $environment"
        needed=2
    elif python=$(sft_find_python); then
        present "$("$python" --version) ($python)"
    elif command -v uv >/dev/null; then
        present "uv (it brings its own Python)"
    else
        missing "Python 3.11, 3.12 or 3.13: apt install python3 python3-venv, brew install python@3.12, or name one with SFT_PYTHON=/path"
    fi
    if command -v make >/dev/null; then present "make"; else missing "make: apt install make, or xcode-select --install"; fi
    if command -v git >/dev/null; then present "git"; else printf '  not here git (not needed; with it a run notes the commit)\n'; fi
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$free" -ge "$needed" ]; then present "disk: $free GB free"; else missing "disk: $free GB free in $PWD, $needed GB are needed"; fi
    if sft_has_gpu; then present "GPU: $(nvidia-smi -L | head -n 1 | cut -d '(' -f 1)"; else printf '  none     NVIDIA GPU (not needed; a small model trains on the CPU)\n'; fi
    if [ "$lacking" = yes ]; then finish 4 "something is missing (see above)" "install it and run this again"; fi
}

choose() {
    heading "What to train"
    local gpu=no default
    if sft_has_gpu; then gpu=yes; fi
    question "backend: bitsandbytes (everywhere) or unsloth (fast, NVIDIA GPU only)" "${SFT_BACKEND:-bitsandbytes}"
    case "$answer" in
        b | bitsandbytes | bnb) backend=bitsandbytes ;;
        u | unsloth) backend=unsloth ;;
        *) finish 2 "unknown backend: $answer" "answer bitsandbytes or unsloth" ;;
    esac
    model_chosen=no
    # on a GPU the config's own model, if the hub can be reached
    default=$embedded
    if [ "$gpu" = yes ]; then default="the config's"; fi
    question "model: Enter, a hub id, or a local folder" "${SFT_MODEL:-$default}"
    model=$answer
    if [ "$model" != "$default" ]; then model_chosen=yes; fi
    if [ "$model" = "the config's" ]; then model=""; fi
    default=data/sample
    if [ -n "$(find data/raw -type f ! -name '.*' 2>/dev/null | head -n 1)" ]; then default=data/raw; fi
    question "data: Enter, a file, or a folder" "${SFT_RAW:-$default}"
    data=$answer
    config=configs/quickstart.yaml
    if [ "$gpu" = yes ] && [ "$model" != "$embedded" ]; then
        if [ "$backend" = unsloth ]; then config=configs/run_unsloth.yaml; else config=configs/run_bnb.yaml; fi
    fi
    config=${SFT_CONFIG:-$config}
}

name_run() { # one name for one config, data set and chosen model
    local name
    name=$(basename "$config" .yaml)-$(basename "$data" | cut -d . -f 1)
    if [ "$model_chosen" = yes ]; then name=$name-$(basename "$model"); fi
    run=${SFT_RUN:-$(printf '%s' "$name" | tr -c 'A-Za-z0-9._+-' '-' | cut -c 1-100)}
}

use() { # hand the choices to the scripts as make does
    name_run
    export SFT_CONFIG=$config SFT_MODEL=$model SFT_BACKEND=$backend SFT_RAW=$data SFT_RUN=$run
    printf '  config %s, model %s, %s, data %s, run %s\n' "$config" "${model:-as in the config}" "$backend" "$data" "$run"
}

attempt() { # NAME COMMAND…: runs it, shows and keeps its output; its exit code in $code
    local name=$1 began
    shift
    began=$(date +%s)
    heading "$name"
    # on Ctrl-C the step saves its state and this script lives on to say so; tee -i outlives it too
    trap : INT
    set +e
    "$@" 2>&1 | tee -i "$logs/$name.log"
    code=${PIPESTATUS[0]}
    set -e
    trap - INT
    if [ "$code" -eq 0 ]; then printf '  %s%s: %s s%s\n' "$green" "$name" $(($(date +%s) - began)) "$plain"; fi
}

step() { # NAME COMMAND…
    attempt "$@"
    if [ "$code" -eq 130 ] || [ "$code" -eq 143 ]; then
        finish "$code" "stopped in the step '$1'; its log is $logs/$1.log" "to go on, type ./workflows/quick_start.sh again"
    fi
    if [ "$code" -ne 0 ]; then
        finish "$code" "the step '$1' failed with exit code $code; its log is $logs/$1.log" \
            "mend what the message above names, then type ./workflows/quick_start.sh again: what is done is reused"
    fi
}

started=$(date +%s)
check_machine
choose
mkdir -p "$logs" data/raw data/processed data/processed_with_style data/rendered outputs adapters
extras=${SFT_EXTRAS:-}
if [ "$backend" = unsloth ]; then extras="$extras unsloth"; fi
# TORCH=auto takes the CPU-only build where there is no NVIDIA GPU
step install env SFT_EXTRAS="$extras" env/install.sh
python=$(sft_bin "$environment")/python
installed=$(date +%s)
use
if [ "$data" = data/sample ] && ! [ -e data/sample/train.jsonl ]; then step sample-data "$python" scripts/sample_data.py; fi

attempt model "$python" scripts/download_model.py
if [ "$code" -eq 4 ] && [ "$model_chosen" = no ] && [ "$model" != "$embedded" ]; then
    printf '\nThe model hub cannot be reached from here: going on with the embedded model.\n'
    model=$embedded config=configs/quickstart.yaml
    use
    attempt model "$python" scripts/download_model.py
fi
if [ "$code" -ne 0 ]; then
    finish "$code" "the model cannot be had (exit code $code); the log is $logs/model.log" "see the message above, then run this again"
fi
for name in process style render train eval; do
    step "$name" "$python" "scripts/$name.py"
done

heading "Done in $(($(date +%s) - started)) s (of which $((installed - started)) s for the set-up)"
cat <<END
  adapter      adapters/$run
  run          outputs/$run (stamp, config, checkpoints, TensorBoard)
  evaluation   outputs/$run/eval (metrics.json, samples.jsonl)
  report       outputs/$run/report.html (open it, or send it)
  trained on   data/rendered (exactly this text)

Next:
  make infer RUN=$run          # talk to it
  make merge RUN=$run          # one model folder, adapter included
  make train CONFIG=$config RAW=data/raw RUN=mine   # on your own rows, in data/raw
END
