"""Is this machine ready for the config? Python, packages, device, memory, disk, config, backend, data: each line tells.

Exit code: 0 nothing stands in the way · 2 the config or the data does · 4 this machine does.
Works before anything is installed, and says then what is missing.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    # before the project is imported: an older Python cannot even read it
    print(
        f"error: this is Python {platform.python_version()} ({sys.executable}), 3.11 to 3.13 are supported",
        file=sys.stderr,
    )
    print("hint: install one of them, then: make install PYTHON=/path/to/it\nsft-check: exit code 4", file=sys.stderr)
    raise SystemExit(4)

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, environment, files
from scripts.utils.errors import MachineError, SFTError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

DISK_NEEDED, DISK_WANTED = 2 * 2**30, 5 * 2**30  # bytes
MEMORY_WANTED = 3 * 2**30
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Finding:
    """One line: ``code`` is 0, or the exit code that this fault means; a warning stops nothing."""

    topic: str
    text: str
    code: int = 0
    hint: str = ""
    warning: bool = False

    @property
    def state(self) -> str:
        return "failed" if self.code else "warning" if self.warning else "ok"


def pinned_versions(path: Path) -> dict[str, str]:
    """Exact versions in a constraints file, by normalised name, for the Python and system that run now."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                versions[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return versions


def check_packages(root: Path) -> Iterator[Finding]:
    import tomllib

    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    missing = [name for name in map(_name, declared) if _installed(name) is None and not _passed_over(name)]
    if missing:
        yield Finding("packages", f"not installed: {', '.join(missing)}", 4, "run: make install")
        return
    from packaging.requirements import Requirement

    for text in declared:
        requirement = Requirement(text)
        have = _installed(requirement.name)
        if have and not requirement.specifier.contains(have, prereleases=True):
            yield Finding(
                "packages",
                f"{requirement.name} {have} is installed, {requirement.specifier} is needed",
                4,
                "run: make install",
            )
    pinned = pinned_versions(root / "env" / "constraints.txt")
    other = [
        f"{name} {have} (not {version})"
        for name, version in pinned.items()
        # a local part (torch's +cpu) is the same version built otherwise
        if (have := _installed(name)) and have.partition("+")[0] != version
    ]
    if other:
        yield Finding(
            "packages", f"other versions than were tried: {', '.join(other)}", hint="run: make install", warning=True
        )
    else:
        yield Finding("packages", "all installed, in the versions of env/constraints.txt")


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _passed_over(name: str) -> bool:
    return name == "bitsandbytes" and sys.platform == "darwin"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_device() -> Iterator[Finding]:
    from scripts.utils import hardware

    try:
        machine = hardware.detect()
    except ImportError as error:
        yield Finding("device", f"torch does not load: {error}", 4, "run: make install")
        return
    precision, why = hardware.best_precision(machine)
    yield Finding("device", f"{machine.device}: {machine.name}, {console.size(machine.memory)}; {precision} ({why})")
    if machine.device == "cpu" and shutil.which("nvidia-smi"):
        hint = "make install TORCH=auto on the machine with the GPU, and check that nvidia-smi works"
        yield Finding("device", "nvidia-smi is here, but torch finds no GPU", hint=hint, warning=True)


