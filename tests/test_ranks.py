"""Several processes: counted, checked, dealt their rows, and spoken for by one; nothing of this starts one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import launching, ranks, sharding
from scripts.utils.config import load_config
from scripts.utils.encoding import Encoded
from scripts.utils.errors import MachineError, UserError
from scripts.utils.launching import Layout
from tests.commands import ROOT, run, script


def be_rank(patch: pytest.MonkeyPatch, number: int, count: int) -> None:
    place = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        patch.setenv(name, str(value))


# --- NPROC


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6))
def test_nproc_is_a_whole_number_or_a_clear_error(words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_NPROC", words)
        try:
            found = launching.layout().processes
        except UserError as error:
            assert "NPROC" in error.message and repr(words) in error.message
            return
        assert found >= 1 and (not words or found == int(words))


def test_without_nproc_a_run_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFT_NPROC", raising=False)
    assert launching.layout() == Layout() and launching.layout().world == 1
    assert not ranks.is_rank() and ranks.is_first() and ranks.gather([3.0]) == [[3.0]]
    assert ranks.from_first(lambda: "mine") == "mine" and ranks.place_of("cuda") == "cuda"


def test_machines_are_numbered_and_the_first_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_MACHINES", "2")
    with pytest.raises(UserError, match="needs the address"):
        launching.layout()
    monkeypatch.setenv("SFT_MAIN", "10.0.0.1:1234")
    monkeypatch.setenv("SFT_MACHINE", "2")
    with pytest.raises(UserError, match="numbered from 0"):
        launching.layout()
    monkeypatch.setenv("SFT_MACHINE", "1")
    monkeypatch.setenv("SFT_NPROC", "4")
    found = launching.layout()
    assert found == Layout(4, 2, 1, "10.0.0.1:1234") and found.world == 8
    words = launching._torchrun_words(found, Path("/x"))
    assert "--node-rank=1" in words and "--master-addr=10.0.0.1" in words and "--master-port=1234" in words
    assert "--redirects=0:3,1:3,2:3,3:3" in words, "the first process of all is on the first machine"


@pytest.mark.parametrize(
    ("variables", "words", "code"),
    [
        ({"SFT_NPROC": "two"}, "NPROC is 'two'", 2),
        ({"SFT_NPROC": "0"}, "NPROC is '0'", 2),
        ({"SFT_NPROC": "2", "SFT_BACKEND": "unsloth"}, "Unsloth trains as one process", 2),
        ({"SFT_NPROC": "4096"}, "this machine has", 4),
        ({"SFT_NPROC": "2", "SFT_SET": "train.parallel=pipeline"}, "train.parallel", 2),
        ({"SFT_NPROC": "1", "SFT_MACHINES": "2"}, "needs the address", 2),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, variables: dict[str, str], words: str, code: int
) -> None:
    (tmp_path / "c.yaml").write_text("{}\n")
    done = script("train", "--config", "c.yaml", cwd=tmp_path, **variables)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"sft-train: exit code {code}"
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_mac_says_that_it_has_no_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MachineError, match="need Linux"):
        launching.check(Layout(2), load_config(ROOT / "configs" / "base.yaml"))


def test_a_run_that_was_meant_to_have_more_processes_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.WANTED, "2")
    with pytest.raises(MachineError, match="2 processes were asked for, 1 run"):
        ranks.connect()


# --- who does what


@given(st.integers(1, 9), st.integers(0, 30), st.booleans())
def test_every_item_is_dealt_once_and_evenly_where_asked(count: int, items: int, even: bool) -> None:
    everything, sizes = [], set()
    with pytest.MonkeyPatch.context() as patch:
        for number in range(count):
            be_rank(patch, number, count)
            mine = ranks.deal(range(items), even=even)
            everything += [item for item, times in mine for _ in range(times)]
            sizes.add(len(mine))
    assert sorted(everything) == list(range(items))
    assert len(sizes) == 1 or not even


@given(
    st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=4), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_a_steps_rows_are_computed_once_each_whatever_the_number_of_processes(
    step: list[list[int]], count: int, divisor: int, shared: bool, sharded: bool
) -> None:
    from scripts.utils.saving import RunState
    from scripts.utils.training import SFTTrainer

    lengths = [length for row in step for length in row]
    numbers = iter(range(len(lengths)))
    inputs = [[next(numbers) for _ in row] for row in step]
    trainer: Any = object.__new__(SFTTrainer)
    trainer.examples = [Encoded([7] * (n - 1) + [i], [False] * (n - 1) + [True]) for i, n in enumerate(lengths)]
    trainer.exact = SimpleNamespace(shared=shared)
    trainer.config = load_config(ROOT / "configs" / "base.yaml", "render.max_length=64")
    trainer.run_state, trainer.sharded = RunState(divisor=divisor), sharded
    seen: list[int] = []
    passes = set()
    with pytest.MonkeyPatch.context() as patch:
        for number in range(count):
            be_rank(patch, number, count)
            mine = trainer._share(inputs)
            seen += [i for part, times in mine for i in part if times]
            passes.add(len(mine))
    assert sorted(seen) == list(range(len(lengths)))
    assert len(passes) == 1 or not sharded


def test_a_child_of_a_rank_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, 1, 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("KEPT", "x")
    left = ranks.outside(os.environ)
    assert "KEPT" in left and not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(left)


# --- one message for all


def leave(folder: Path, number: int, message: str, code: int, *, lost: bool = False, at: float = 0.0) -> None:
    said = {"message": message, "hint": "h", "code": code, "lost": lost, "at": at}
    (folder / f"{number}.json").write_text(json.dumps(said))


def failed(**codes: int) -> dict[int, Any]:
    return {int(name[1:]): SimpleNamespace(exitcode=code) for name, code in codes.items()}


def test_the_first_reason_is_told_and_not_its_consequences(tmp_path: Path) -> None:
    leave(tmp_path, 0, "the other is gone", 4, lost=True, at=2)
    leave(tmp_path, 1, "out of memory", 4, at=1)
    error = launching._verdict(Layout(2), tmp_path, failed(r0=4, r1=4), None)
    assert (error.message, error.exit_code) == ("out of memory", 4)
    leave(tmp_path, 2, "earlier", 5, at=0.5)
    error = launching._verdict(Layout(3), tmp_path, failed(r0=4), None)
    assert (error.message, error.exit_code) == ("earlier", 5)


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    leave(tmp_path, 0, "terminated", 143, at=2)
    error = launching._verdict(Layout(2), tmp_path, failed(r0=-signal.SIGTERM, r1=-signal.SIGKILL), None)
    assert "process 1 of 2" in error.message and "SIGKILL" in error.message and error.exit_code == 4
    assert "memory" in error.hint
    leave(tmp_path, 0, "diverged", 5, at=2)
    error = launching._verdict(Layout(2), tmp_path, failed(r0=5, r1=-signal.SIGTERM), None)
    assert (error.message, error.exit_code) == ("diverged", 5), "that one was ended by torchrun"


def test_a_signal_to_the_launcher_ends_as_the_ranks_say(tmp_path: Path) -> None:
    error = launching._verdict(Layout(2), tmp_path, {}, int(signal.SIGTERM))
    assert error.exit_code == 143
    leave(tmp_path, 0, "stopped at step 3/6, saved in outputs/x", 143)
    assert "step 3/6" in launching._verdict(Layout(2), tmp_path, {}, int(signal.SIGTERM)).message


def test_a_bug_in_a_silent_rank_shows_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "id_x" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback\nKeyError: 'x'\n")
    error = launching._verdict(Layout(2), tmp_path, failed(r1=1), None)
    assert error.exit_code == 1 and "process 1 of 2" in error.message
    assert "KeyError: 'x'" in capsys.readouterr().err


# --- the files in env/


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp", "machines", "deepspeed"])
def test_accelerate_takes_each_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / "env" / f"{name}.yaml"))
    assert found.num_processes >= 1 and found.mixed_precision == "no"


def test_the_fsdp_file_reaches_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    config = load_config(ROOT / "configs" / "base.yaml", "train.parallel=fsdp")
    assert sharding.trainer_options(config, "bf16") == {}, "one process has nothing to share"
    be_rank(monkeypatch, 0, 2)
    options = sharding.trainer_options(config, "bf16")
    for name in ranks._PLACE:
        monkeypatch.delenv(name)
    found = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options).fsdp_plugin_args
    assert found["fsdp_version"] == 2 and found["reshard_after_forward"] is True
    assert options["bf16"] is False, "adapters stay in fp32"
    monkeypatch.setattr(sharding, "CONFIGS", tmp_path)
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\nfsdp_confg: {}\n")
    with pytest.raises(UserError, match="fsdp_confg"):
        sharding.settings("fsdp")


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(
    ("words", "precision", "told"),
    [
        ("", "fp16", "bf16 or fp32"),
        ("train.optimizer=adamw_8bit", "bf16", "no shards"),
    ],
)
def test_what_shards_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, engine: str, words: str, precision: str, told: str
) -> None:
    monkeypatch.setattr(sharding.metadata, "version", lambda _: "1")
    config = load_config(ROOT / "configs" / "base.yaml", f"train.parallel={engine} {words}")
    sharding.check(config, precision)
    be_rank(monkeypatch, 0, 2)
    with pytest.raises(MachineError, match=told):
        sharding.check(config, precision)


def test_an_engine_that_is_not_installed_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding.metadata, "version", raising(sharding.metadata.PackageNotFoundError("deepspeed")))
    config = load_config(ROOT / "configs" / "base.yaml", "train.parallel=deepspeed")
    with pytest.raises(MachineError, match="not installed") as caught:
        sharding.require_engine(config)
    assert "make install EXTRAS=deepspeed" in caught.value.hint
    # by the real command, where the records of installed packages have no such entry
    (tmp_path / "c.yaml").write_text("{}\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "version = m.version\n"
        "def without(name):\n"
        "    if name == 'deepspeed':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = without\n"
    )
    words = {"SFT_NPROC": "2", "SFT_SET": "train.parallel=deepspeed", "PYTHONPATH": str(tmp_path)}
    done = script("train", "--config", "c.yaml", cwd=tmp_path, **words)
    assert done.returncode == 4, done.stderr
    assert "make install EXTRAS=deepspeed" in done.stderr and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "outputs").exists()


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("zero_stage: 3", "zero_stage is 3, expected 1 or 2"),
        ("zero_stage: two", "zero_stage is 'two'"),
        ("offload_optimizer_device: cpu", "offload_optimizer_device: 'cpu': only 'none' works"),
        ("gradient_clipping: 1.0", "gradient_clipping: 1.0: this is not read"),
    ],
)
def test_what_zero_does_not_do_here_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    assert sharding.zero_stage() == 2, "as the file comes"
    (tmp_path / "deepspeed.yaml").write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  {line}\n")
    monkeypatch.setattr(sharding, "CONFIGS", tmp_path)
    with pytest.raises(UserError) as caught:
        sharding.zero_stage()
    assert told in caught.value.message and str(tmp_path / "deepspeed.yaml") in caught.value.message


def test_the_slurm_script_is_sound() -> None:
    path = ROOT / "env" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    checker = Path(sys.executable).parent / "shellcheck"
    if checker.exists():
        done = subprocess.run([checker, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    text = path.read_text()
    head = text[: text.index("set -euo")]
    wanted = {"nodes", "ntasks-per-node", "gpus-per-node", "time", "signal"}
    assert wanted <= set(re.findall(r"^#SBATCH --([a-z-]+)=", head, flags=re.M)), "directives end at the first command"
    assert not re.findall(r"^#SBATCH", text[len(head) :], flags=re.M)


def test_the_slurm_script_hands_each_machine_its_number(tmp_path: Path) -> None:
    """With stand-ins for SLURM's own commands: srun runs its words once a machine, as SLURM does."""
    tools = tmp_path / "bin"
    tools.mkdir()
    made = {
        "scontrol": 'printf "%s\\n" node-a node-b',
        "srun": 'while [[ $1 == --* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "make": 'echo "$* MACHINE=${MACHINE:-} MACHINES=${MACHINES:-} NPROC=${NPROC:-} MAIN=${MAIN:-} RUN=$RUN"',
    }
    for name, words in made.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{words}\n")
        (tools / name).chmod(0o755)
    done = run(
        ["bash", ROOT / "env" / "slurm.sbatch"],
        tmp_path,
        PATH=f"{tools}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="4",
        SLURM_JOB_NODELIST="node-[a-b]",
        RUN="big one",
    )
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("render ")
    assert others == [f"train-cluster MACHINE={n} MACHINES=2 NPROC=4 MAIN=node-a:29500 RUN=big one" for n in (0, 1)]


