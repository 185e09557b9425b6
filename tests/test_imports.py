"""What a command imports is what its user waits for: the whole of torch and more, or a tokenizer."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.utils import backends, environment
from tests import commands

COSTLY = ("torch", "bitsandbytes", "sklearn", "scipy", "datasets", "pandas", "deepspeed")


def imported(script: str, *words: str, cwd: Path) -> set[str]:
    """The packages that a command imports, by Python's own account; the command must end well."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(commands.ROOT / "scripts" / f"{script}.py"), *words],
        cwd=cwd,
        env=commands.environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 0, said[-5:]
    assert not any("PyTorch was not found" in line for line in said)
    names = [line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")]
    # an import that fails has its line too: what was really imported has parts
    return {name.split(".")[0] for name in names if "." in name}


@pytest.mark.parametrize("script", ["render", "inspect_row"])
def test_a_step_that_needs_a_tokenizer_imports_no_torch(project: Callable[..., Path], script: str) -> None:
    folder = project()
    for step in ["process", "render"] if script != "render" else ["process"]:
        assert commands.script(step, "--config", "tiny.yaml", cwd=folder).returncode == 0
    assert imported(script, "--config", "tiny.yaml", cwd=folder).isdisjoint(COSTLY)


def test_training_imports_nothing_that_it_does_not_use(project: Callable[..., Path]) -> None:
    folder = project()
    for step in ("process", "render"):
        assert commands.script(step, "--config", "tiny.yaml", cwd=folder).returncode == 0
    packages = imported("train", "--config", "tiny.yaml", cwd=folder)
    assert "torch" in packages
    assert packages.isdisjoint(set(COSTLY) - {"torch"})


@pytest.mark.parametrize("quantised", [False, True])
def test_weights_that_are_quantised_already_keep_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}} if quantised else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(environment, "_alone", True)
    backends.spare_bitsandbytes(tmp_path)
    assert ("bitsandbytes" in sys.modules) is not quantised
    sys.modules.pop("bitsandbytes", None)  # monkeypatch puts back what was there before
