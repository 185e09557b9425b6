"""Running the project's commands from tests, free of what the caller's own make has put into the environment."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MAKE_VARIABLES = {
    *(ROOT / "Makefile").read_text().replace("\\\n", " ").split("\nVARIABLES := ")[1].split("\n")[0].split(),
    *("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"),
}


def environment(**extra: str) -> dict[str, str]:
    """The environment less make's and the project's variables; this Python's environment counts as the active one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SFT_") and k not in _MAKE_VARIABLES}
    return {**kept, "VIRTUAL_ENV": sys.prefix, "NO_COLOR": "1", **extra}


def run(words: Sequence[str | Path], cwd: Path, timeout: int = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run to the end without a terminal, output captured; ``extra`` are environment variables."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def script(name: str, *words: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, ROOT / "scripts" / f"{name}.py", *words], cwd, **extra)
