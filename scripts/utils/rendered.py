"""The rendered rows in data/rendered: which inputs and settings make them, and reading them as examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import files, literals, model_store, stages
from scripts.utils.config import data_name
from scripts.utils.encoding import Encoded, encode
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from scripts.utils.schema import Config

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Wanted:
    """What render is to make now: from which stage, for which model, with which identity."""

    folder: Path
    source: stages.Source
    model: model_store.Model
    inputs: dict[str, Any]
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        return stages.identity(self.inputs, self.settings)


def wanted(config: "Config") -> Wanted:
    """Look at the newest stage, the model's tokenizer and the config, without loading any of them."""
    name = data_name(config)
    source = stages.newest_source(name)
    folder = stages.folder("render", name)
    known = (stages.read_manifest(folder) or {}).get("inputs")
    inputs = stages.fingerprint([source.path / f"{split}.jsonl" for split in stages.SPLITS], known)
    model = model_store.resolve(config.model.name, config.model.revision, tokenizer_only=True)
    template = Path(config.render.template)
    settings = {
        "tokenizer": files.sha256_json(
            [files.sha256_file(p) for p in map(model.path.joinpath, _TOKENIZER_FILES) if p.is_file()]
        ),
        "template": config.render.template,
        "template_file": files.sha256_file(template) if template.is_file() else None,
        "train_on": config.render.train_on,
        "max_length": config.render.max_length,
        "too_long": config.render.too_long,
        "style": _style_of(source),
        "version": 3,  # raise it when the same rows come out differently
    }
    return Wanted(folder, source, model, inputs, settings)


def _style_of(source: stages.Source) -> dict[str, Any] | None:
    settings = source.manifest["settings"]
    return {"text": settings["text"], "mode": settings["mode"]} if source.manifest["step"] == "style" else None


def require_current(config: "Config") -> tuple[Wanted, dict[str, Any]]:
    """The rendered rows' manifest; raises ``UserError`` when they are missing or older than what they come from."""
    now = wanted(config)
    manifest = stages.read_manifest(now.folder)
    if manifest is None:
        raise UserError(
            f"no rendered rows in {now.folder.absolute()}", "run: make render (same CONFIG and RAW), or make train"
        )
    if stages.up_to_date(now.folder, now.identity) is None:
        raise UserError(f"{now.folder} is older than its inputs or settings", "run: make render (same CONFIG and RAW)")
    return now, manifest


def read_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rendered rows of a split; none where the split is empty."""
    path = folder / f"{split}.jsonl"
    return files.read_jsonl(path) if path.is_file() else iter(())


def to_examples(tokenizer: "PreTrainedTokenizerBase", rows: list[dict[str, Any]]) -> list[Encoded]:
    """Token ids and loss masks, exactly as render counted them."""
    return [encode_row(tokenizer, row) for row in rows]


def encode_row(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]) -> Encoded:
    """One rendered row, cut at every assistant turn, whether it carries loss or not: a prompt is cut there too."""
    cuts = [row["prompt_end"], *(border for span in row["prompt_spans"] for border in span)]
    return encode(tokenizer, row["text"], row["spans"], row.get("literals", ()), cuts)


def to_prompts(tokenizer: "PreTrainedTokenizerBase", rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of each row's last prompt, as they stand in the row's example."""
    return [
        encode(
            tokenizer,
            row["text"][: row["prompt_end"]],
            row["prompt_spans"],
            literals.within(row.get("literals", ()), 0, row["prompt_end"]),
        ).ids
        for row in rows
    ]
