"""Precision is resolved against the hardware, tested without a GPU by feeding capabilities in."""

from pathlib import Path

import pytest

from scripts.utils import hardware
from scripts.utils.errors import MachineError
from scripts.utils.hardware import Hardware, best_precision, choose_precision, nvidia, supported
from scripts.utils.schema import Config

GIB = 2**30
PASCAL = Hardware("cuda", "GTX 1080", 8 * GIB, (6, 1))
TURING = Hardware("cuda", "RTX 2060", 6 * GIB, (7, 5))
AMPERE = Hardware("cuda", "RTX 3060", 12 * GIB, (8, 6))
ADA = Hardware("cuda", "RTX 4060", 8 * GIB, (8, 9))
HOPPER = Hardware("cuda", "H100", 80 * GIB, (9, 0))
BLACKWELL = Hardware("cuda", "RTX 5060", 8 * GIB, (12, 0))
MAXWELL = Hardware("cuda", "GTX 960", 4 * GIB, (5, 2))
MPS = Hardware("mps", "Apple M3", 16 * GIB)
CPU = Hardware("cpu", "old CPU", 16 * GIB)
CPU_BF16 = Hardware("cpu", "new CPU", 16 * GIB, cpu_bf16_faster=True)


def training(**train: object) -> Config:
    return Config(train=train)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "auto"),
    [
        (MAXWELL, "fp32"),
        (PASCAL, "fp16"),
        (TURING, "fp16"),
        (AMPERE, "bf16"),
        (ADA, "bf16"),
        (HOPPER, "bf16"),
        (BLACKWELL, "bf16"),
        (MPS, "bf16"),
        (CPU, "fp32"),
        (CPU_BF16, "bf16"),
    ],
)
def test_auto_takes_what_each_generation_does_best(machine: Hardware, auto: str) -> None:
    assert best_precision(machine)[0] == auto
    choice = choose_precision(Config(), machine)
    assert (choice.requested, choice.actual, choice.changed) == ("auto", auto, False)


def test_auto_stays_with_the_precision_that_the_run_began_with() -> None:
    assert choose_precision(Config(), CPU, "bf16").actual == "bf16"
    assert choose_precision(Config(), CPU_BF16, "fp32").actual == "fp32", "begun before this CPU was measured"
    assert "train.precision: fp32" in choose_precision(Config(), CPU_BF16).why
    assert choose_precision(Config(), TURING, "bf16").actual == "fp16", "a card that lacks it"
    assert choose_precision(training(precision="fp32"), CPU, "bf16").actual == "fp32", "asked for by name"


def test_full_tuning_stays_exact_on_a_cpu() -> None:
    full = Config(tuning={"mode": "full"})  # type: ignore[arg-type]
    assert choose_precision(full, CPU_BF16).actual == "fp32" and choose_precision(full, AMPERE).actual == "bf16"


def test_precision_and_threads_are_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cache, before = tmp_path / "cpu.json", torch.get_num_threads()
    monkeypatch.setattr(hardware, "thread_counts", lambda: [2, 1])
    # two threads that hold each other up, as on one core's two halves
    times = {2: {"fp32": 1.0, "bf16": 0.9}, 1: {"fp32": 0.8, "bf16": 0.4}}
    monkeypatch.setattr(hardware, "_multiply_seconds", lambda: times[torch.get_num_threads()])
    assert hardware.measure_cpu(cache) == hardware.MeasuredCpu(threads=1, bf16_faster=True)
    times[1] = {"fp32": 9.0, "bf16": 9.0}
    assert hardware.measure_cpu(cache) == hardware.MeasuredCpu(threads=1, bf16_faster=True), "kept"
    for damaged in ("[broken", "[]", "{}"):
        cache.write_text(damaged)
        assert hardware.measure_cpu(cache) == hardware.MeasuredCpu(threads=2, bf16_faster=False), "measured again"
    assert hardware.measure_cpu(tmp_path / "no folder" / "cpu.json").threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    times[before] = {"fp32": 1.0, "bf16": 1.0}
    assert hardware.measure_cpu(cache).threads == before, "as asked for"
    assert torch.get_num_threads() == before


def test_threads_to_try_are_never_more_than_this_process_may_use() -> None:
    from scripts.utils import workers

    counts = hardware.thread_counts()
    assert counts == sorted(counts, reverse=True) and 1 <= counts[-1] <= counts[0] <= workers.cores()


@pytest.mark.parametrize(
    ("train", "machine", "actual", "changed"),
    [
        ({"fp16": True}, ADA, "fp16", False),
        ({"bf16": True}, ADA, "bf16", False),
        ({"bf16": True}, TURING, "fp16", True),
        ({"fp16": True}, CPU, "fp32", True),
        ({"bf16": True}, CPU, "bf16", False),
        ({"bf16": True, "fp16": True}, ADA, "bf16", True),
        ({"bf16": True, "fp16": True}, TURING, "fp16", True),
        ({"fp16": True}, MPS, "bf16", True),
        ({"precision": "fp32"}, ADA, "fp32", False),
        ({"precision": "bf16"}, PASCAL, "fp16", True),
        ({"bf16": False, "fp16": False}, ADA, "bf16", False),
    ],
)
def test_what_was_asked_for_is_kept_where_it_runs_and_replaced_aloud_where_not(
    train: dict[str, object], machine: Hardware, actual: str, changed: bool
) -> None:
    choice = choose_precision(training(**train), machine)
    assert (choice.actual, choice.changed) == (actual, changed)
    assert choice.why


def test_a_replacement_names_both_precisions() -> None:
    choice = choose_precision(training(bf16=True), TURING)
    assert choice.requested == "bf16" and "Ampere" in choice.why


@pytest.mark.parametrize("train", [{"bf16": True}, {"bf16": True, "fp16": True}])
def test_strict_refuses_instead_of_replacing(train: dict[str, bool]) -> None:
    with pytest.raises(MachineError):
        choose_precision(training(precision_strict=True, **train), TURING)  # type: ignore[arg-type]


def test_every_answer_comes_with_a_reason() -> None:
    assert all(supported(p, m)[1] for p in ("bf16", "fp16", "fp32") for m in (PASCAL, ADA, MPS, CPU))  # type: ignore[arg-type]


def test_name_and_driver_of_the_cards_are_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for nvidia-smi, which prints what the real one prints."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia("name", "driver_version") == ""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=name,driver_version ] && echo "NVIDIA GeForce RTX 4060, 580.65.06"\n'
    )
    tool.chmod(0o755)
    assert nvidia("name", "driver_version") == "NVIDIA GeForce RTX 4060, 580.65.06"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert nvidia("name", "driver_version") == ""
