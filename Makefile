# SFT-Play. `make` alone lists the targets. Works with GNU make 3.81 (macOS).
# A step's real exit code stands on its last line: make itself always ends a failed recipe with 2.

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# the steps depend on one another through folders, so `make -j` must not run them side by side
.NOTPARALLEL:

# The user's variables reach the scripts as SFT_<NAME>, through the environment. They are never pasted into a recipe:
# a quote, a backtick or a $ in them would be run as shell code.
VARIABLES := CONFIG RUN SET STYLE STYLE_MODE RAW SPLIT LIMIT MODEL PORT NPROC RESUME FORCE EXTRAS TORCH PYTHON YES KEEP_TB \
    TASKS PROMPT INPUT OUTPUT WHICH LISTEN ENGINE CLEAR KILLS ROW IDS ROWS ROUNDS PRECISION GPU_GB QUANT CONVERTER REPO \
    DRY_RUN PUBLIC SWEEP BY JOBS MACHINES MACHINE MAIN JSON
unexport $(VARIABLES)
$(foreach name,$(VARIABLES),$(eval export SFT_$(name) = $$(value $(name))))

# with it torch and transformers are compiled anew at every start
unexport PYTHONDONTWRITEBYTECODE

# the active environment, else .venv (conda's base is not taken: it belongs to all projects)
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
# Windows, in the shell that comes with git, keeps an environment's programs elsewhere
export SFT_ENV_PYTHON := $(or $(ACTIVE),.venv)/$(if $(filter Windows_NT,$(OS)),Scripts/python.exe,bin/python)
PY = "$$SFT_ENV_PYTHON"
# for what must work before install too
export SFT_ANY_PYTHON := $(or $(wildcard $(SFT_ENV_PYTHON)),python3)
ANY_PY = "$$SFT_ANY_PYTHON"

