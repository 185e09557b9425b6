"""What the exports begin with: the run's whole model as a folder, merged or fully tuned, proven to be today's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.utils import adapters, files, model_folder, stamp
from scripts.utils.chat import Template, choose_template, load_tokenizer
from scripts.utils.errors import RefusedError, UserError

MERGE_NOTE = "sft-merge.json"


@dataclass(frozen=True)
class Whole:
    """``folder`` holds the model that the run made; ``hash`` is over its files; ``stop_ids`` end an answer."""

    run: str
    facts: dict[str, Any]
    folder: Path
    hash: str
    tokenizer: Any
    template: Template
    stop_ids: list[int]


def whole_model(run: str) -> Whole:
    """Raises ``UserError`` where the run or its merged model is not there, ``RefusedError`` where it is of another adapter."""
    facts = stamp.require(run)
    adapter = stamp.adapter_folder(run)
    if facts["tuning"]["mode"] == "full":
        folder = adapter
        adapters.verify(folder, facts.get("result", {}).get("export"))
    else:
        folder = stamp.run_folder(run) / "merged"
        _check_merged(run, folder, adapter)
    model_folder.check(folder)
    tokenizer = load_tokenizer(folder)
    ends = files.read_json(folder / "generation_config.json").get("eos_token_id")
    ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    hashes = {
        path.name: files.sha256_file(path) for path in model_folder.content_files(folder) if path.name != MERGE_NOTE
    }
    return Whole(
        run=run,
        facts=facts,
        folder=folder,
        hash=files.sha256_json(hashes),
        tokenizer=tokenizer,
        template=choose_template(tokenizer, "auto"),
        stop_ids=sorted(number for number in ids if number is not None),
    )


def _check_merged(run: str, folder: Path, adapter: Path) -> None:
    if not (folder / MERGE_NOTE).is_file():
        raise UserError(
            f"run {run!r} has no merged model (looked in {folder.absolute()})", f"run: make merge RUN={run}"
        )
    weights = adapter / "adapter_model.safetensors"
    note = files.read_json(folder / MERGE_NOTE)
    if weights.is_file() and note["wanted"]["adapter_sha256"] != files.sha256_file(weights):
        raise RefusedError(
            f"{folder.absolute()} was merged from another adapter than lies in {adapter} now",
            f"run: make merge RUN={run}",
        )
    short = [name for name, size in note["files"].items() if _size(folder / name) != size]
    if short:
        raise RefusedError(
            f"{folder.absolute()}: {short[0]} is not as it was merged", f"run: make merge RUN={run} FORCE=1"
        )


def check_gguf(run: str, file: Path, whole: Whole) -> None:
    """Raises ``UserError`` where a GGUF file is not of the model that lies there now."""
    note = file.with_suffix(".json")
    if not note.is_file() or (files.read_json(note)["wanted"] or {}).get("model") != whole.hash:
        raise UserError(
            f"{file} is not of the model in {whole.folder} now",
            f"run: make export-gguf RUN={run} QUANT={file.stem.removeprefix(run + '-')}",
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
