"""Resume: a run stopped at any step goes on as if it had never stopped, and never as another run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import checkpoints, files, resume, stamp
from scripts.utils.errors import RefusedError
from tests.test_train import IDENTITY, losses, metrics, run_steps, same, snapshot, weights

pytestmark = pytest.mark.slow

EACH = "train.eval_strategy=steps train.save_strategy=steps train.eval_steps=1 train.save_steps=1 train.save_total_limit=99"
SETTINGS = {
    "packed": "",
    "not packed": "train.packing=false",
    "padded batches": "train.packing=false train.batch_size=3",
    "accumulation": "train.gradient_accumulation=3",
    "short rows": "train.pack_length=64",
    "dropout": "lora.dropout=0.3",
    "dropout, padded": "lora.dropout=0.3 train.packing=false train.batch_size=2",
    "4-bit base": "tuning.mode=qlora",
    "4-bit base with dropout": "tuning.mode=qlora lora.dropout=0.2",
    "full": "tuning.mode=full",
    "linear, no clipping, decay": "train.scheduler=linear train.max_grad_norm=0 train.weight_decay=0.1",
    "logged every third step": "train.logging_steps=3",
    "bf16": "train.precision=bf16",
    "checkpointing": "train.gradient_checkpointing=true lora.dropout=0.2",
}
STEPS = 6


def cut(run: str, new: str, step: int) -> None:
    """Make ``new`` what ``run`` would be, had it been killed after the checkpoint of ``step``."""
    old, folder = Path("outputs") / run, Path("outputs") / new
    shutil.copytree(old, folder, symlinks=True)
    for checkpoint in checkpoints.listed(folder):
        if checkpoints.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    facts = stamp.require(new)
    facts.update(status="running", run=new)
    facts["starts"] = [{"at": stamp.now(), "from_step": 0, "step": step, "ended": "running"}]
    facts.pop("result")
    stamp.write(new, facts)


def without_times(run: str) -> list[dict[str, Any]]:
    timed = (
        "tokens_per_second",
        "memory_gib",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_loss",
    )
    return [{key: value for key, value in entry.items() if key not in timed} for entry in metrics(run)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_killed_after_any_step_ends_bit_for_bit_as_one_that_never_stopped(
    project: Callable[..., Path], setting: str
) -> None:
    project(max_steps=STEPS, gradient_accumulation=1)
    overrides = f"{EACH} {SETTINGS[setting]}"
    run_steps(overrides=f"run.name=whole {overrides}")
    whole = snapshot(Path("adapters/whole"))
    for step in range(1, STEPS):
        run = f"cut{step}"
        cut("whole", run, step)
        run_steps("--resume", "must", overrides=f"run.name={run} {overrides}")
        assert stamp.require(run)["starts"][-1]["from_step"] == step
        assert stamp.require(run)["starts"][0]["ended"] == "killed"
        # losses, learning rates, gradient norms and validation losses of every step, in their order
        assert without_times(run) == without_times("whole"), (setting, step)
        weights = next(name for name in whole if name.endswith("model.safetensors"))
        assert files.sha256_file(Path(weights.replace("whole", run))) == whole[weights], (setting, step)
        last = Path("outputs") / run / "last"
        assert files.sha256_file(last / "training_state.safetensors") == files.sha256_file(
            Path("outputs/whole/last/training_state.safetensors")
        )
        shutil.rmtree(Path("outputs") / run)


@pytest.mark.parametrize("step", [2, 4, 5, 6, 99])
def test_early_stopping_stops_at_the_same_step_after_a_resume(project: Callable[..., Path], step: int) -> None:
    project(epochs=30, learning_rate=0.5, scheduler="constant", early_stopping_patience=2, save_total_limit=99)
    run_steps(overrides="run.name=whole")
    last = stamp.require("whole")["result"]["steps"]
    saved = sorted(checkpoints.step_of(c) for c in checkpoints.listed(Path("outputs/whole")))
    at = saved[min(step, len(saved) - 1)]
    cut("whole", "cut", at)
    run_steps(overrides="run.name=cut")
    assert stamp.require("cut")["result"]["steps"] == last
    assert stamp.require("cut")["result"]["best_eval_loss"] == stamp.require("whole")["result"]["best_eval_loss"]
    assert same(weights("whole"), weights("cut"))


def test_best_and_last_are_always_there(project: Callable[..., Path]) -> None:
    for number, words in enumerate(
        (
            "",
            "train.save_strategy=no train.eval_strategy=no",
            "data.val_fraction=0",
            "train.load_best_model_at_end=false",
        )
    ):
        project(max_steps=3)
        run_steps(overrides=f"run.name=r{number} {words}")
        folder = Path("outputs") / f"r{number}"
        for name in ("best", "last"):
            assert checkpoints.damage((folder / name).resolve()) is None, (words, name)
        assert checkpoints.step_of((folder / "last").resolve()) == 3


def test_a_longer_run_goes_on_where_the_learning_rate_is_constant(project: Callable[..., Path]) -> None:
    project(max_steps=2, scheduler="constant")
    run_steps(overrides="run.name=long train.max_steps=5")
    run_steps(overrides="run.name=grown")
    run_steps(overrides="run.name=grown train.max_steps=5")
    assert stamp.require("grown")["starts"][-1]["from_step"] == 2
    assert same(weights("long"), weights("grown"))
    assert losses("grown") == losses("long")
    with pytest.raises(RefusedError, match="max_steps"):
        run_steps(overrides="run.name=grown train.max_steps=3")


def test_a_longer_run_is_refused_where_the_schedule_depends_on_the_length(project: Callable[..., Path]) -> None:
    project(max_steps=2)
    for number, words in enumerate(
        ("train.scheduler=cosine", "train.scheduler=linear", "train.scheduler=constant_with_warmup train.warmup=0.5")
    ):
        run_steps(overrides=f"run.name=r{number} {words}")
        with pytest.raises(RefusedError, match="max_steps"):
            run_steps(overrides=f"run.name=r{number} {words} train.max_steps=4")


def test_each_identity_key_is_refused_for_an_unfinished_run_with_the_three_ways_on(
    project: Callable[..., Path],
) -> None:
    project(max_steps=3)
    run_steps()
    run = "tiny-sums"
    cut(run, "cut", 3)
    before = snapshot(Path("outputs/cut"))
    for change in [*IDENTITY, f"tuning.init_adapter={run}"]:
        with pytest.raises(RefusedError) as caught:
            run_steps(overrides=f"run.name=cut {change}")
        assert caught.value.exit_code == 3
        for words in ("then", "now"):
            assert words in caught.value.message
        for way in ("RUN=cut-2", "restore", "init_adapter=cut"):
            assert way in caught.value.hint, change
        key = change.split("=")[0].split(".")[1]
        named = {"split_seed": "data", "train_on": "data", "r": "lora", "alpha": "lora", "dropout": "lora"}
        named |= {"target_modules": "lora", "lr": "learning_rate"}
        assert named.get(key, key) in caught.value.message, change
    assert {k: v for k, v in snapshot(Path("outputs/cut")).items() if ".lock" not in k} == {
        k: v for k, v in before.items() if ".lock" not in k
    }


HARMLESS = [
    "train.logging_steps=3", "train.save_minutes=0", "train.save_total_limit=5", "train.eval_strategy=no", "train.save_strategy=no train.eval_strategy=no",
    "train.eval_strategy=steps train.save_strategy=steps train.eval_steps=1 train.save_steps=1", "eval.limit=3",
    "infer.temperature=1", "merge.dtype=fp16", "tracking.report_to=[]", "train.non_finite=skip",
    "train.load_best_model_at_end=false",
]  # fmt: skip


def test_each_harmless_key_may_change_between_two_starts(project: Callable[..., Path]) -> None:
    project(max_steps=4)
    run_steps(overrides=f"run.name=whole {EACH}")
    for number, change in enumerate(HARMLESS):
        run = f"cut{number}"
        cut("whole", run, 2)
        run_steps("--resume", "must", overrides=f"run.name={run} {change}")
        facts = stamp.require(run)
        assert facts["status"] == "finished" and facts["starts"][-1]["from_step"] == 2, change
        last = Path("outputs/whole/last/adapter_model.safetensors")
        assert files.sha256_file(Path("outputs") / run / "last" / last.name) == files.sha256_file(last), change


def test_a_checkpoint_of_other_settings_is_refused_even_if_the_stamp_agrees(project: Callable[..., Path]) -> None:
    project(max_steps=2)
    run_steps(overrides="run.name=a train.lr=0.001")
    run_steps(overrides="run.name=b")
    cut("b", "c", 1)
    shutil.copytree("outputs/a/checkpoint-2", "outputs/c/checkpoint-2")
    with pytest.raises(RefusedError, match="learning_rate") as caught:
        run_steps(overrides="run.name=c")
    assert "checkpoint-2" in caught.value.message


def damages(folder: Path) -> dict[str, Callable[[], None]]:
    """What can be done to a checkpoint: each file removed, cut, or with one bit flipped; the folder emptied."""
    done: dict[str, Callable[[], None]] = {}

    def flip(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        done[f"{path.name} removed"] = path.unlink
        done[f"{path.name} cut"] = lambda p=path, s=size: p.write_bytes(p.read_bytes()[: s // 2])
        done[f"{path.name} empty"] = lambda p=path: p.write_bytes(b"")
        for at in {0, size // 2, size - 1}:
            done[f"{path.name} bit {at}"] = lambda p=path, a=at: flip(p, a)
    done["emptied"] = lambda: [p.unlink() for p in folder.rglob("*") if p.is_file()] and None
    return done


def test_every_damage_to_the_newest_checkpoint_is_noticed_and_passed_over(project: Callable[..., Path]) -> None:
    project(max_steps=3)
    run_steps(overrides=EACH)
    run = Path("outputs/tiny-sums")
    count = len(damages(run / "checkpoint-3"))
    assert count > 30
    for number in range(count):
        copy = Path(f"outputs/copy{number}")
        shutil.copytree(run, copy, symlinks=True)
        name, damage = list(damages(copy / "checkpoint-3").items())[number]
        damage()
        found, passed_over = checkpoints.newest_whole(copy)
        # a flipped bit in the manifest's own white space or step number is found, or changes nothing that it says
        assert found == copy / "checkpoint-2" and len(passed_over) == 1, name
        shutil.rmtree(copy)
    (run / "checkpoint-3").rename(run / "checkpoint-9")
    assert checkpoints.newest_whole(run)[0] == run / "checkpoint-2", "a folder under another step's name"


def test_lines_of_steps_that_are_made_again_leave_the_metrics(project: Callable[..., Path]) -> None:
    project(max_steps=4)
    run_steps(overrides=EACH)
    file = Path("outputs/tiny-sums/metrics.jsonl")
    with file.open("ab") as handle:
        handle.write(b'{"step": 4, "lo')  # a kill in the middle of a line
    resume.cut_metrics(file, 2)
    assert {entry["step"] for entry in map(json.loads, file.read_text().splitlines())} == {1, 2}
