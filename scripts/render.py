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

from scripts.utils import chat, command, console, continued, files, lengths, stages
from scripts.utils.errors import UserError
from scripts.utils.rendered import encode_row, wanted

if TYPE_CHECKING:
    from scripts.utils.schema import Config, RenderSection


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
    for text in chat.template_warnings(template, tokenizer):
        console.warn(text)
    progress = console.Progress("render", "rows", sum(want.source.manifest["splits"].values()))
    splits: dict[str, int] = {}
    tokens = {"total": 0, "trained": 0, "longest": 0}
    shortened = {"cut": 0, "split": 0, "parts": 0}
    rejected: list[dict[str, Any]] = []
    lossy: list[str] = []
    with files.replaced_folder(want.folder, stages.MANIFEST) as new:
        for split in stages.SPLITS:
            kept = []
            for row in files.read_jsonl(want.source.path / f"{split}.jsonl"):
                progress.advance()
                try:
                    made, how = render_row(template, tokenizer, row, config.render)
                except UserError as problem:
                    too_long = {"too_long": True} if isinstance(problem, lengths.TooLong) else {}
                    rejected.append({"split": split, "reason": problem.message, **too_long, **row})
                    continue
                kept += made
                if how:
                    shortened[how] += 1
                    shortened["parts"] += len(made) if how == "split" else 0
                exact = [part.pop("exact") for part in made]
                if not all(exact):
                    lossy.append(f"{row['source']['file']}:{row['source']['line']}")
            splits[split] = files.write_jsonl(new / f"{split}.jsonl", kept)
            for rendered in kept:
                tokens["total"] += rendered["tokens"]
                tokens["trained"] += rendered["trained_tokens"]
                tokens["longest"] = max(tokens["longest"], rendered["tokens"])
        files.write_jsonl(new / "rejected.jsonl", rejected)
        progress.close()
        rows_in = sum(splits.values()) - shortened["parts"] + shortened["split"] + len(rejected)
        _check(config, splits, rejected, rows_in)
        if lossy:
            console.warn(
                f"{len(lossy):,} rows hold characters that this model's vocabulary cannot express exactly, e.g. {lossy[0]}"
            )
        stages.write_manifest(
            new,
            "render",
            want.inputs,
            want.settings,
            rows_in=rows_in,
            rows_out=sum(splits.values()),
            rejected=len(rejected),
            too_long={**shortened, "left_out": sum("too_long" in row for row in rejected)},
            splits=splits,
            tokens=tokens,
            template={"source": template.source, "sha256": template.hash},
        )
    _summary(want.folder, splits, rejected, tokens, shortened)


def render_row(
    template: chat.Template, tokenizer: Any, row: dict[str, Any], settings: "RenderSection"
) -> tuple[list[dict[str, Any]], str]:
    """The rendered rows of one row, and how it was made to fit: cut, split, or not at all ("").

    ``exact`` in each says whether the vocabulary can spell its text. Raises ``UserError`` with the reason why the
    row cannot be used.
    """

    def render(messages: list[dict[str, Any]], train_on: chat.TrainOn = settings.train_on) -> dict[str, Any]:
        done = chat.render_conversation(template, tokenizer, messages, row.get("tools"), train_on=train_on)
        rendered = {
            "text": done.text,
            "spans": done.spans,
            "prompt_end": done.prompt_end,
            "prompt_spans": done.prompt_spans,
            "reference": done.reference,
            **({"literals": done.literals} if done.literals else {}),
        }
        return finished(rendered)

    def finished(rendered: dict[str, Any]) -> dict[str, Any]:
        encoded = encode_row(tokenizer, rendered)
        return {
            "id": row["id"],
            **rendered,
            "tokens": len(encoded.ids),
            "trained_tokens": encoded.trained_tokens,
            "source": row["source"],
            "exact": tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False) == rendered["text"],
        }

    if "text" in row:
        parts = continued.render_texts(
            tokenizer, row["text"], settings.max_length, lambda part: len(encode_row(tokenizer, part).ids)
        )
        if len(parts) > 1 and settings.too_long == "error":
            raise lengths.too_long(settings.max_length)
        made = [finished(part) for part in parts]
        return _numbered(made) if len(made) > 1 else made, "split" if len(made) > 1 else ""
    messages, limit = row["messages"], settings.max_length
    made, how = [render(messages)], ""
    if made[0]["tokens"] > limit:
        if settings.too_long in ("drop", "error"):
            raise lengths.too_long(limit)
        if settings.too_long == "split_turns":
            # only what would carry loss in the whole conversation may do so in its parts
            made, how = (
                lengths.in_parts(
                    chat.with_flags(messages, settings.train_on),
                    limit,
                    measure=lambda part: render([{**message, "train": None} for message in part]),
                    render=lambda part: render(part, "all" if settings.train_on == "all" else "assistant"),
                ),
                "split",
            )
            made = _numbered(made)
        else:
            shorten = lengths.without_start if settings.too_long == "truncate_start" else lengths.without_end
            made, how = [shorten(messages, limit, render)], "cut"
    if not all(part["trained_tokens"] for part in made):
        raise UserError("no token of it carries loss", "see render.train_on")
    return made, how


def _numbered(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**part, "id": f"{part['id']}-{number}"} for number, part in enumerate(parts, 1)]


def _check(config: "Config", splits: dict[str, int], rejected: list[dict[str, Any]], rows_in: int) -> None:
    """Refuse to land when rows are lost that the config does not allow to be lost, or no row is left to train on."""
    if not rejected:
        return
    too_long = [row for row in rejected if "too_long" in row]
    others = [row for row in rejected if "too_long" not in row]
    if config.render.too_long == "error" and too_long:
        raise UserError(
            f"{_where(too_long[0])}: {too_long[0]['reason']}; {len(too_long)} such rows",
            "raise render.max_length, or render.too_long: drop",
        )
    if not splits["train"]:
        raise UserError(
            f"no train row is left: {_where(rejected[0])}: {rejected[0]['reason']}",
            "see render.max_length and render.template",
        )
    if len(too_long) > 0.01 * rows_in:
        console.warn(
            f"{len(too_long) / rows_in:.1%} of the rows are too long and left out, e.g. {_where(too_long[0])}: "
            f"{too_long[0]['reason']}; see render.max_length and render.too_long"
        )
    if len(others) > config.data.max_rejected * rows_in:
        console.warn(
            f"{len(others) / rows_in:.1%} of the rows are left out, e.g. {_where(others[0])}: {others[0]['reason']}"
        )


def _where(row: dict[str, Any]) -> str:
    return f"{row['source']['file']}:{row['source']['line']}"


def _rows(splits: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in splits.items())


def _summary(
    folder: Path,
    splits: dict[str, int],
    rejected: list[dict[str, Any]],
    tokens: dict[str, int],
    shortened: dict[str, int],
) -> None:
    count = max(sum(splits.values()), 1)
    changes = []
    if shortened["cut"]:
        changes.append(("too long", f"{shortened['cut']:,} rows with their prompt cut, each answer whole"))
    if shortened["split"]:
        changes.append(("too long", f"{shortened['split']:,} rows split into {shortened['parts']:,}"))
    console.facts(
        f"rendered into {folder}",
        [
            ("rows", f"{_rows(splits)}; {len(rejected):,} left out" + (" (see rejected.jsonl)" if rejected else "")),
            *changes,
            ("tokens", f"{tokens['total']:,}, of which {tokens['trained']:,} carry loss"),
            ("a row", f"{tokens['total'] / count:,.0f} tokens on average, {tokens['longest']:,} at most"),
            ("next", "make train"),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
