"""render: messages → the exact text that is trained on, with the character spans that carry loss.

Reads the newest stage (data/processed_with_style/<name> if a style was applied, else data/processed/<name>), writes
data/rendered/<name>. What a person reads there is what the model learns: training renders nothing itself.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import chat, command, console, files, stages
from scripts.utils.errors import UserError
from scripts.utils.rendered import encode_row, wanted

if TYPE_CHECKING:
    from scripts.utils.schema import Config


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
    tokenizer = chat.load_tokenizer(want.model.path)
    template = chat.choose_template(tokenizer, config.render.template)
    console.note(
        "render",
        f"template: {template.source}; loss on {config.render.train_on}; at most {config.render.max_length:,} tokens",
    )
    progress = console.Progress("render", "rows", sum(want.source.manifest["splits"].values()))
    splits: dict[str, int] = {}
    tokens = {"total": 0, "trained": 0, "longest": 0}
    rejected: list[dict[str, Any]] = []
    lossy: list[str] = []
    with files.replaced_folder(want.folder, stages.MANIFEST) as new:
        for split in stages.SPLITS:
            kept = []
            for row in files.read_jsonl(want.source.path / f"{split}.jsonl"):
                progress.advance()
                try:
                    kept.append(render_row(template, tokenizer, row, config, lossy))
                except UserError as problem:
                    rejected.append({"split": split, "reason": problem.message, **row})
            splits[split] = files.write_jsonl(new / f"{split}.jsonl", kept)
            for rendered in kept:
                tokens["total"] += rendered["tokens"]
                tokens["trained"] += rendered["trained_tokens"]
                tokens["longest"] = max(tokens["longest"], rendered["tokens"])
        files.write_jsonl(new / "rejected.jsonl", rejected)
        progress.close()
        _check(config, splits, rejected)
        if lossy:
            console.warn(
                f"{len(lossy):,} rows hold characters that this model's vocabulary cannot express exactly, e.g. {lossy[0]}"
            )
        stages.write_manifest(
            new,
            "render",
            want.inputs,
            want.settings,
            rows_in=sum(splits.values()) + len(rejected),
            rows_out=sum(splits.values()),
            rejected=len(rejected),
            splits=splits,
            tokens=tokens,
            template={"source": template.source, "sha256": template.hash},
        )
    _summary(want.folder, splits, rejected, tokens)


def render_row(
    template: chat.Template, tokenizer: Any, row: dict[str, Any], config: "Config", lossy: list[str]
) -> dict[str, Any]:
    """One rendered row; raises ``UserError`` with the reason why it cannot be trained on."""
    done = chat.render_conversation(
        template, tokenizer, row["messages"], row.get("tools"), train_on=config.render.train_on
    )
    rendered = {
        "id": row["id"],
        "text": done.text,
        "spans": done.spans,
        "prompt_end": done.prompt_end,
        "prompt_spans": done.prompt_spans,
        "reference": done.reference,
        **({"literals": done.literals} if done.literals else {}),
    }
    encoded = encode_row(tokenizer, rendered)
    if len(encoded.ids) > config.render.max_length:
        raise UserError(
            f"longer than render.max_length ({config.render.max_length} tokens)", "raise it, or shorten the row"
        )
    if tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False) != done.text:
        lossy.append(f"{row['source']['file']}:{row['source']['line']}")
    if not encoded.trained_tokens:
        raise UserError("no token of it carries loss", "see render.train_on")
    return {
        **rendered,
        "tokens": len(encoded.ids),
        "trained_tokens": encoded.trained_tokens,
        "source": row["source"],
    }


def _check(config: "Config", splits: dict[str, int], rejected: list[dict[str, Any]]) -> None:
    """Refuse to land when rows are lost that the config does not allow to be lost, or no row is left to train on."""
    if not rejected:
        return
    first = rejected[0]
    where = f"{first['source']['file']}:{first['source']['line']}"
    too_long = sum(row["reason"].startswith("longer than") for row in rejected)
    if config.render.too_long == "error" and too_long:
        row = next(row for row in rejected if row["reason"].startswith("longer than"))
        where = f"{row['source']['file']}:{row['source']['line']}"
        raise UserError(
            f"{where}: {row['reason']}; {too_long} such rows", "raise render.max_length, or render.too_long: drop"
        )
    if not splits["train"]:
        raise UserError(
            f"no train row is left: {where}: {first['reason']}", "see render.max_length and render.template"
        )
    lost = len(rejected) / (len(rejected) + sum(splits.values()))
    if lost > config.data.max_rejected:
        console.warn(f"{lost:.1%} of the rows are left out, e.g. {where}: {first['reason']}")


def _rows(splits: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in splits.items())


def _summary(folder: Path, splits: dict[str, int], rejected: list[dict[str, Any]], tokens: dict[str, int]) -> None:
    count = max(sum(splits.values()), 1)
    console.facts(
        f"rendered into {folder}",
        [
            ("rows", f"{_rows(splits)}; {len(rejected):,} left out" + (" (see rejected.jsonl)" if rejected else "")),
            ("tokens", f"{tokens['total']:,}, of which {tokens['trained']:,} carry loss"),
            ("a row", f"{tokens['total'] / count:,.0f} tokens on average, {tokens['longest']:,} at most"),
            ("next", "make train"),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
