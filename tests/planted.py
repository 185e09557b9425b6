"""Faults planted for the doctor: an environment that lacks or damages a package, a card that is not here, a full disk."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.commands import ROOT, run

Outer = dict[str, Path]


def outer_packages() -> Outer:
    """What lies in this environment's site-packages, by name."""
    folders = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    return {path.name: path for folder in folders for path in folder.iterdir() if path.name != "__pycache__"}


class Environment:
    """A virtual environment that holds this one's packages as links, so that one of them can be taken out or damaged."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", folder], check=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python3*/site-packages")
        for name, path in outer_packages().items():
            (self.site / name).symlink_to(path)

    def without(self, *packages: str) -> None:
        for package in packages:
            # pip leaves an .egg-info of what it builds without a wheel
            for path in [
                self.site / package,
                *self.site.glob(f"{package}-*.dist-info"),
                *self.site.glob(f"{package}-*.egg-info"),
            ]:
                path.unlink(missing_ok=True)

    def as_version(self, package: str, version: str) -> None:
        (link,) = self.site.glob(f"{package}-*.dist-info")
        copy = self.site / f"{package}-{version}.dist-info"
        shutil.copytree(link.resolve(), copy)
        link.unlink()
        text = re.sub(r"^Version: .*$", f"Version: {version}", (copy / "METADATA").read_text(), count=1, flags=re.M)
        (copy / "METADATA").write_text(text)

    def with_file(self, package: str, name: str, content: str | bytes) -> None:
        """The package with another content in one of its files; the others stay links."""
        folder = self.site / package
        if folder.is_symlink():
            real = folder.resolve()
            folder.unlink()
            folder.mkdir()
            for path in real.iterdir():
                (folder / path.name).symlink_to(path)
        (folder / name).unlink()
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def asked_for(self, extras: str) -> None:
        """As env/install.sh notes it."""
        (self.folder / ".sft-play-installed").write_text(f"state\n{extras}\ncpu\n")


def nvidia_smi(folder: Path, *, driver: str = "580.95.05", fails: bool = False) -> Path:
    """A folder for the PATH in which nvidia-smi tells of a card."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    card = "NVIDIA GeForce RTX 4060"
    lines = f'case "$*" in\n  *driver_version*) echo "{card}, {driver}" ;;\n  *) echo "{card}" ;;\nesac\n'
    program.write_text("#!/bin/sh\n" + ("echo 'has failed' >&2\nexit 9\n" if fails else lines))
    program.chmod(0o755)
    return folder


def in_namespace(prepare: str) -> Callable[[list[str]], list[str]] | None:
    """Words that run a command after ``prepare`` (mounts) in a namespace of its own; None where that is not allowed."""
    allowed = (
        subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
        if shutil.which("unshare")
        else False
    )
    if not allowed:
        return None
    return lambda words: ["unshare", "-rm", "bash", "-c", f'{prepare} && exec "$@"', "bash", *words]


def check(
    *words: str, cwd: Path, python: Path | str = sys.executable, before: Callable[..., Any] | None = None, **extra: str
) -> "Checked":
    """Run the real command with --json."""
    command = [str(python), str(ROOT / "scripts" / "check.py"), "--json", *words]
    done = run(before(command) if before else command, cwd, **extra)
    assert done.stdout.lstrip().startswith("{"), done.stdout + done.stderr
    return Checked(done.returncode, json.loads(done.stdout), done.stderr)


class Checked:
    def __init__(self, code: int, told: dict[str, Any], stderr: str) -> None:
        self.code, self.told, self.stderr = code, told, stderr
        self.findings: list[dict[str, Any]] = told["findings"]
        self.named = {finding["name"]: finding for finding in self.findings if finding["name"] != "ok"}

    def mend(self, name: str) -> str:
        assert name in self.named, sorted(self.named)
        return str(self.named[name]["hint"])

    def state(self, topic: str) -> list[str]:
        return [finding["state"] for finding in self.findings if finding["topic"] == topic]
