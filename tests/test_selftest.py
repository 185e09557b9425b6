"""selftest: says equal where the ways are, and which is not where one was broken."""

from pathlib import Path

import pytest

from scripts import selftest
from scripts.utils import attention, environment
from tests.commands import script


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: {tiny_model}}}\ntuning: {{mode: lora}}\ntrain: {{precision: fp32}}\n")
    return path


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_every_way_is_equal_on_a_good_model(mode: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--config", str(config), "--set", f"tuning.mode={mode}"]) == 0
    assert capsys.readouterr().out.count("equal") == (4 if mode == "full" else 5)


@pytest.mark.parametrize(("mode", "said"), [("lora", True), ("full", False)])
def test_in_16_bit_it_says_how_to_see_more_digits(
    mode: str, said: bool, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main(["--config", str(config), "--set", f"tuning.mode={mode} train.precision=bf16"]) == 0
    assert ("rounding of bf16" in capsys.readouterr().err) is said, "full tuning compares in fp32, as its weights are"


def test_a_segment_that_sees_its_neighbour_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attention._forward
    monkeypatch.setattr(
        attention, "_forward",
        lambda *a, segments, **o: real(*a, segments=[(0, max(s[1] for s in segments), 0, 0)], **o),
    )  # fmt: skip
    assert selftest.main(["--config", str(config)]) == 4
    said = capsys.readouterr()
    assert "packed = one at a time" in said.err and "loss in chunks" not in said.err
    assert said.out.count("DIFFERENT") == 3


def test_unsloth_is_told_what_to_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--config", str(config), "--set", "tuning.backend=unsloth"]) == 2
    assert "tuning.backend=bitsandbytes" in capsys.readouterr().err


def test_help_shows_how(config: Path) -> None:
    assert "make selftest" in script("selftest", "--help", cwd=config.parent).stdout
