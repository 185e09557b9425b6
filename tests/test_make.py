"""The Makefile: every target is there, the user's words arrive unharmed and never run as shell, CONFIG wins."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.commands import ROOT, run

TARGETS = (
    "install setup-dirs quickstart sample-data check support-bundle process style render inspect full-pipeline plan train train-bnb train-unsloth "
    "train-bnb-tb train-unsloth-tb train-cluster sweep tensorboard tb-stop eval eval-quick eval-full eval-harness report leaderboard infer infer-batch serve merge export-gguf export-ollama push download-model "
    "test test-fast torture torture-sweep bench bench-data lint format clean clean-all"
).split()

# stands for every step: notes the variables that it was given, in the order of the calls
RECORDER = """
import json, os, sys
given = {k: v for k, v in os.environ.items() if k.startswith("SFT_")}
with open("calls.jsonl", "a") as file:
    file.write(json.dumps({"script": os.path.basename(__file__), "arguments": sys.argv[1:], "given": given}) + "\\n")
"""


@pytest.fixture
def recorded(tmp_path: Path):
    """The real Makefile and install script over steps that only note how they were called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "env", tmp_path / "env")
    (tmp_path / "scripts").mkdir()
    for name in "process style render train eval infer serve board".split():
        (tmp_path / "scripts" / f"{name}.py").write_text(RECORDER)

    def calls(*words: str, **extra: str) -> list[dict]:
        done = run(["make", *words], tmp_path, **extra)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "calls.jsonl").read_text().splitlines()
        (tmp_path / "calls.jsonl").unlink()
        return [json.loads(line) for line in lines]

    return calls


def test_make_alone_lists_every_target():
    done = run(["make"], ROOT)
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z][a-z-]*)  +\S", done.stdout, flags=re.M)
    assert [name for name in TARGETS if name not in listed] == []


def test_every_listed_target_is_phony():
    text = (ROOT / "Makefile").read_text()
    phony = set(" ".join(re.findall(r"^\.PHONY:(.*)$", text, flags=re.M)).split())
    assert [name for name in TARGETS if name not in phony] == []


NASTY = "a 'b' \"c\" $HOME $(touch pwned) `touch pwned` ; touch pwned & # \\ %s $$ é\n2nd line"


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_any_character_of_a_value_reaches_the_script_and_none_is_run(recorded, tmp_path, how):
    values = {"STYLE": NASTY, "SET": NASTY, "RAW": NASTY, "RUN": NASTY}
    if how == "argument":
        # make itself reads $ in an argument's value when it hands it to a make below it; the script must not see that
        calls = recorded("process", *(f"{name}={value}" for name, value in values.items()))
    else:
        calls = recorded("process", **values)
    assert {name: calls[0]["given"][f"SFT_{name}"] for name in values} == values
    assert not (tmp_path / "pwned").exists()


def test_prompt_is_one_argument_whatever_it_holds(recorded, tmp_path):
    (call,) = recorded("infer", f"PROMPT={NASTY}")
    assert call["arguments"] == [f"--prompt={NASTY}"]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("CONFG=configs/quickstart.yaml", "did you mean CONFIG=?"),
        ("config=configs/quickstart.yaml", "did you mean CONFIG=?"),
        ("SEED=3", 'SET="section.key=value"'),
        ("se'ed`$$x=3", "is no variable"),
    ],
)
def test_a_variable_that_nothing_reads_is_refused_before_anything_is_run(tmp_path, word, said):
    done = run(["make", "-f", ROOT / "Makefile", "process", word], tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_read_passes_through_make(recorded):
    assert recorded("process", "CUDA_VISIBLE_DEVICES=1", "HF_TOKEN=x", "OMP_NUM_THREADS=2")


def test_what_is_not_given_arrives_empty(recorded):
    (call,) = recorded("process")
    assert {v for k, v in call["given"].items() if k not in ("SFT_ENV_PYTHON", "SFT_ANY_PYTHON")} == {""}


@pytest.mark.parametrize("goals", [["full-pipeline"], ["train", "eval"]])
def test_steps_run_in_order_even_with_many_jobs(recorded, goals):
    names = [call["script"] for call in recorded("-j4", *goals)]
    assert names == [f"{name}.py" for name in "process style render train eval".split()]


@pytest.mark.parametrize("target", ["train-bnb", "train-unsloth", "train-bnb-tb", "train-unsloth-tb"])
def test_config_wins_over_the_target_which_sets_the_backend(recorded, target):
    backend = "unsloth" if "unsloth" in target else "bitsandbytes"
    for call in recorded(target, "CONFIG=my own.yaml"):
        assert (call["given"]["SFT_CONFIG"], call["given"]["SFT_BACKEND"]) == ("my own.yaml", backend)
    default = "configs/run_unsloth.yaml" if "unsloth" in target else "configs/run_bnb.yaml"
    assert {call["given"]["SFT_CONFIG"] for call in recorded(target)} == {default}


def test_tb_target_runs_training_beside_tensorboard(recorded):
    call = recorded("train-bnb-tb", "PORT=7007")[-1]
    assert call["script"] == "board.py"
    assert call["arguments"][:2] == ["with", "--"] and call["arguments"][-1] == "scripts/train.py"
    assert call["given"]["SFT_PORT"] == "7007"


def test_a_failed_step_stops_make_and_names_its_own_exit_code():
    done = run(["make", "train", "CONFIG=no such.yaml"], ROOT)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines[-1] == "sft-process: exit code 2"
    assert "no such.yaml" in done.stderr