# `make train CONFG=x` must not train the default config: a name after `make` that is neither a variable above nor one
# that a library reads from the environment is refused
LIBRARIES = CUDA_% HF_% HUGGINGFACE_% TRANSFORMERS_% TORCH_% PYTORCH_% TOKENIZERS_% UNSLOTH_% NCCL_% GLOO_% OMP_% MKL_% \
    WANDB_% TRACKIO_% TENSORBOARD_% PIP_% UV_% SFT_% SERVE_API_KEY %_PROXY %_proxy TMPDIR NO_COLOR COLUMNS SHELL MAKE%
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(subst ',,$(firstword $(filter-out $(VARIABLES) $(LIBRARIES),$(GIVEN))))
ifneq ($(UNKNOWN),)
    NEAREST := $(shell '$(SFT_ANY_PYTHON)' -c 'import difflib, sys; \
        print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0.75))' '$(UNKNOWN)' $(VARIABLES))
    $(error $(UNKNOWN)= is no variable of this project$(if $(NEAREST),; did you mean $(NEAREST)=?,.) `make` lists them. \
        A setting of the run: SET="section.key=value". For the environment: $(UNKNOWN)=... before make)
endif

train-bnb train-bnb-tb: export SFT_BACKEND = bitsandbytes
train-unsloth train-unsloth-tb: export SFT_BACKEND = unsloth
# CONFIG wins where it is given
train-bnb train-bnb-tb: export SFT_CONFIG = $(or $(value CONFIG),configs/run_bnb.yaml)
train-unsloth train-unsloth-tb: export SFT_CONFIG = $(or $(value CONFIG),configs/run_unsloth.yaml)

.PHONY: help
help: ## list the targets (make alone does too)
	@awk 'BEGIN { FS = ":.*## " } \
	    /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z][a-z -]*:.*## / { count = split($$1, names, " "); for (i = 1; i <= count; i++) printf "  %-17s %s\n", names[i], $$2 } \
	    /^#: / { print "  " substr($$0, 4) }' $(firstword $(MAKEFILE_LIST))

##@ Set up
.PHONY: install ready setup-dirs quickstart sample-data download-model check support-bundle
install: ## install into .venv, or into the active environment   EXTRAS=dev,unsloth,data,json,serve,liger,gguf,harness,bench,sweep,deepspeed,wandb,trackio TORCH=auto|cpu|cuda PYTHON= FORCE=1
	@env/install.sh

ready:
	@env/install.sh --if-missing

setup-dirs: ## make the folders that the steps read and write
	@mkdir -p data/raw data/processed data/processed_with_style data/rendered outputs adapters

quickstart: ## from nothing to a tuned model and its before/after table   YES=1
	@workflows/quick_start.sh

sample-data: ready ## write the sample task to data/sample
	@$(PY) scripts/sample_data.py

download-model: ready ## fetch the model, to work offline afterwards   MODEL= CONFIG=
	@$(PY) scripts/download_model.py

check: ## is this machine ready, and what mends it: packages, GPU, disk, memory, config, data   CONFIG= RAW= GPU_GB= JSON=1
	@$(ANY_PY) scripts/check.py

support-bundle: ## one zip for a bug report: check, stamp, config, ends of logs; no rows, no secrets   RUN=
	@$(ANY_PY) scripts/support_bundle.py

##@ Data
.PHONY: process style render inspect full-pipeline
process: ready ## data/raw -> data/processed   RAW= CONFIG= FORCE=1
	@$(PY) scripts/process.py

style: process ## add a system message -> data/processed_with_style   STYLE= STYLE_MODE= CLEAR=1
	@$(PY) scripts/style.py

render: style ## chat template and loss spans -> data/rendered
	@$(PY) scripts/render.py

inspect: render ## a row as the model sees it, trained tokens in colour, also as HTML   ROW=1|<id>|random SPLIT= IDS=1
	@$(PY) scripts/inspect_row.py

full-pipeline: train ## everything: process, style, render, train, eval
	@$(PY) scripts/eval.py

##@ Train
.PHONY: plan train train-bnb train-unsloth train-bnb-tb train-unsloth-tb train-cluster sweep tensorboard tb-stop selftest
plan: ready ## predict memory, steps, hours and disk, and what to change where it does not fit   CONFIG= MODEL= SET= GPU_GB=8 NPROC=
	@$(PY) scripts/plan.py

train: render ## train, after whatever steps are missing -> outputs/<run>, adapters/<run>   CONFIG= RUN= SET= RESUME=auto|never|must NPROC=
	@$(PY) scripts/train.py

train-bnb train-unsloth: train-%: render ## the same with this backend (configs/run_bnb.yaml or run_unsloth.yaml; CONFIG= wins)
	@$(PY) scripts/train.py

train-bnb-tb train-unsloth-tb: train-%-tb: render ## the same with TensorBoard beside it   PORT=6006 KEEP_TB=1
	@$(PY) scripts/board.py with -- $(PY) scripts/train.py

train-cluster: ## this machine's share of a run on several (env/slurm.sbatch, env/skypilot.yaml)   NPROC= MACHINES= MACHINE= MAIN=host:29500
	@$(PY) scripts/train.py

sweep: ready ## many runs: data sets x configs x any keys, as a plan says; goes on after a kill   SWEEP=configs/sweep_example.yaml DRY_RUN=1 JOBS=
	@$(PY) scripts/batch.py

tensorboard: ready ## start TensorBoard on outputs/, on this machine only   PORT=6006
	@$(PY) scripts/board.py start

tb-stop: ## stop the TensorBoard that this project started, and no other
	@$(ANY_PY) scripts/board.py stop

selftest: ready ## are packing, chunks and shared beginnings exact on this model and machine   CONFIG= MODEL=
	@$(PY) scripts/selftest.py

##@ Use
.PHONY: eval eval-quick eval-full eval-harness report leaderboard infer infer-batch serve merge merge-if-adapter export-gguf export-ollama push
eval: ready ## base against tuned model -> outputs/<run>/eval, report.html   RUN= SPLIT= LIMIT=
	@$(PY) scripts/eval.py

eval-quick: ready ## the same on a few rows
	@$(PY) scripts/eval.py --quick

eval-full: ready ## the same on every row of the split
	@$(PY) scripts/eval.py --full

eval-harness: ready ## the model on tasks of lm-evaluation-harness (EXTRAS=harness)   TASKS=own_rows,… RUN= INPUT= WHICH= LIMIT=
	@$(PY) scripts/harness.py

report: ready ## curves, before/after, best and worst rows as one page -> outputs/<run>/report.html   RUN=
	@$(PY) scripts/report.py

leaderboard: ready ## all runs side by side, which is best and is that chance -> outputs/leaderboard.html, .csv   SWEEP= BY=metric
	@$(PY) scripts/leaderboard.py

infer: ready ## chat with the tuned model, or answer one PROMPT=   RUN= WHICH=tuned|base|merged
	@$(PY) scripts/infer.py $${SFT_PROMPT:+--prompt="$$SFT_PROMPT"} $${SFT_WHICH:+--which="$$SFT_WHICH"}

infer-batch: ready ## answer every line of INPUT= (JSONL or TXT) into OUTPUT=
	@$(PY) scripts/infer.py --input="$$SFT_INPUT" $${SFT_OUTPUT:+--output="$$SFT_OUTPUT"} \
	    $${SFT_LIMIT:+--limit="$$SFT_LIMIT"} $${SFT_WHICH:+--which="$$SFT_WHICH"}

serve: ready ## an OpenAI-compatible address for the run, on this machine only   RUN= PORT=8000 WHICH=tuned|merged ENGINE= LISTEN=
	@$(PY) scripts/serve.py $${SFT_WHICH:+--which="$$SFT_WHICH"} $${SFT_ENGINE:+--engine="$$SFT_ENGINE"} \
	    $${SFT_LISTEN:+--listen="$$SFT_LISTEN"}

merge: ready ## adapter into the base weights -> outputs/<run>/merged, proven by its logits
	@$(PY) scripts/merge.py

merge-if-adapter: ready
	@$(PY) scripts/merge.py --if-adapter

export-gguf: merge-if-adapter ## one file for llama.cpp -> outputs/<run>/gguf, proven   RUN= QUANT=f16|q8_0|bf16|f32 CONVERTER=
	@$(PY) scripts/export_gguf.py

export-ollama: merge-if-adapter ## a Modelfile with template, stop tokens and parameters -> outputs/<run>/ollama   RUN= QUANT=
	@$(PY) scripts/export_ollama.py

push: ready ## to the hub with a model card, private unless PUBLIC=1   REPO= RUN= WHICH=adapter|merged|gguf DRY_RUN=1
	@$(PY) scripts/push.py

##@ Develop
# two files of tests at a time, in the order that tests/conftest.py gives them
TWO_AT_ONCE = -n 2 --dist loadfile --no-loadscope-reorder
.PHONY: install-dev test test-fast torture torture-sweep bench bench-data lint format clean clean-all
install-dev: export SFT_EXTRAS = dev $(value EXTRAS)
install-dev:
	@env/install.sh

test: install-dev ## install what the tests need and run them all
	@$(PY) -m pytest $(TWO_AT_ONCE)

test-fast: install-dev ## the tests that take about 3 minutes together
	@$(PY) -m pytest -m "not slow" $(TWO_AT_ONCE)

torture: install-dev ## kill a run at random and at every crash point of its saves, fill its disk, resume each time   KILLS=200
	@$(PY) -m tests.torture

torture-sweep: install-dev ## kill a sweep of 2 data sets x 3 configs at random moments, and prove each run trained once   KILLS=10 MODEL=
	@$(PY) -m tests.sweep_torture

bench: export SFT_EXTRAS = bench $(value EXTRAS)
bench: ## training beside TRL and a padded Trainer, on the same rows   RAW= ROWS=64 ROUNDS=3 PRECISION=fp32|bf16
	@env/install.sh
	@$(PY) -m benchmarks.train

bench-data: export SFT_EXTRAS = bench $(value EXTRAS)
bench-data: ## rows/s and memory of process, style and render beside datasets.map   ROWS=1000,100000
	@env/install.sh
	@$(PY) -m benchmarks.data

lint: install-dev ## ruff, mypy, shellcheck, hadolint
	@env/lint.sh

format: install-dev ## let ruff mend what it can
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

clean: ## remove caches, derived data and unfinished runs; never data/raw, adapters or finished runs
	@$(ANY_PY) scripts/clean.py

clean-all: ## remove all that the steps made, finished runs and adapters too; asks first   YES=1
	@$(ANY_PY) scripts/clean.py --all

##@ Variables (a value may hold any character)
#: CONFIG   run config (configs/run_bnb.yaml; after training that of the run that RUN names)
#: RUN      name of the run (<config>-<data>)
#: SET      "section.key=value ..." over the config    MODEL    hub id, folder or embedded/smollm2-135m-instruct
#: RAW      file, folder, "*.jsonl", hub:owner/name    STYLE    system message; it stays until CLEAR=1
#: STYLE_MODE  replace, prepend, append or only-if-missing
#: SPLIT    train, val or test                         LIMIT    at most this many rows
#: RESUME   auto, never or must                        FORCE    1: run a step again that is up to date
#: PROMPT, INPUT, OUTPUT, WHICH for infer              TASKS    for eval-harness, with INPUT and WHICH
#: PORT, KEEP_TB for TensorBoard
#: PORT, WHICH, ENGINE (transformers or vllm), LISTEN (an address, with SERVE_API_KEY set) for serve
#: EXTRAS, TORCH, PYTHON for install                   YES      1: ask nothing
#: ROW      number, start of an id, or random          IDS      1: list the tokens with their ids
#: GPU_GB   make plan for a CUDA card of this many GiB that need not be here
#: KILLS    kills of make torture (200)                ROWS     rows for make bench, sizes for make bench-data
#: ROUNDS, PRECISION for make bench                   QUANT, CONVERTER for export-gguf
#: REPO, PUBLIC, DRY_RUN for push                     SWEEP, DRY_RUN, JOBS (runs at a time) for sweep
#: BY       the metric that make leaderboard ranks by   SWEEP    the name of a sweep, for make leaderboard
#: NPROC    processes of a training run, one a GPU (1)  MACHINES, MACHINE (from 0), MAIN (host:port of 0) for train-cluster
#: JSON     1: make check as JSON
