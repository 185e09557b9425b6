"""Fixtures that several test files share."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from scripts.utils import stop_signals

# how fast an example runs depends on the machine's other work, and how many of the first ones fit on chance: neither says
# that the code is wrong. Fixtures that a test shares among its examples are written for it
settings.register_profile(
    "steady",
    deadline=None,
    derandomize=bool(
        os.environ.get("CI")
    ),  # a gate that passed once passes again; elsewhere new examples are looked for
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
settings.load_profile("steady")

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that `make test`, which runs two files at a time, ends on short ones."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "e2e", item.path.name != "test_torture.py", -slow[item.path]))


@pytest.fixture(autouse=True)
def _no_make_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests started by make must not inherit the variables that make hands over."""
    for name in [
        name for name in os.environ if name.startswith("SFT_") and name not in ("SFT_MODEL_CACHE", "SFT_ENV_PYTHON")
    ]:
        monkeypatch.delenv(name)
    yield


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """Commands set handlers; a test that runs one in this process must not leave them to the next."""
    before = {number: signal.getsignal(number) for number in stop_signals.ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: a tiny random Llama with the real SmolLM2 tokenizer and template."""
    from tests.tiny_models import smollm2_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    smollm2_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a working folder with raw rows and a config for the tiny model; the current folder moves there."""

    def make(rows: int = 24, **train: Any) -> Path:
        raw = tmp_path / "data" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        lines = [{"question": f"How much is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(rows)]
        (raw / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {
            "epochs": 1,
            "gradient_accumulation": 2,
            "learning_rate": 0.003,
            "logging_steps": 1,
            "precision": "fp32",
            "self_test": False,  # a second process a run; tests/test_export.py has it on
            **train,
        }
        config = {
            "model": {"name": str(tiny_model)},
            "data": {"raw": "data/raw/sums.jsonl"},
            "render": {"max_length": 128},
            "tuning": {"mode": "lora"},
            "lora": {"r": 4, "alpha": 8},
            "train": settings,
        }
        (tmp_path / "tiny.yaml").write_text(json.dumps(config))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make
