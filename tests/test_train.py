"""train: what the config says is what runs, what the stamp says is what ran, and nothing is lost on the way."""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import process, render, train
from scripts.utils import callbacks, checkpoints, files, stamp
from scripts.utils.config import load_config
from scripts.utils.errors import DivergedError, Interrupted, MachineError, RefusedError, UserError
from tests.commands import ROOT, environment
from tests.terminal import Terminal

RUN = "tiny-sums"


def run_steps(*words: str, overrides: str = "", flags: dict[str, Any] | None = None) -> None:
    config = load_config("tiny.yaml", overrides, flags)
    for module in (process, render):
        module.work(module.build_parser().parse_args(["--config", "tiny.yaml"]), config)
    train.work(train.build_parser().parse_args(["--config", "tiny.yaml", *words]), config)


def metrics(run: str = RUN) -> list[dict[str, Any]]:
    return list(files.read_jsonl(Path("outputs") / run / "metrics.jsonl"))


def losses(run: str = RUN) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in metrics(run) if "loss" in entry}


def weights(run: str = RUN) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path("adapters") / run / "adapter_model.safetensors")


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_it_promises(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project(epochs=2)
    run_steps()
    out = Path("outputs") / RUN
    assert {p.name for p in out.iterdir()} >= {"backend.json", "config.yaml", "metrics.jsonl", "tensorboard"}
    adapter = Path("adapters") / RUN
    names = {p.name for p in adapter.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "generation_config.json",
    }
    assert any(float(value.abs().max()) > 0 for name, value in weights().items() if "lora_B" in name)
    facts = stamp.require(RUN)
    assert facts["status"] == "finished" and facts["starts"][-1]["ended"] == "finished"
    assert facts["backend"] == {"requested": "bitsandbytes", "actual": "bitsandbytes", "fallback_reason": None}
    assert facts["precision"]["actual"] == "fp32" and facts["data"]["splits"]["train"] > 0
    assert set(facts["tuning"]["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    text = capsys.readouterr()
    assert "is trained" in text.out and "tok/s" in text.err and "left" in text.err
    modes = {p.name: p.stat().st_mode & 0o777 for p in (*adapter.iterdir(), *(out / "last").iterdir()) if p.is_file()}
    assert len(set(modes.values())) == 1, "a colleague can read all of it, or none"
    assert not list(out.rglob("training_args.bin")), "the stock file is a pickle and may hold a token"
    assert not list(Path("outputs").rglob("*.tmp"))


@pytest.mark.slow
def test_the_loss_falls_and_validation_is_logged(project: Callable[..., Path]) -> None:
    project(epochs=4)
    run_steps()
    seen = losses()
    assert seen[max(seen)] < seen[1]
    evals = [entry for entry in metrics() if "eval_loss" in entry]
    assert len(evals) == 4
    assert all(
        entry["eval_perplexity"] == pytest.approx(2.718281828 ** entry["eval_loss"], rel=1e-6) for entry in evals
    )


def test_tensorboard_holds_the_scalars(project: Callable[..., Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    project()
    run_steps()
    events = EventAccumulator(str(Path("outputs") / RUN / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_seen", "memory_gib"}
    assert {f"train/{name}" for name in wanted} <= tags and "eval/loss" in tags


@pytest.mark.slow
def test_learning_rate_schedule_and_warmup_are_the_configs(project: Callable[..., Path]) -> None:
    project()
    run_steps(overrides="train.lr=0.002 train.scheduler=linear train.warmup=2 train.max_steps=6 run.name=a")
    rates = [entry["learning_rate"] for entry in metrics("a") if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.001, 0.002, 0.0015, 0.001, 0.0005])
    run_steps(overrides="train.lr=0.002 train.scheduler=constant train.max_steps=3 run.name=b")
    assert [e["learning_rate"] for e in metrics("b") if "learning_rate" in e] == pytest.approx([0.002] * 3)


def test_every_training_key_reaches_the_trainer(project: Callable[..., Path]) -> None:
    project()
    from scripts.utils.hardware import Hardware, optimizer_name
    from scripts.utils.trainer_settings import training_arguments

    cpu, card, small = (Hardware(d, d, m) for d, m in (("cpu", 2**34), ("cuda", 2**35), ("cuda", 2**33)))  # type: ignore[arg-type]
    config = load_config(
        "tiny.yaml",
        "train.lr=0.01 train.scheduler=constant_with_warmup train.warmup=0.5 train.weight_decay=0.1 train.max_grad_norm=0.5 "
        "train.optimizer=adamw_torch_fused train.seed=7 tracking.report_to=[]",
    )
    arguments = training_arguments(config, Path("outputs/x"), cpu, "bf16", 10)
    assert arguments.learning_rate == 0.01 and arguments.lr_scheduler_type == "constant_with_warmup"
    assert (arguments.warmup_steps, arguments.weight_decay, arguments.max_grad_norm, arguments.seed) == (5, 0.1, 0.5, 7)
    assert arguments.bf16 and not arguments.fp16 and arguments.max_steps == 10 and arguments.report_to == []
    assert optimizer_name(config, cpu) == "adamw_torch_fused"
    auto = load_config("tiny.yaml")
    assert [optimizer_name(auto, m) for m in (cpu, card, small)] == [
        "adamw_torch",
        "adamw_torch_fused",
        "paged_adamw_8bit",
    ]
    with pytest.raises(MachineError):
        optimizer_name(load_config("tiny.yaml", "train.optimizer=adamw_8bit"), cpu)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_gives_another(project: Callable[..., Path]) -> None:
    import torch

    project(max_steps=3)
    run_steps(overrides="run.name=a")
    torch.manual_seed(123)  # whatever this process did before: the adapter's first weights come from the config's seed
    run_steps(overrides="run.name=b")
    run_steps(overrides="run.name=c train.seed=1")
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))


@pytest.mark.slow
def test_packing_and_accumulation_change_the_speed_and_not_the_loss(project: Callable[..., Path]) -> None:
    """All rows in one step: however they are cut into micro batches, step 1 has the same loss and gradient."""
    project(max_steps=1, gradient_accumulation=1000)
    shapes = ["train.packing=true", "train.packing=false train.batch_size=1", "train.packing=false train.batch_size=5"]
    first = []
    for number, shape in enumerate(shapes):
        run_steps(overrides=f"run.name=r{number} {shape}")
        first.append(next((e["loss"], e["grad_norm"]) for e in metrics(f"r{number}") if "loss" in e))
    assert first[1] == pytest.approx(first[0], rel=1e-4) and first[2] == pytest.approx(first[0], rel=1e-4)


@pytest.mark.slow
def test_shared_beginnings_change_the_rows_of_a_step_and_not_the_steps(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template's own system message is in every row; computed once a row or each time, every step learns the same."""
    from scripts.utils import training

    made: list[int] = []
    real = training.to_row
    monkeypatch.setattr(training, "to_row", lambda *args: made.append(len((row := real(*args))["input_ids"][0])) or row)
    project(gradient_accumulation=3)
    run_steps(overrides="run.name=once")
    once, made[:] = sum(made), []
    run_steps(overrides="run.name=each train.share_prefix=false")
    assert once < 0.8 * sum(made), "fewer tokens are computed"
    assert len(losses("once")) > 2 and losses("once") == pytest.approx(losses("each"), rel=1e-4)
    assert [e["tokens_seen"] for e in metrics("once") if "loss" in e] == [
        e["tokens_seen"] for e in metrics("each") if "loss" in e
    ]
    run_steps(overrides="run.name=noise lora.dropout=0.1")
    assert stamp.require("once")["engine"]["shared"] and not stamp.require("noise")["engine"]["shared"]


@pytest.mark.parametrize("mode", ["qlora", "full"])
@pytest.mark.slow
def test_the_other_tuning_modes_train_and_are_stamped(project: Callable[..., Path], mode: str) -> None:
    project(max_steps=2)
    run_steps(overrides=f"tuning.mode={mode}")
    facts = stamp.require(RUN)
    assert facts["tuning"]["mode"] == mode
    assert facts["quantisation"] == ("nf4, double" if mode == "qlora" else None)
    wanted = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    assert (Path("adapters") / RUN / wanted).is_file()


@pytest.mark.slow
def test_full_tuning_in_bf16_computes_in_bf16_and_keeps_fp32_weights(project: Callable[..., Path]) -> None:
    project(max_steps=3, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3)
    losses = {}
    for precision in ("fp32", "bf16"):
        run_steps(overrides=f"tuning.mode=full run.name={precision} train.precision={precision}")
        assert stamp.require(precision)["precision"]["actual"] == precision
        lines = map(json.loads, Path(f"outputs/{precision}/metrics.jsonl").read_text().splitlines())
        losses[precision] = [value for line in lines for name, value in line.items() if name in ("loss", "eval_loss")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert all(one != other for one, other in zip(losses["bf16"], losses["fp32"], strict=True))


@pytest.mark.slow
def test_four_bit_weights_are_the_same_after_an_evaluation(project: Callable[..., Path]) -> None:
    """On a CPU with AVX-512 BF16 bitsandbytes would rewrite them, losing digits and the way back for gradients."""
    import torch

    from scripts.utils import backends, model_store

    project()
    path = model_store.resolve(load_config("tiny.yaml").model.name).path
    model = backends.load_causal_lm(path, precision="fp32", device="cpu", quantised=True)
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.data.clone(), weight.quant_state.absmax.clone()
    model.eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert weight.quant_state.dtype == torch.float32
    assert torch.equal(weight.data, before[0]) and torch.equal(weight.quant_state.absmax, before[1])


@pytest.mark.slow
def test_unknown_target_modules_are_refused_with_those_that_exist(project: Callable[..., Path]) -> None:
    project()
    with pytest.raises(UserError) as caught:
        run_steps(overrides="lora.target_modules=[query]")
    assert "query" in caught.value.message and "q_proj" in caught.value.hint
    run_steps(overrides="lora.target_modules=[q_proj,v_proj] train.max_steps=1")
    assert stamp.require(RUN)["tuning"]["target_modules"] == ["q_proj", "v_proj"]


def stop_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal while the trainer is at ``step``, as a user's Ctrl-C would."""
    original = callbacks.Report.on_step_begin

    def begin(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        original(self, args, state, control, **options)
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(callbacks.Report, "on_step_begin", begin)


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        pytest.param(1, "", marks=pytest.mark.slow),
        pytest.param(3, "train.packing=false train.batch_size=3", marks=pytest.mark.slow),
        (5, "lora.dropout=0.2"),
        pytest.param(4, "tuning.mode=qlora", marks=pytest.mark.slow),
        pytest.param(2, "tuning.mode=full", marks=pytest.mark.slow),
        (4, "train.eval_strategy=steps train.save_strategy=steps train.eval_steps=2 train.save_steps=2"),
    ],
)
def test_resume_matches_an_uninterrupted_run_bit_for_bit(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: int, overrides: str
) -> None:
    project(max_steps=7)
    run_steps(overrides=f"run.name=whole {overrides}")
    with monkeypatch.context() as patch:
        stop_at(step, signal.SIGINT, patch)
        with pytest.raises(Interrupted) as caught:
            run_steps(overrides=f"run.name=cut {overrides}")
    assert caught.value.exit_code == 130 and f"step {step}/7" in caught.value.message
    assert stamp.require("cut")["starts"][-1] | {} and stamp.require("cut")["status"] == "unfinished"
    run_steps("--resume", "must", overrides=f"run.name=cut {overrides}")
    whole, cut = losses("whole"), losses("cut")
    assert {s: v for s, v in whole.items() if s > step} == {s: v for s, v in cut.items() if s > step}
    name = "model.safetensors" if "full" in overrides else "adapter_model.safetensors"
    assert files.sha256_file(Path("adapters/whole") / name) == files.sha256_file(Path("adapters/cut") / name)
    starts = stamp.require("cut")["starts"]
    assert [s["ended"] for s in starts] == ["interrupted", "finished"] and starts[1]["from_step"] == step


def test_sigterm_saves_and_ends_with_143(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    project(max_steps=5)
    stop_at(2, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        run_steps()
    assert caught.value.exit_code == 143 and (Path("outputs") / RUN / "checkpoint-2").is_dir()


def test_a_checkpoint_is_made_every_so_many_minutes_and_the_run_ends_with_those_that_were_planned(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project(max_steps=7)
    run_steps(overrides="run.name=whole")
    often = "train.save_minutes=1e-6"  # overdue after each step
    with monkeypatch.context() as patch:
        begin = callbacks.Report.on_step_begin

        def break_at_5(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
            begin(self, args, state, control, **options)
            if state.global_step == 4:
                raise RuntimeError("the power went")

        patch.setattr(callbacks.Report, "on_step_begin", break_at_5)
        with pytest.raises(RuntimeError, match="the power went"):
            run_steps(overrides=often)
    assert [checkpoints.step_of(folder) for folder in checkpoints.listed(Path("outputs") / RUN)] == [4]
    run_steps("--resume", "must", overrides=often)
    assert stamp.require(RUN)["starts"][-1]["from_step"] == 4
    assert same(weights("whole"), weights())
    left = [[folder.name for folder in checkpoints.listed(Path("outputs") / run)] for run in ("whole", RUN)]
    assert left[0] == left[1]
    run_steps(overrides=f"run.name=none {often} train.save_strategy=no train.eval_strategy=no")
    assert [folder.name for folder in checkpoints.listed(Path("outputs/none"))] == ["checkpoint-7"]


def end_by_ctrl_c_with_tee(process: "subprocess.Popen[bytes]", reader: int) -> None:
    os.close(reader)  # `| tee` ends by the same Ctrl-C
    process.send_signal(signal.SIGINT)


def end_by_sigterm_to_all(process: "subprocess.Popen[bytes]", reader: int) -> None:
    for _ in range(2):  # to the whole process group; and make hands on what it has got
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)


TRAIN = [sys.executable, ROOT / "scripts" / "train.py", "--config", "tiny.yaml"]


def render_rows_for_long(project: Callable[..., Path]) -> Path:
    folder = project(max_steps=2000)
    config = load_config("tiny.yaml")
    for module in (process, render):
        module.work(module.build_parser().parse_args(["--config", "tiny.yaml"]), config)
    return folder


def assert_saved_where_it_stopped() -> None:
    [last] = stamp.require(RUN)["starts"]
    assert last["ended"] == "interrupted"
    newest, _ = checkpoints.newest_whole(Path("outputs") / RUN)
    assert newest == Path("outputs") / RUN / f"checkpoint-{last['step']}"


@pytest.mark.parametrize(("end", "code"), [(end_by_ctrl_c_with_tee, 130), (end_by_sigterm_to_all, 143)])
def test_a_run_is_saved_though_nobody_is_left_to_read_or_the_signal_comes_twice(
    project: Callable[..., Path], end: Callable[["subprocess.Popen[bytes]", int], None], code: int
) -> None:
    render_rows_for_long(project)
    reader, writer = os.pipe()
    with subprocess.Popen(
        TRAIN,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        # whatever this test was started with
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads
    ) as child:
        os.close(writer)
        seen = b""
        while b"step 2/2000" not in seen:
            more = os.read(reader, 4096)
            assert more, seen.decode()
            seen += more
        end(child, reader)
        if end is end_by_sigterm_to_all:
            while more := os.read(reader, 4096):
                seen += more
            os.close(reader)
            assert b"error: stopped at step" in seen and b"Traceback" not in seen, seen.decode()
        assert child.wait(60) == code
    assert_saved_where_it_stopped()


def test_a_run_is_saved_when_its_terminal_closes(project: Callable[..., Path]) -> None:
    with Terminal(TRAIN, render_rows_for_long(project)) as terminal:
        terminal.wait_for("step 2/2000")
        terminal.hang_up()
        time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            terminal.program.send_signal(signal.SIGHUP)  # and so does the shell
        assert terminal.program.wait(60) == 143
    assert_saved_where_it_stopped()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_on_resume(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project(max_steps=6)
    steps = "train.eval_strategy=steps train.save_strategy=steps train.eval_steps=1 train.save_steps=1"
    run_steps(overrides=f"run.name=whole {steps}")
    with monkeypatch.context() as patch:
        stop_at(4, signal.SIGINT, patch)
        with pytest.raises(Interrupted):
            run_steps(overrides=steps)
    newest = Path("outputs") / RUN / "checkpoint-4" / "adapter_model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    run_steps(overrides=steps)
    assert "passed over" in capsys.readouterr().err
    assert stamp.require(RUN)["starts"][-1]["from_step"] == 3
    assert same(weights("whole"), weights())


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p): files.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_rerun_of_a_finished_run_says_so_and_changes_no_byte(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project(max_steps=2)
    run_steps()
    before = snapshot(Path("outputs")) | snapshot(Path("adapters"))
    run_steps()
    assert "already finished; nothing was trained" in capsys.readouterr().err
    assert snapshot(Path("outputs")) | snapshot(Path("adapters")) == before


IDENTITY = [
    "train.lr=0.001", "train.seed=1", "train.scheduler=linear", "train.batch_size=2", "train.gradient_accumulation=1",
    "train.packing=false", "train.warmup=0.5", "train.weight_decay=0.1", "train.max_grad_norm=2", "train.max_steps=9",
    "train.optimizer=adamw_torch_fused", "lora.r=8", "lora.alpha=4", "lora.dropout=0.1", "lora.target_modules=[q_proj]",
    "tuning.mode=qlora", "tuning.mode=full", "train.precision=bf16", "render.max_length=100", "render.train_on=all",
    "render.template=chatml", "data.split_seed=1", "train.pack_length=64", "train.epochs=2", "train.early_stopping_patience=3",
]  # fmt: skip


@pytest.mark.slow
def test_each_setting_that_decides_the_loss_curve_is_refused_on_resume_and_named(project: Callable[..., Path]) -> None:
    project(max_steps=2)
    run_steps()
    before = snapshot(Path("outputs")) | snapshot(Path("adapters"))
    for change in IDENTITY:
        with pytest.raises(RefusedError) as caught:
            run_steps(overrides=change)
        assert "then" in caught.value.message and "RUN=" in caught.value.hint, change
    assert snapshot(Path("outputs")) | snapshot(Path("adapters")) == before


@pytest.mark.parametrize(
    "change", ["train.logging_steps=3", "train.save_total_limit=5", "eval.limit=3", "infer.temperature=1"]
)
@pytest.mark.slow
def test_settings_that_do_not_are_accepted_on_resume(
    project: Callable[..., Path], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    project(max_steps=1)
    run_steps()
    run_steps(overrides=change)
    assert "already finished" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_never_refuses_an_existing_run_and_must_refuses_a_new_one(project: Callable[..., Path]) -> None:
    project(max_steps=1)
    with pytest.raises(RefusedError, match="nothing to resume"):
        run_steps("--resume", "must")
    run_steps()
    with pytest.raises(RefusedError, match="exists already"):
        run_steps("--resume", "never")


def test_two_processes_never_train_into_one_run(project: Callable[..., Path]) -> None:
    project(max_steps=1)
    with (
        files.file_lock(Path("outputs") / RUN / ".lock", wait_seconds=0, what="run"),
        pytest.raises(RefusedError, match="in use"),
    ):
        run_steps()


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_with_the_step_and_rows(
    project: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = project(max_steps=3)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DivergedError) as caught:
        run_steps(overrides=f"model.name={broken}")
    assert caught.value.exit_code == 5
    assert "step 1" in caught.value.message and "sums.jsonl:" in caught.value.message
    assert not (folder / "adapters" / RUN).exists()
    assert stamp.require(RUN)["starts"][-1]["ended"].startswith("failed")


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.slow
def test_very_few_rows_train_and_say_that_nothing_is_validated(
    project: Callable[..., Path], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    project(rows=count, max_steps=1)
    run_steps(overrides="data.val_fraction=0")
    assert "no val rows" in capsys.readouterr().err
    assert stamp.require(RUN)["status"] == "finished"


def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(project: Callable[..., Path]) -> None:
    from importlib.util import find_spec

    if find_spec("trackio"):
        pytest.skip("trackio is installed here")
    project(max_steps=1)
    with pytest.raises(MachineError, match="trackio is not installed") as caught:
        run_steps(overrides="tracking.report_to=[tensorboard,trackio]")
    assert "EXTRAS=trackio" in caught.value.hint


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "gsm8k_test.jsonl", "glaive_toolcall_en_demo.json"])
@pytest.mark.slow
def test_real_data_sets_dropped_into_data_raw_train_for_20_steps(project: Callable[..., Path], name: str) -> None:
    """Data that no one here wrote, if it lies beside the repository: every row is accounted for and learnt from."""
    shared = files.REPO_ROOT.parent / "shared" / "data" / name
    if not shared.is_file():
        pytest.skip(f"{shared} is not here")
    folder = project()
    (folder / "data" / "raw" / "sums.jsonl").unlink()
    (folder / "data" / "raw" / name).write_bytes(shared.read_bytes())
    run_steps(
        overrides="data.raw=data/raw render.max_length=1024 train.max_steps=20 train.gradient_accumulation=1 "
        "train.eval_strategy=no train.save_strategy=no"
    )
    for step in ("processed", "rendered"):
        counts = json.loads((folder / "data" / step / "raw" / "manifest.json").read_text())
        assert counts["rows_in"] == counts["rows_out"] + counts["rejected"] + counts.get("duplicates", 0)
        assert counts["rows_in"] > 250 and counts["rejected"] <= 0.15 * counts["rows_in"]
    assert stamp.require("tiny-raw")["result"]["steps"] == 20


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_the_best_checkpoint_is_exported(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project(epochs=30, learning_rate=0.5, scheduler="constant", early_stopping_patience=2)
    run_steps()
    evals = [entry["eval_loss"] for entry in metrics() if "eval_loss" in entry]
    assert len(evals) < 30 and "early stop" in capsys.readouterr().err
    from safetensors.torch import load_file

    result = stamp.require(RUN)["result"]
    assert result["best_eval_loss"] == min(evals) and "checkpoint-" in result["kept"]
    assert same(weights(), load_file(Path(result["kept"]) / "adapter_model.safetensors"))


@pytest.mark.slow
def test_unsloth_that_is_not_there_falls_back_aloud_and_is_stamped_truthfully(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.util import find_spec

    if find_spec("unsloth"):
        pytest.skip("Unsloth is installed here")
    project(max_steps=3)
    run_steps(overrides="run.name=direct")
    run_steps(overrides="run.name=fallen tuning.backend=unsloth")
    facts = stamp.require("fallen")["backend"]
    assert (facts["requested"], facts["actual"]) == ("unsloth", "bitsandbytes")
    assert "not installed" in facts["fallback_reason"]
    assert "make install EXTRAS=unsloth" in capsys.readouterr().err
    assert losses("fallen") == losses("direct") and same(weights("fallen"), weights("direct"))
    with pytest.raises(MachineError):
        run_steps(overrides="run.name=never tuning.backend=unsloth tuning.fallback=never")
    assert not (Path("outputs") / "never" / "backend.json").exists()


def test_train_without_rendered_rows_or_with_older_ones_says_what_to_run(project: Callable[..., Path]) -> None:
    folder = project(max_steps=1)
    arguments = train.build_parser().parse_args(["--config", "tiny.yaml"])
    with pytest.raises(UserError, match="no processed rows"):
        train.work(arguments, load_config("tiny.yaml"))
    run_steps()
    with (folder / "data/processed/sums/train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "x", "messages": [], "source": {"file": "f", "line": 1}}) + "\n")
    with pytest.raises(UserError, match="older than its inputs"):
        train.work(arguments, load_config("tiny.yaml"))


def test_no_token_of_the_environment_reaches_any_file_of_the_run(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "S3cr3t" * 5
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    project(max_steps=1)
    run_steps()
    leaks = [
        p
        for top in ("outputs", "adapters", "data")
        for p in Path(top).rglob("*")
        if p.is_file() and secret.encode() in p.read_bytes()
    ]
    assert leaks == []


def mounted(folder: Path, size: str) -> bool:
    folder.mkdir(exist_ok=True)
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )


ROOM = [0, 4 << 10, 64 << 10, 512 << 10, 2 << 20, 7 << 20, 13 << 20, 18 << 20]  # bytes; a checkpoint takes 19 MiB


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_the_last_checkpoint_resumes_once_there_is_room(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project(max_steps=3)
    steps = "tuning.mode=full train.eval_strategy=steps train.save_strategy=steps train.eval_steps=1 train.save_steps=1"
    if not mounted(folder / "outputs", "400m"):
        pytest.skip("a small file system cannot be mounted here")
    filler, original = folder / "outputs" / "filler", callbacks.Report.on_step_begin
    room: int | None = None

    def begin(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        original(self, args, state, control, **options)
        if room is not None and state.global_step == 1:
            filler.write_bytes(b"0" * (shutil.disk_usage(folder / "outputs").free - room))

    monkeypatch.setattr(callbacks.Report, "on_step_begin", begin)
    try:
        run_steps(overrides=f"run.name=whole {steps}")
        for number, room in enumerate(ROOM):
            run = folder / "outputs" / f"r{number}"
            with pytest.raises(MachineError, match="the disk is full") as caught:
                run_steps(overrides=f"run.name={run.name} {steps}")
            assert str(run) in caught.value.message and "bytes" in caught.value.message, room
            assert caught.value.exit_code == 4 and caught.value.hint
            kept = checkpoints.listed(run)
            assert [path.name for path in kept] == ["checkpoint-1"] and checkpoints.damage(kept[0]) is None, room
            filler.unlink()
            room = None
            run_steps(overrides=f"run.name={run.name} {steps}")
            assert stamp.require(run.name)["starts"][-1]["from_step"] == 1
            weights = "model.safetensors"
            assert files.sha256_file(Path("adapters") / run.name / weights) == files.sha256_file(
                Path("adapters/whole") / weights
            )
            shutil.rmtree(run)
    finally:
        subprocess.run(["umount", "-l", str(folder / "outputs")])


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_said_before_the_first_step(project: Callable[..., Path]) -> None:
    folder = project(max_steps=3)
    if not mounted(folder / "outputs", "50m"):
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(MachineError, match=r"this run will need about [\d,]+ bytes, [\d,]+ are free") as caught:
            run_steps(overrides="tuning.mode=full")
        assert caught.value.exit_code == 4 and "save_total_limit" in caught.value.hint
        assert not losses() if (Path("outputs") / RUN / "metrics.jsonl").exists() else True
        assert not list((folder / "outputs" / RUN).glob(".checkpoint*"))
    finally:
        subprocess.run(["umount", "-l", str(folder / "outputs")])


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the trial save itself is made to fail as a read-only folder would."""
    from scripts.utils import adapters

    def refuse(model: Any, folder: Path, whole: Any = None) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    project(max_steps=3)
    monkeypatch.setattr(adapters, "save_weights", refuse)
    with pytest.raises(MachineError, match="no permission to write") as caught:
        run_steps()
    assert caught.value.exit_code == 4 and not (Path("outputs") / RUN / "metrics.jsonl").exists()


def test_the_stamp_is_printed_for_people(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    project(max_steps=1)
    run_steps()
    capsys.readouterr()
    train.work(train.build_parser().parse_args(["--show-stamp", RUN]), load_config("tiny.yaml"))
    shown = capsys.readouterr().out
    for words in ("bitsandbytes", "fp32", "lora, r 4, alpha 8", "20 train rows", "finished", "backend.json", "torch "):
        assert words in shown, words


def test_settings_that_need_val_rows_are_refused_without_them_before_a_model_loads(
    project: Callable[..., Path],
) -> None:
    project(rows=1, max_steps=1)
    for words in ("train.load_best_model_at_end=true", "train.early_stopping_patience=2"):
        with pytest.raises(UserError, match="val rows") as caught:
            run_steps(overrides=words)
        assert "load_best_model_at_end: auto" in caught.value.hint
        assert not (Path("outputs") / RUN / "backend.json").exists()