def check_space(here: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(here).free
    text = f"{console.size(free)} free in {here}"
    if free < DISK_NEEDED:
        yield Finding("disk", f"{text}; {console.size(DISK_NEEDED)} are needed", 4, "free some space: make clean")
    else:
        yield Finding("disk", text, hint="a model from the hub may need more", warning=free < DISK_WANTED)
    if _installed("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        text = f"{console.size(memory.available)} of {console.size(memory.total)} free"
        yield Finding(
            "memory",
            text,
            hint="close other programs, or choose a small model",
            warning=memory.available < MEMORY_WANTED,
        )


def check_config(path: str, overrides: str) -> Iterator[Finding]:
    from scripts.utils import sources
    from scripts.utils.config import load_config

    try:
        flags = {
            "data.raw": command.from_make("RAW"),
            "model.name": command.from_make("MODEL"),
            "run.name": command.from_make("RUN"),
        }
        config = load_config(path, overrides, flags)
    except SFTError as problem:
        yield Finding("config", problem.message, problem.exit_code, problem.hint)
        return
    yield Finding("config", f"{path}: {config.model.name}, {config.tuning.mode} with {config.tuning.backend}")
    yield from check_backend(config)
    try:
        found, warnings = sources.find(config.data)
    except SFTError as problem:
        yield Finding("data", problem.message, problem.exit_code, problem.hint)
        return
    paths = [path for source in found for path in source.paths]
    for text in warnings:
        yield Finding("data", text, warning=True)
    yield Finding(
        "data",
        f"{len(paths)} files, {console.size(sum(p.stat().st_size for p in paths))}: {', '.join(map(str, paths[:5]))}",
    )


def check_backend(config: Config) -> Iterator[Finding]:
    """Which backend will run, with which attention, and why. Unsloth is tried afresh, which renews train's cache."""
    from scripts.utils import backend_choice, backends, hardware, model_store, unsloth_probe

    model = model_store.present(config.model.name, config.model.revision)
    if model is None:
        text = f"{config.tuning.backend}; its attention is known once {config.model.name} is on this disk"
        yield Finding("backend", text, hint="run: make download-model", warning=config.tuning.backend == "unsloth")
        return
    why = f"model.attention is {config.model.attention}"
    if config.tuning.backend == "unsloth":
        found = unsloth_probe.verdict(config, model, fresh=True)
        if found.works:
            slow = "; on a CPU it is no faster than bitsandbytes" if hardware.detect().device == "cpu" else ""
            yield Finding("backend", f"unsloth: {found.tried} works in {found.precision}{slow}")
            yield Finding(
                "backend", f"attention {found.attention or 'of its choice'}: xformers {found.xformers}; {why}"
            )
            return
        never = config.tuning.fallback == "never"
        text = f"Unsloth was asked for, but {found.reason}; {'nothing' if never else 'bitsandbytes'} will run"
        yield Finding("backend", text, 4 if never else 0, backend_choice.remedy(found), warning=True)
        if never:
            return
    try:
        attention = backends.attention_in_transformers(model, config.model.attention)
    except (ValueError, ImportError, OSError) as error:
        hint = "model.attention: auto takes what is there"
        yield Finding("backend", f"{config.model.name}: {str(error).splitlines()[0]}", 4, hint)
        return
    chosen = "what transformers takes for this model" if config.model.attention == "auto" else why
    yield Finding("backend", f"bitsandbytes, attention {attention}: {chosen}")


def findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    ready = True
    for finding in check_packages(files.REPO_ROOT):
        ready = ready and finding.code == 0
        yield finding
    yield from check_space(Path.cwd())
    if ready:
        yield from check_device()
        yield from check_config(arguments.config, arguments.set)


def work(arguments: argparse.Namespace) -> None:
    environment.prepare(files.REPO_ROOT)
    codes = set()
    for finding in findings(arguments):
        codes.add(finding.code)
        console.result(
            f"{console.paint(finding.state.ljust(8), COLOURS[finding.state], sys.stdout)} {finding.topic.ljust(9)} {finding.text}"
        )
        if finding.hint and finding.state != "ok":
            console.result(f"{'':8} {'':9} hint: {finding.hint}")
    # what the machine lacks is mended first
    if 4 in codes:
        raise MachineError(
            "this machine is not ready (see above)", "mend the lines that begin with failed, then: make check"
        )
    if codes - {0}:
        raise UserError(
            "the config or the data is not ready (see above)", "mend the lines that begin with failed, then: make check"
        )


def build_parser() -> argparse.ArgumentParser:
    return command.new_parser("check", str(__doc__), ["make check CONFIG=configs/quickstart.yaml RAW=data/sample"])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-check", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
