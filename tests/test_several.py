"""Runs of several processes, each by its real command: they learn what one process learns, and end as one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import checkpoints, files, stamp
from tests.commands import ROOT, environment, run, script
from tests.test_resume import cut

pytestmark = pytest.mark.slow

STEPS = 7
HAS_ZERO = any(found.name == "deepspeed" for found in metadata.distributions())
ZERO = pytest.param("deepspeed", marks=pytest.mark.skipif(not HAS_ZERO, reason="make install EXTRAS=deepspeed"))
PROBE = ROOT / "tests" / "rank_probe.py"
EACH = "train.eval_strategy=steps train.save_strategy=steps train.eval_steps=1 train.save_steps=1 train.save_total_limit=99"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A working folder with rendered rows and one finished run of one process, ``one``, saved after each step."""
    folder = tmp_path_factory.mktemp("several")
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    lines = [{"question": f"How much is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(32)]
    (raw / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"name": str(tiny_model)},
        "data": {"raw": "data/raw/sums.jsonl", "val_fraction": 0.3},
        "render": {"max_length": 64},
        "tuning": {"mode": "lora"},
        "lora": {"r": 4, "alpha": 8},
        # three rows a step for two processes, and a last step of an epoch with fewer
        "train": {
            "max_steps": STEPS,
            "gradient_accumulation": 3,
            "learning_rate": 0.003,
            "logging_steps": 1,
            "precision": "fp32",
            "self_test": False,
        },
    }
    (folder / "tiny.yaml").write_text(json.dumps(config))
    for step in ("process", "render"):
        done = script(step, "--config", "tiny.yaml", cwd=folder)
        assert done.returncode == 0, done.stderr
    done = script("train", "--config", "tiny.yaml", "--run", "one", "--set", EACH, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    forget_notes(place)


def forget_notes(place: Path) -> None:
    for path in place.glob("probe-*"):
        path.unlink()


def train(name: str, words: str = "", *more: str, count: int = 2, **extra: str) -> subprocess.CompletedProcess[str]:
    """``count`` processes by the probe, which is scripts/train.py and notes what they do."""
    if count > 1:
        extra["SFT_NPROC"] = str(count)
        command: Sequence[str | Path] = [sys.executable, PROBE]
    else:
        command = [sys.executable, ROOT / "scripts" / "train.py"]
    return run(
        [*command, "--config", "tiny.yaml", "--run", name, "--set", f"{EACH} {words}", *more], Path.cwd(), **extra
    )


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def entries(name: str, key: str) -> dict[int, float]:
    found = [entry for entry in files.read_jsonl(Path("outputs") / name / "metrics.jsonl") if key in entry]
    assert len({entry["step"] for entry in found}) == len(found), "a line twice"
    return {entry["step"]: entry[key] for entry in found}


def weights(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path("adapters") / name / "adapter_model.safetensors")


def assert_learnt_the_same(name: str, other: str = "one", *, rel: float = 1e-4) -> None:
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_seen"):
        assert entries(name, key) == pytest.approx(entries(other, key), rel=rel), key
    mine, theirs = weights(name), weights(other)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        # Adam divides small gradients by themselves: what was rounded differently moves by parts of a step
        assert float((mine[key] - value).abs().max()) <= 0.02 * float(value.abs().max()) + 1e-5, key
    assert stamp.require(name)["result"]["best_eval_loss"] == pytest.approx(
        stamp.require(other)["result"]["best_eval_loss"], rel=rel
    )


def noted() -> list[dict[str, Any]]:
    return [line for path in sorted(Path.cwd().glob("probe-[0-9]*.jsonl")) for line in files.read_jsonl(path)]


def assert_each_row_once() -> None:
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in noted():
        steps.setdefault(line["step"], []).append(line)
    assert sorted(steps) == list(range(1, STEPS + 1))
    for lines in steps.values():
        computed = [i for line in lines for part in line["rows"] for i in part]
        assert sorted(computed) == sorted(i for row in lines[0]["given"] for i in row)
    assert {line["rank"] for line in noted() if line["rows"]} == {0, 1}, "both worked"


def assert_only_the_first_wrote() -> None:
    assert Path("probe-writes-0.txt").read_text().count("\n") > 20
    assert Path("probe-writes-1.txt").read_text() == ""


@pytest.fixture(scope="module")
def ddp(place: Path) -> Any:
    before = Path.cwd()
    os.chdir(place)
    forget_notes(place)  # of a test before the first that wants this run
    try:
        done = train("ddp", "train.self_test=true")
        assert done.returncode == 0, done.stderr[-3000:]
        assert_each_row_once()
        assert_only_the_first_wrote()
        return done
    finally:
        os.chdir(before)


def test_two_processes_learn_what_one_learns(ddp: Any) -> None:
    assert_learnt_the_same("ddp")
    facts = stamp.require("ddp")
    assert facts["parallel"] == {"processes": 2, "machines": 1, "engine": "ddp"}
    assert stamp.require("one")["parallel"] is None
    assert len(facts["starts"]) == 1 and facts["identity"] == stamp.require("one")["identity"]
    logs = list(Path("outputs/ddp/tensorboard").rglob("events*"))
    assert len([path for path in logs if path.suffix != ".hparams"]) == 1 and len(logs) == 2


def test_they_speak_with_one_voice(ddp: Any) -> None:
    assert ddp.stdout.count("is trained") == 1
    assert ddp.stderr.count(f"step {STEPS}/{STEPS}  loss") == 1
    assert ddp.stderr.count("2 processes, each with the whole model") == 1
    for noise in ("Warning", "W1", "E1", "torch.distributed", "[rank", "OMP_NUM_THREADS", "destroy_process_group"):
        assert noise not in ddp.stderr, noise


def test_the_stamp_of_several_processes_fits_its_schema(ddp: Any) -> None:
    import jsonschema

    schema = json.loads((ROOT / "docs" / "backend.schema.json").read_text())
    for name in ("ddp", "one"):
        jsonschema.validate(stamp.require(name), schema)


def test_make_starts_them(place: Path) -> None:
    for name in ("scripts", "env", "Makefile"):
        if not Path(name).exists():
            Path(name).symlink_to(ROOT / name)
    done = run(["make", "train", "NPROC=2", "CONFIG=tiny.yaml", "RUN=made", f"SET={EACH}"], place)
    good(done)
    assert_learnt_the_same("made")


@pytest.mark.parametrize("engine", ["fsdp", ZERO])
def test_shards_learn_what_one_process_learns(engine: str) -> None:
    said = good(train(engine, f"train.parallel={engine}"))
    assert_each_row_once()
    assert_only_the_first_wrote()
    assert_learnt_the_same(engine)
    assert stamp.require(engine)["parallel"]["engine"] == engine
    assert ("deepspeed" in stamp.require(engine)["versions"]) == (engine == "deepspeed")
    assert all(line["sharded"] for line in noted())
    assert said.count(f"step {STEPS}/{STEPS}  loss") == 1
    for noise in ("Warning", "torch.distributed", "DeepSpeed", "[rank", "[INFO]"):
        assert noise not in said, noise
    # an adapter as any other: the same file, loaded anew
    done = script(
        "eval", "--config", "tiny.yaml", "--run", engine, "--quick", "--set", "eval.generate=false", cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ["ddp", "fsdp", ZERO])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(engine: str, first: int, then: int, ddp: Any) -> None:
    if first == 1:
        source = "one"
    elif engine == "ddp":
        source = "ddp"
    else:
        source = engine
        if not Path("adapters", engine).exists():
            good(train(engine, f"train.parallel={engine}"))
    name = f"{engine}-{first}-{then}"
    cut(source, name, 3)
    good(train(name, f"train.parallel={engine}", "--resume", "must", count=then))
    assert stamp.require(name)["starts"][-1]["from_step"] == 3
    assert_learnt_the_same(name)


TIMED = "train.eval_strategy=epoch train.save_strategy=epoch train.save_minutes=1e-6"


@pytest.mark.parametrize(
    ("engine", "saves"),
    [("ddp", EACH), ("ddp", TIMED), pytest.param("deepspeed", EACH, marks=ZERO.marks)],
    ids=["ddp", "ddp by the clock", "deepspeed"],
)
def test_a_killed_rank_ends_the_run_within_a_minute_and_the_same_command_goes_on(
    engine: str, saves: str, ddp: Any
) -> None:
    name, words = f"killed-{engine}-{saves == TIMED}", f"train.parallel={engine} {saves}"
    begun = time.time()
    done = train(name, words, PROBE_KILL=f"1:4:{int(signal.SIGKILL)}")
    assert time.time() - float(Path("probe-killed").read_text()) < 60
    assert begun < time.time()
    assert done.returncode == 4
    assert done.stderr.count("error:") == 1 and done.stderr.count("hint:") == 1 and "Traceback" not in done.stderr
    assert "process 1 of 2 was ended from outside (SIGKILL)" in done.stderr and "goes on" in done.stderr
    assert not Path("adapters", name).exists()
    assert checkpoints.newest_whole(Path("outputs", name))[0] == Path("outputs", name, "checkpoint-3")
    good(train(name, words))
    assert stamp.require(name)["starts"][-1]["from_step"] == 3
    if saves == EACH:  # "ddp" has a validation loss of each step
        assert_learnt_the_same(name, "ddp", rel=1e-6 if engine == "ddp" else 1e-4)


def test_a_stopped_run_saves_on_all_ranks_and_goes_on(ddp: Any) -> None:
    words = [sys.executable, str(PROBE), "--config", "tiny.yaml", "--run", "stopped", "--set", EACH]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(
            words, env=environment(SFT_NPROC="2"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as launcher:
            seen = ""
            assert launcher.stderr is not None
            for line in launcher.stderr:
                seen += line
                if "  loss " in line:
                    launcher.send_signal(number)
                    break
            seen += launcher.stderr.read()
        assert launcher.returncode == code, seen
        assert seen.count("error: stopped at step") == 1 and seen.count("error:") == 1, seen
        assert "Traceback" not in seen
        facts = stamp.require("stopped")
        assert facts["starts"][-1]["ended"] == "interrupted"
        step = facts["starts"][-1]["step"]
        assert checkpoints.newest_whole(Path("outputs/stopped"))[0] == Path(f"outputs/stopped/checkpoint-{step}")
    good(train("stopped"))
    assert_learnt_the_same("stopped", "ddp", rel=1e-6)


@pytest.mark.parametrize("engine", ["ddp", ZERO])
def test_dropout_goes_on_where_it_was_on_each_rank(engine: str) -> None:
    name, words = f"noise-{engine}", f"lora.dropout=0.3 train.parallel={engine}"
    good(train(name, words))
    cut(name, f"{name}-cut", 3)
    good(train(f"{name}-cut", words, "--resume", "must"))
    assert entries(f"{name}-cut", "loss") == entries(name, "loss")
    assert files.sha256_file(Path("adapters", name, "adapter_model.safetensors")) == files.sha256_file(
        Path("adapters", f"{name}-cut", "adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    ("words", "more", "code", "told"),
    [
        ("", ["--resume", "must"], 3, "nothing to resume"),
        ("lora.target_modules=[nothing]", [], 2, "no layer is called nothing"),
    ],
)
def test_an_error_of_all_is_told_once_with_its_exit_code(words: str, more: list[str], code: int, told: str) -> None:
    done = train(f"wrong-{code}", words, *more)
    assert done.returncode == code, done.stderr[-2000:]
    assert told in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ["ddp", "fsdp", ZERO])
def test_a_loss_that_is_no_number_on_one_rank_stops_all(engine: str) -> None:
    name = f"diverged-{engine}"
    done = train(name, f"train.parallel={engine}", PROBE_FAULT="1:3:nan")
    assert done.returncode == 5, done.stderr[-2000:]
    assert "at step 3" in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert checkpoints.newest_whole(Path("outputs") / name)[0] == Path(f"outputs/{name}/checkpoint-2")


@pytest.mark.parametrize("engine", ["fsdp", ZERO])
def test_a_step_that_is_passed_over_on_all_ranks_leaves_no_trace(engine: str) -> None:
    words = "train.non_finite=skip"
    if not Path("adapters/skipped").exists():
        good(train("skipped", words, PROBE_FAULT="1:3:nan"))
    said = good(train(f"skipped-{engine}", f"{words} train.parallel={engine}", PROBE_FAULT="1:3:nan"))
    assert said.count("at step 3: the step is passed over") == 1
    assert stamp.require(f"skipped-{engine}")["result"]["skipped_steps"] == 1
    assert_learnt_the_same(f"skipped-{engine}", "skipped")


def test_a_rank_without_memory_halves_its_own_share() -> None:
    good(train("wide", "train.pack_length=256", count=1))
    said = good(train("halved", "train.pack_length=256", PROBE_FAULT="1:3:memory"))
    assert "another process ran out of memory at step 3" in said
    assert_learnt_the_same("halved", "wide")


@pytest.mark.parametrize("engine", ["fsdp", ZERO])
def test_four_bit_weights_in_shards(engine: str) -> None:
    if not Path("adapters/nf4").exists():
        good(train("nf4", "tuning.mode=qlora", count=1))
    good(train(f"nf4-{engine}", f"tuning.mode=qlora train.parallel={engine}"))
    assert_learnt_the_same(f"nf4-{engine}", "nf4", rel=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", ZERO])
def test_full_tuning_on_two_processes(engine: str) -> None:
    if not Path("adapters/full").exists():
        good(train("full", "tuning.mode=full", count=1))
    good(train(f"full-{engine}", f"tuning.mode=full train.parallel={engine}"))
    assert entries(f"full-{engine}", "loss") == pytest.approx(entries("full", "loss"), rel=1e-3)
    assert entries(f"full-{engine}", "eval_loss") == pytest.approx(entries("full", "eval_loss"), rel=1e-3)


@pytest.mark.parametrize("engine", ["fsdp", ZERO])
def test_checkpoints_within_shards(engine: str) -> None:
    good(train(f"recompute-{engine}", f"train.parallel={engine} train.gradient_checkpointing=true"))
    assert_learnt_the_same(f"recompute-{engine}")


@pytest.mark.skipif(not HAS_ZERO, reason="make install EXTRAS=deepspeed")
def test_zero_keeps_gradients_whole_where_its_file_says_so(tmp_path: Path) -> None:
    text = (ROOT / "env" / "deepspeed.yaml").read_text()
    (tmp_path / "deepspeed.yaml").write_text(text.replace("zero_stage: 2", "zero_stage: 1"))
    # clipped: the norm is that of all ranks' parts
    words = "train.max_grad_norm=0.1 tuning.mode=full"
    good(train("stage-0", words, count=1))
    said = good(train("stage-1", f"{words} train.parallel=deepspeed", PROBE_ENGINES=str(tmp_path)))
    assert "ZeRO stage 1" in said
    for key in ("loss", "eval_loss", "grad_norm"):
        assert entries("stage-1", key) == pytest.approx(entries("stage-0", key), rel=1e-3)


TWO_MACHINES = r"""
set -euo pipefail
ip link set lo up
ip link add v0 type veth peer name v1
ip addr add 10.77.0.1/24 dev v0 && ip link set v0 up
unshare -n sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link set v1 netns "$other"
nsenter -t "$other" -n bash -c 'ip link set lo up && ip addr add 10.77.0.2/24 dev v1 && ip link set v1 up'
export SFT_NPROC=1 SFT_MACHINES=2 SFT_MAIN=10.77.0.1:29511
GLOO_SOCKET_IFNAME=v1 SFT_MACHINE=1 nsenter -t "$other" -n "$@" 2>second.log & second=$!
GLOO_SOCKET_IFNAME=v0 SFT_MACHINE=0 "$@"
wait "$second"
"""


def test_two_machines_in_networks_of_their_own(place: Path) -> None:
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip"))
    if not tools or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    words = [sys.executable, str(PROBE), "--config", "tiny.yaml", "--run", "machines", "--set", EACH]
    done = run(["unshare", "-rn", "bash", "-c", TWO_MACHINES, "bash", *words], place)
    good(done)
    assert_learnt_the_same("machines")
    assert_each_row_once()
    assert_only_the_first_wrote()
    assert stamp.require("machines")["parallel"] == {"processes": 2, "machines": 2, "engine": "ddp"}
    assert "is trained" not in (place / "second.log").read_text()
