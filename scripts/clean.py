"""Remove what can be made again, and say what: caches, derived data, runs that came to nothing.

Never data/raw, adapters, finished runs, or a run that is going on. An interrupted run that can be resumed is kept
too (FORCE=1 removes it). With --all everything the steps made goes, after a question.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files
from scripts.utils.errors import UserError

DERIVED = ("data/processed", "data/processed_with_style", "data/rendered")
CACHES = (
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    ".coverage",
    "build",
    "dist",
    ".cache/quick_start",
    "outputs/leaderboard.csv",
    "outputs/leaderboard.html",
)
BYTECODE = ("scripts", "tests")
TRACKIO = Path("outputs/.trackio")  # its record of all runs


def contents(folder: Path) -> list[Path]:
    """What lies in ``folder``, but for the .gitkeep that git holds it by."""
    return sorted(p for p in folder.iterdir() if p.name != ".gitkeep") if folder.is_dir() else []


def removable() -> Iterator[Path]:
    """Caches and derived data; all of it comes back by running the steps again."""
    for name in CACHES:
        if Path(name).exists():
            yield Path(name)
    for name in BYTECODE:
        yield from sorted(Path(name).rglob("__pycache__"))
    yield from sorted(Path().glob("*.egg-info"))
    for name in DERIVED:
        yield from marked(Path(name), "manifest.json")


def marked(folder: Path, marker: str) -> Iterator[Path]:
    """What the steps made in ``folder``: it carries their marker, or is what a killed step left half made."""
    for path in contents(folder):
        if (path.name.startswith(".") and path.suffix in (".new", ".old")) or (path / marker).is_file():
            yield path
        elif path.is_dir() and any(path.iterdir()):
            console.note("clean", f"kept {path}: it has no {marker}, so no step made it")


def runs() -> list[Path]:
    """Folders in outputs/ that a run made; what a person put there stays."""
    marks = (".lock", "backend.json", "batch.log")
    return [
        path for path in contents(Path("outputs")) if path.is_dir() and any((path / mark).exists() for mark in marks)
    ]


def why_kept(run: Path, *, force: bool) -> str:
    """Why this run must stay, or an empty text."""
    if _is_locked(run / ".lock"):
        return "it is going on"
    status = ""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run / "backend.json").read_text(encoding="utf-8")).get("status", "")
    if status == "finished":
        return "it is finished"
    if any(run.glob("checkpoint-*")) and not force:
        return "it can be resumed; FORCE=1 removes it"
    return ""


def _is_locked(path: Path) -> bool:
    import fcntl

    try:
        with path.open("a+") if path.exists() else contextlib.nullcontext() as file:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def size_of(path: Path) -> int:
    """Bytes in a file or folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir() or entry.is_symlink())


def remove(path: Path) -> None:
    with files.disk_errors(path):
        # a link goes, what it points at stays
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def confirm(paths: Sequence[Path], yes: bool) -> bool:
    total = sum(map(size_of, paths))
    for path in paths:
        console.result(f"  {path}  {console.size(size_of(path))}")
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            "make clean-all asks first, and there is no terminal to ask on", "YES=1 answers; nothing was removed"
        )
    answer = input(f"Remove all this, {console.size(total)}? Adapters and trained models do not come back. [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def work(arguments: argparse.Namespace) -> None:
    paths = list(removable())
    for run in runs():
        reason = why_kept(run, force=arguments.force or arguments.all)
        if reason and not (arguments.all and reason == "it is finished"):
            console.note("clean", f"kept {run}: {reason}")
        else:
            paths.append(run)
    if arguments.all:
        paths += [
            *marked(Path("adapters"), "sft-adapter.json"),
            *marked(Path("outputs/sweeps"), "sweep.json"),
            *([TRACKIO] if TRACKIO.is_dir() else []),
            *(p for p in contents(Path(".cache")) if p not in paths),
        ]
        if paths and not confirm(paths, arguments.yes):
            console.note("clean", "nothing was removed")
            return
    total = 0
    for path in paths:
        total += size_of(path)
        remove(path)
        if not arguments.all:
            console.result(f"removed {path}")
    console.result(f"clean: {len(paths)} removed, {console.size(total)}" if paths else "clean: nothing to remove")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-clean",
        description=__doc__,
        epilog="examples:\n  make clean\n  make clean-all YES=1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--all", action="store_true", help="finished runs, adapters and downloaded models too; asks first"
    )
    parser.add_argument(
        "--yes", action="store_true", default=command.truthy(command.from_make("YES")), help="do not ask"
    )
    command.add_force(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-clean", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
