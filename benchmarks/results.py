"""Medians, ratios first, as Markdown and JSON; and the block of docs/benchmarks.md that holds the newest of them."""

import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import NAMES, OURS, Result
from scripts.utils import files, hardware, workers
from scripts.utils.errors import UserError

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PARTS = (
    "train-fp32",
    "train-bf16",
    "levers-fp32",
    "levers-bf16",
    "profile-fp32",
    "profile-bf16",
    "prefix",
    "context",
    "inference",
    "loader",
    "starts",
)
_MEDIAN_OF = ("rate", "trained_rate", "peak_bytes", "seconds", "first_step", "flops", "train_loss")


def machine() -> str:
    import torch

    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{card}{hardware.cpu_name()}, {workers.cores()} cores, {platform.system()}, torch {torch.__version__}"


def medians(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """For each contestant the median of each figure over its rounds."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    return {
        name: {field: statistics.median(getattr(result, field) for result in found) for field in _MEDIAN_OF}
        for name, found in by_name.items()
    }


def ratios(middle: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """SFT-Play against each peer: how many times its speed, what part of its memory, how many times as soon done."""
    return [
        {
            "ours": ours,
            "peer": peer,
            "rate": middle[ours]["rate"] / middle[peer]["rate"],
            "memory": middle[ours]["peak_bytes"] / middle[peer]["peak_bytes"],
            "total": middle[peer]["seconds"] / middle[ours]["seconds"],
            "first_step": middle[peer]["first_step"] / middle[ours]["first_step"],
        }
        for ours in OURS
        if ours in middle
        for peer in middle
        if peer not in OURS
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    marks = ["---" if number < left else "---:" for number in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *rows])


def contest_text(found: dict[str, Any]) -> str:
    """The Markdown of one contest, ``found`` as it stands in its JSON."""
    middle, limits = found["medians"], found["limit"]
    against = table(
        ["", "against", "real tokens/s", "peak memory", "command to adapter", "to the first step"],
        [
            [
                NAMES[row["ours"]],
                NAMES[row["peer"]],
                f"{row['rate']:.2f}×",
                f"{row['memory']:.2f}×",
                f"{row['total']:.2f}× as fast",
                f"{row['first_step']:.2f}× as fast",
            ]
            for row in found["ratios"]
        ],
        left=2,
    )
    figures = table(
        ["", "real tokens/s", "trained tokens/s", "peak memory", "command to adapter", "to the first step", "of the limit", "training loss", "held-out loss"],
        [
            [
                NAMES[name],
                f"{row['rate']:,.1f}",
                f"{row['trained_rate']:,.1f}",
                f"{row['peak_bytes'] / 2**30:.2f} GiB",
                f"{row['seconds']:.1f} s",
                f"{row['first_step']:.1f} s",
                f"{row['flops'] / limits['fp32' if name == 'padded' else found['job']['precision']]:.0%}",
                f"{row['train_loss']:.3f}",
                f"{found['held_out'][name]:.3f}",
            ]
            for name, row in middle.items()
        ],
    )  # fmt: skip
    rows = found["rows"]
    limit_text = ", ".join(f"{value / 1e9:,.0f} GFLOP/s in {name}" for name, value in limits.items())
    return (
        f"### Training in {found['job']['precision']}\n\n{against}\n\n{figures}\n\n"
        f"{rows['count']} rows of `{rows['raw']}` ({rows['tokens']:,} tokens, {rows['trained']:,} of them answers), "
        f"{of_rounds(found['rounds'])}. Held-out loss of the base model: {found['held_out']['base']:.3f} ({rows['held']} rows). "
        f"This processor's matrix multiplication: {limit_text}. {found['machine']}, TRL {found['trl']}, {found['date']}.\n"
    )


def of_rounds(count: int) -> str:
    return "one run of each" if count == 1 else f"medians of {count} rounds"


def save(folder: Path, part: str, found: dict[str, Any], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / f"{part}.json", found)
    files.write_text(folder / f"{part}.md", text)


def with_figures(page: str, figures: str) -> str:
    """``page`` with what stands between the two marks replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the page has no block between {BEGIN} and {END}", "put the two lines back")
    return f"{before}{BEGIN}\n\n{figures.strip()}\n\n{END}{after}"


def update_docs(folder: Path, page: Path) -> list[str]:
    """Put the figures that lie in ``folder`` into the page, and the plot beside it; the parts that were there."""
    from benchmarks import plot

    there = [part for part in PARTS if (folder / f"{part}.md").is_file()]
    if not there:
        raise UserError(f"no figures in {folder.absolute()}", "run: make bench")
    texts = [(folder / f"{part}.md").read_text(encoding="utf-8") for part in there]
    contests = [files.read_json(folder / f"{part}.json") for part in there if part.startswith("train-")]
    if contests:
        files.write_text(page.with_suffix(".svg"), plot.ratios_svg(contests))
        texts.insert(0, f"![SFT-Play's speed as a multiple of each peer's]({page.stem}.svg)\n")
    files.write_text(page, with_figures(page.read_text(encoding="utf-8"), "\n".join(texts)))
    return there
