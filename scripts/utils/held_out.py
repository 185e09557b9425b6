"""The rows that a run is judged by: those of a split that it rendered itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, rendered, stages
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config


@dataclass(frozen=True)
class Rows:
    """The rows to evaluate: which split they came from, how many it has, and the rows chosen."""

    folder: Path
    split: str
    available: int
    chosen: list[dict[str, Any]]
    warnings: list[str]

    def warn(self, text: str) -> None:
        """Say it now, and keep it with the figures."""
        console.warn(text)
        self.warnings.append(text)


def choose_rows(facts: dict[str, Any], config: "Config", *, quick: bool, full: bool) -> Rows:
    """The rows of eval.split that this run rendered; spread evenly over the split where not all are taken.

    Falls back from an empty test split to val, and says so. Raises ``UserError`` when there is nothing to evaluate.
    """
    folder = stages.folder("render", facts["data"]["name"])
    manifest = stages.read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"the run's rendered rows are gone (looked in {folder.absolute()})",
            "run: make render with the run's CONFIG and RAW",
        )
    warnings: list[str] = []
    now = stages.data_hash(manifest)
    if now != facts["data"]["hash"]:
        warnings.append(
            f"{folder} does not hold the rows that this run was trained on: hash {now[:12]} now, {facts['data']['hash'][:12]} then. "
            "Rows of today's split may have been trained on, so the figures may be too good."
        )
    split = config.eval.split
    rows = list(rendered.read_rows(folder, split))
    if not rows and split == "test":
        split = "val"
        rows = list(rendered.read_rows(folder, split))
        if rows:
            warnings.append(
                f"{folder} has no test rows: evaluating the val rows, by which the best checkpoint was chosen"
            )
    if not rows:
        tried = "neither test nor val rows" if config.eval.split == "test" else f"no {split} rows"
        raise UserError(
            f"{folder.absolute()} has {tried}", "raise data.test_fraction or data.val_fraction, or choose SPLIT=train"
        )
    limit = len(rows) if full else config.eval.quick_limit if quick else config.eval.limit or len(rows)
    count = min(limit, len(rows))
    for text in warnings:
        console.warn(text)
    chosen = [rows[number * len(rows) // count] for number in range(count)]
    return Rows(folder, split, len(rows), chosen, warnings)
