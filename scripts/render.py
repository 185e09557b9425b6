"""render: messages → the exact text that is trained on, with the character spans that carry loss.

Reads the newest stage (data/processed_with_style/<name> if a style was applied, else data/processed/<name>), writes
data/rendered/<name>. What a person reads there is what the model learns: training renders nothing itself.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import chat, command, console, environment, files, rendering, stages, workers
from scripts.utils.errors import UserError
from scripts.utils.rendered import Wanted, wanted

if TYPE_CHECKING:
    from scripts.utils.schema import Config

CHUNK = 64  # rows that a worker takes at a time


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make render",
        "make render MODEL=embedded/smollm2-135m-instruct",
        'sft-render --set "render.train_on=all"',
    ]
    parser = command.new_parser(
        "render", "Messages to training text, by the chat template.", examples, keys=["raw", "model"]
    )
    command.add_force(parser)
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    want = wanted(config)
    console.note("render", f"reading {want.source.why}")
    if not arguments.force and (manifest := stages.up_to_date(want.folder, want.identity)):
        console.note("render", f"up to date ({want.folder}: {_rows(manifest['splits'])})")
        return
    environment.leave_out("torch")
    tokenizer = chat.load_tokenizer(want.model.path)
    template = chat.choose_template(tokenizer, config.render.template)
    console.note(
        "render",
        f"template: {template.source}; loss on {config.render.train_on}; at most {config.render.max_length:,} tokens",
    )
    for text in chat.template_warnings(template, tokenizer):
        console.warn(text)
    count = Count()
    with files.replaced_folder(want.folder, stages.MANIFEST) as new:
        render_all(want, template, tokenizer, config, new, count)
        _check(config, count)
        if count.lossy:
            console.warn(
                f"{count.lossy:,} rows hold characters that this model's vocabulary cannot express exactly, e.g. {count.lossy_place}"
            )
        stages.write_manifest(
            new,
            "render",
            want.inputs,
            want.settings,
            rows_in=count.rows_in,
            rows_out=sum(count.splits.values()),
            rejected=count.rejected,
            too_long={**count.shortened, "left_out": count.too_long},
            splits=count.splits,
            tokens=count.tokens,
            template={"source": template.source, "sha256": template.hash},
            system=count.shared_system(),
        )
    _summary(want.folder, count)


@dataclass
class Count:
    """What became of the rows, with the first example of each loss: its place and reason."""

    splits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(stages.SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: {"total": 0, "trained": 0, "longest": 0})
    shortened: dict[str, int] = field(default_factory=lambda: {"cut": 0, "split": 0, "parts": 0})
    rows_in: int = 0
    rejected: int = 0
    too_long: int = 0
    examples: dict[str, str] = field(default_factory=dict)  # "any", "too long", "other"
    lossy: int = 0
    lossy_place: str = ""
    systems: set[str] = field(default_factory=set)  # of the train rows; two are as good as many

    def add(self, split: str, outcome: rendering.Outcome) -> None:
        self.rows_in += 1
        if outcome.rejected:
            self.rejected += 1
            self.too_long += outcome.too_long
            for kind in ("any", "too long" if outcome.too_long else "other"):
                self.examples.setdefault(kind, f"{outcome.place}: {outcome.reason}")
            return
        self.splits[split] += len(outcome.lines)
        if split == "train" and len(self.systems) < 2:
            self.systems.add(outcome.system)
        if outcome.how:
            self.shortened[outcome.how] += 1
            self.shortened["parts"] += len(outcome.lines) if outcome.how == "split" else 0
        if outcome.lossy:
            self.lossy += 1
            self.lossy_place = self.lossy_place or outcome.place
        for every, trained in outcome.tokens:
            self.tokens["total"] += every
            self.tokens["trained"] += trained
            self.tokens["longest"] = max(self.tokens["longest"], every)

    def shared_system(self) -> str | None:
        """The system message that every train row has: what the model is to be asked with, too."""
        return next(iter(self.systems)) or None if len(self.systems) == 1 else None


def render_all(
    want: Wanted, template: chat.Template, tokenizer: Any, config: "Config", new: Path, count: Count
) -> None:
    """Write the rows of every split, and the rejected ones, into ``new``; rows are not kept in memory."""
    progress = console.Progress("render", "rows", sum(want.source.manifest["splits"].values()))
    with (new / "rejected.jsonl").open("wb") as rejected:
        for split in stages.SPLITS:
            path = want.source.path / f"{split}.jsonl"
            work = rendering.renderer(template, tokenizer, config.render, str(path), split)
            with path.open("rb") as lines, (new / f"{split}.jsonl").open("wb") as output:
                for outcomes in workers.in_order(work, workers.numbered(lines, CHUNK)):
                    for outcome in outcomes:
                        count.add(split, outcome)
                        output.writelines(outcome.lines)
                        rejected.write(outcome.rejected)
                    progress.advance(len(outcomes))
    progress.close()


def _check(config: "Config", count: Count) -> None:
    """Refuse to land when rows are lost that the config does not allow to be lost, or no row is left to train on."""
    if not count.rejected:
        return
    others = count.rejected - count.too_long
    if config.render.too_long == "error" and count.too_long:
        raise UserError(
            f"{count.examples['too long']}; {count.too_long} such rows",
            "raise render.max_length, or render.too_long: drop",
        )
    if not count.splits["train"]:
        raise UserError(
            f"no train row is left: {count.examples['any']}",
            "see render.max_length and render.template",
        )
    if count.too_long > 0.01 * count.rows_in:
        console.warn(
            f"{count.too_long / count.rows_in:.1%} of the rows are too long and left out, e.g. {count.examples['too long']}; "
            "see render.max_length and render.too_long"
        )
    if others > config.data.max_rejected * count.rows_in:
        console.warn(f"{others / count.rows_in:.1%} of the rows are left out, e.g. {count.examples['other']}")


def _rows(splits: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in splits.items())


def _summary(folder: Path, count: Count) -> None:
    rows, tokens, shortened = max(sum(count.splits.values()), 1), count.tokens, count.shortened
    changes = []
    if shortened["cut"]:
        changes.append(("too long", f"{shortened['cut']:,} rows with their prompt cut, each answer whole"))
    if shortened["split"]:
        changes.append(("too long", f"{shortened['split']:,} rows split into {shortened['parts']:,}"))
    left_out = f"{count.rejected:,} left out" + (" (see rejected.jsonl)" if count.rejected else "")
    console.facts(
        f"rendered into {folder}",
        [
            ("rows", f"{_rows(count.splits)}; {left_out}"),
            *changes,
            ("tokens", f"{tokens['total']:,}, of which {tokens['trained']:,} carry loss"),
            ("a row", f"{tokens['total'] / rows:,.0f} tokens on average, {tokens['longest']:,} at most"),
            ("next", "make train"),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
