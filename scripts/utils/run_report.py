"""outputs/<run>/report.html: gathers what a run left, and writes the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.utils import files, run_report_curves, stages, stamp
from scripts.utils.errors import RefusedError
from scripts.utils.run_report_page import Material, build


def path_of(run: str) -> Path:
    return stamp.run_folder(run) / "report.html"


def write(run: str) -> Path:
    """Write the report of ``run``, whatever it has so far, and return its path.

    Raises ``UserError`` where there is no such run, ``RefusedError`` where its files are damaged; an earlier report stays then.
    """
    page = build(gather(run))
    # a lone surrogate, which no file can hold, becomes a question mark
    files.write_text(path_of(run), page.encode("utf-8", "replace").decode())
    return path_of(run)


def ensure(run: str) -> Path:
    """The report of ``run``, written anew only where something that it is made of is newer."""
    path = path_of(run)
    if path.is_file() and path.stat().st_mtime > max(part.stat().st_mtime for part in _sources(run)):
        return path
    return write(run)


def _sources(run: str) -> Iterator[Path]:
    folder = stamp.run_folder(run)
    yield from run_report_curves.event_files(folder)
    named = ("backend.json", "config.yaml", "metrics.jsonl", "eval/metrics.json", "eval/samples.jsonl")
    yield from (folder / name for name in named if (folder / name).is_file())


def gather(run: str) -> Material:
    """What the run has: its stamp and curves always, its evaluation where there is one."""
    folder, facts = stamp.run_folder(run), stamp.require(run)
    problems: list[str] = []
    found = _evaluation(run)
    rows = list(_samples(folder / "eval", found, problems)) if found else []
    adapter = stamp.adapter_folder(run)
    there = any(adapter.glob("*.safetensors"))
    if facts["status"] == "finished" and not there:
        problems.append(f"{adapter} holds no weights any more: the run can be read, not used")
    config = folder / "config.yaml"
    return Material(
        stamp=facts,
        curves=run_report_curves.read(folder),
        adapter=str(adapter) if there else "",
        made=stamp.now(),
        config=str(stamp.without_secrets(config.read_text(encoding="utf-8", errors="replace"))) if config.is_file() else "",
        found=found,
        rows=rows,
        manifest=_manifest(facts),
        problems=problems,
    )  # fmt: skip


def _evaluation(run: str) -> dict[str, Any] | None:
    path = stamp.run_folder(run) / "eval" / "metrics.json"
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = files.read_json(path)
        lacking = [key for key in ("base", "tuned", "settings", "data") if not isinstance(found.get(key), dict)]
    except (RefusedError, AttributeError):
        lacking = ["JSON object"]
    if lacking:
        raise RefusedError(
            f"{path.absolute()} is damaged: there is no {', '.join(lacking)} in it",
            f"make eval RUN={run} FORCE=1 writes it anew",
        )
    return found


def _samples(folder: Path, found: dict[str, Any], problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of that very evaluation; eval may be writing the next one now."""
    path = folder / "samples.jsonl"
    if not path.is_file() or files.sha256_file(path) != found.get("samples_sha256"):
        problems.append("the rows are left out: eval/samples.jsonl is missing or of another evaluation")
        return
    yield from files.read_jsonl(path)


def _manifest(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the rows that it was trained on, if they are still those."""
    manifest = stages.read_manifest(stages.folder("render", facts["data"]["name"]))
    return manifest if manifest and stages.data_hash(manifest) == facts["data"]["hash"] else None
