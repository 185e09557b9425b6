"""Trouble in the middle of a run: losses that are no numbers, memory that runs out. Nothing bad reaches the disk."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import callbacks, checkpoints, loss_choice, stamp
from scripts.utils.errors import DivergedError, MachineError
from scripts.utils.loss import summed_loss
from tests.test_train import RUN, losses, metrics, run_steps, weights

pytestmark = pytest.mark.slow

EACH = "train.eval_strategy=steps train.save_strategy=steps train.eval_steps=1 train.save_steps=1 train.save_total_limit=99 train.share_prefix=false"
STEPS = (1, 3, 5)


class Planted:
    """Does ``act`` when a real run comes to its ``step``: faults that data, hardware or a bad rate would bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = self.micro_batch = 0
        self.at_step: Callable[[int, Any, Any], None] = lambda step, model, optimizer: None
        self.on_loss: Callable[[Any, Any], Any] = lambda row, loss: loss
        original = callbacks.Report.on_step_begin

        def begin(report: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
            original(report, args, state, control, **options)
            self.step, self.micro_batch = state.global_step + 1, 0
            self.at_step(self.step, options["model"], options["optimizer"])

        def loss(model: Any, row: Any) -> Any:
            self.micro_batch += 1
            return self.on_loss(row, summed_loss(model, row))

        monkeypatch.setattr(callbacks.Report, "on_step_begin", begin)
        monkeypatch.setattr(loss_choice, "summed_loss", loss)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    return Planted(monkeypatch)


def loss_at(step: int, micro_batch: int, factor: float) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        planted.on_loss = lambda row, loss: (
            loss * factor if loss.requires_grad and (planted.step, planted.micro_batch) == (step, micro_batch) else loss
        )

    return plant


def gradient_at(step: int, value: float) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        def act(now: int, model: Any, optimizer: Any) -> None:
            if now == step:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                parameter.register_hook(lambda gradient: gradient * value)

        planted.at_step = act

    return plant


def optimizer_state_at(step: int) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        def act(now: int, model: Any, optimizer: Any) -> None:
            if now == step:
                next(iter(optimizer.state.values()))["exp_avg"].fill_(math.nan)

        planted.at_step = act

    return plant


def weight_at(step: int) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        def act(now: int, model: Any, optimizer: Any) -> None:
            if now == step:
                next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = math.nan

        planted.at_step = act

    return plant


def validation_at(step: int, factor: float) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        planted.on_loss = lambda row, loss: loss * factor if not loss.requires_grad and planted.step == step else loss

    return plant


PLACES: dict[str, tuple[int, Callable[[Planted], None]]] = {
    **{f"loss NaN, step {s}, micro batch {m}": (s, loss_at(s, m, math.nan)) for s in STEPS for m in (1, 2)},
    **{f"loss infinite, step {s}": (s, loss_at(s, 2, math.inf)) for s in STEPS},
    **{f"gradient NaN, step {s}": (s, gradient_at(s, math.nan)) for s in STEPS},
    **{f"gradient infinite, step {s}": (s, gradient_at(s, math.inf)) for s in STEPS},
    **{f"optimizer state, step {s}": (s, optimizer_state_at(s)) for s in (2, 3, 5)},
    **{f"weight, step {s}": (s, weight_at(s)) for s in STEPS},
    **{f"validation loss NaN, step {s}": (s, validation_at(s, math.nan)) for s in STEPS},
    **{f"validation loss infinite, step {s}": (s, validation_at(s, math.inf)) for s in (2, 4)},
}


def test_there_are_at_least_24_places() -> None:
    assert len(PLACES) >= 24


@pytest.mark.parametrize("place", ["gradient NaN, step 3", "optimizer state, step 3", "weight, step 3"])
def test_broken_weights_are_never_saved_where_nothing_is_evaluated(
    project: Callable[..., Path], planted: Planted, place: str
) -> None:
    step, plant = PLACES[place]
    plant(planted)
    project(max_steps=5)
    with pytest.raises(DivergedError, match=f"step {step}"):
        run_steps(overrides="train.pack_length=64 train.eval_strategy=no train.save_strategy=steps train.save_steps=1")
    assert checkpoints.step_of(checkpoints.listed(Path("outputs") / RUN)[0]) == step - 1


@pytest.mark.parametrize("place", PLACES)
def test_a_loss_that_is_no_number_stops_in_its_step_and_never_reaches_the_disk(
    project: Callable[..., Path], planted: Planted, place: str
) -> None:
    import torch
    from safetensors.torch import load_file

    step, plant = PLACES[place]
    plant(planted)
    project(max_steps=5)
    with pytest.raises(DivergedError) as caught:
        run_steps(overrides=f"{EACH} train.pack_length=64")
    assert caught.value.exit_code == 5 and f"step {step}" in caught.value.message
    out = Path("outputs") / RUN
    steps = [checkpoints.step_of(folder) for folder in checkpoints.listed(out)]
    assert steps == list(range(step - 1, 0, -1)), "every earlier checkpoint, and none of this step"
    for path in out.rglob("*.safetensors"):
        assert all(bool(torch.isfinite(v).all()) for v in load_file(path).values() if v.is_floating_point()), path
    if (out / "metrics.jsonl").exists():
        text = (out / "metrics.jsonl").read_text()
        assert "NaN" not in text and "Infinity" not in text
    assert not (Path("adapters") / RUN).exists()
    facts = stamp.require(RUN)
    assert facts["status"] == "unfinished" and facts["starts"][-1]["ended"].startswith("failed: ")


def test_skip_passes_over_the_step_says_so_and_goes_on(
    project: Callable[..., Path], planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    loss_at(3, 1, math.nan)(planted)
    project(max_steps=5)
    run_steps(overrides=f"{EACH} train.pack_length=64 train.non_finite=skip")
    error = capsys.readouterr().err
    assert "at step 3: the step is passed over; rows:" in error and "sums.jsonl:" in error
    before, after = (load_file(f"outputs/{RUN}/checkpoint-{n}/adapter_model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(losses()) == [1, 2, 4, 5], "no invented loss for the step that was not made"
    assert next(entry for entry in metrics() if entry["step"] == 3 and "skipped_steps" in entry)["skipped_steps"] == 1
    assert stamp.require(RUN)["result"]["skipped_steps"] == 1


def test_skip_gives_up_after_five_steps_in_a_row(project: Callable[..., Path], planted: Planted) -> None:
    planted.on_loss = lambda row, loss: loss * math.nan if planted.step >= 2 and loss.requires_grad else loss
    project(max_steps=9)
    with pytest.raises(DivergedError, match="5 steps in a row"):
        run_steps(overrides="train.pack_length=64 train.gradient_accumulation=1 train.non_finite=skip")


@pytest.mark.parametrize("words", ["train.pack_length=96", "train.packing=false train.batch_size=4"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_batch(
    project: Callable[..., Path], planted: Planted, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    import torch

    project(max_steps=4)
    words = f"{words} train.eval_strategy=no"
    run_steps(overrides=f"run.name=roomy {words}")
    seen = []

    def little(row: Any, loss: Any) -> Any:
        if loss.requires_grad and row["input_ids"].numel() > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        seen.append(row["input_ids"].numel())
        return loss

    planted.on_loss = little
    run_steps(overrides=f"run.name=tight {words}")
    error = capsys.readouterr().err
    assert "out of memory at step 1" in error and ("train.pack_length: " in error or "train.batch_size: " in error)
    assert losses("tight") == pytest.approx(losses("roomy"), rel=1e-5)
    tight, roomy = weights("tight"), weights("roomy")
    assert all(torch.allclose(tight[name], roomy[name], atol=1e-4) for name in roomy)
    assert stamp.require("tight")["result"]["micro_batch_parts"] >= 2
    assert error.count("out of memory at step") <= 2, "the smaller size is kept for the steps that follow"


def test_out_of_memory_on_a_single_example_says_what_to_set_to_what(
    project: Callable[..., Path], planted: Planted
) -> None:
    import torch

    def none(row: Any, loss: Any) -> Any:
        if loss.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    planted.on_loss = none
    project(max_steps=4)
    with pytest.raises(MachineError) as caught:
        run_steps()
    assert caught.value.exit_code == 4 and "render.max_length to 64" in caught.value.hint