def test_the_skypilot_task_has_the_shape_that_sky_reads() -> None:
    task = yaml.safe_load((ROOT / "env" / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run", "file_mounts", "volumes"}
    assert all(isinstance(value, str) for value in task["envs"].values())
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
    if find_spec("sky"):  # not among the tests' packages
        import sky

        assert sky.Task.from_yaml(str(ROOT / "env" / "skypilot.yaml")).num_nodes == 1
    makes = re.findall(r"make ([a-z-]+)", task["setup"] + task["run"])
    targets = (ROOT / "Makefile").read_text()
    assert makes and all(re.search(rf"^{name}[ :]", targets, flags=re.M) for name in makes)


def test_the_cluster_target_hands_on_its_variables(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(
        "import os; print({k: v for k, v in os.environ.items() if k.startswith('SFT_MA') or k == 'SFT_NPROC'})"
    )
    done = run(["make", "train-cluster", "NPROC=4", "MACHINES=2", "MACHINE=1", "MAIN=a:1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == {"SFT_NPROC": "4", "SFT_MACHINES": "2", "SFT_MACHINE": "1", "SFT_MAIN": "a:1"}


# --- docs/scaling.md

SIZES = {"8B": (4096, 14336, 32, 32, 8, 128256), "70B": (8192, 28672, 80, 64, 8, 128256)}
ROW = re.compile(
    r"^\| (8B|70B) (QLoRA|LoRA|full) \| (\d+) \| (–|ddp|fsdp) \| ([\d.]+) GiB(?:(, while loading)|, and ([\d.]+) GiB host)? \| (.*) \| (on|off) \|$"
)


def test_the_memory_in_the_docs_is_what_the_planner_says() -> None:
    from scripts.utils import architecture, planning
    from scripts.utils.hardware import Hardware

    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    rows = [found.groups() for line in lines if (found := ROW.match(line))]
    assert len(rows) == sum(line.startswith(("| 8B", "| 70B")) for line in lines) == 13
    for size, mode, count, engine, peak, loading, host, card, checkpointing in rows:
        hidden, middle, layers, heads, keys, vocabulary = SIZES[size]
        shape = architecture.from_config(
            {
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": middle,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": keys,
                "vocab_size": vocabulary,
                "tie_word_embeddings": False,
            }
        )
        parallel = "fsdp" if engine == "fsdp" else "ddp"
        config = load_config(ROOT / "configs" / "base.yaml", f"tuning.mode={mode.lower()} train.parallel={parallel}")
        gib = float(re.match(r"[\d.]+", card)[0]) if card[0].isdigit() else 80
        machine = Hardware("cuda", "card", round(gib * 2**30), (8, 6))
        plan = planning.make(config, shape, machine, "bf16", "bitsandbytes", int(count))
        assert plan.memory.peak / 2**30 == pytest.approx(float(peak), abs=0.06), (size, mode, count, engine)
        assert plan.run.checkpointing == (checkpointing == "on")
        assert plan.fits == card[0].isdigit(), (size, mode, count)
        assert bool(loading) == (plan.memory.largest_turn == "loading" and plan.memory.turns["loading"] > 0)
        assert plan.memory.host / 2**30 == pytest.approx(float(host or 0), abs=0.06)
        assert plan.run.load_on_host == bool(host)
