"""The doctor on the data: raw files and splits, and the first rows as the model will see them.

``first_rows`` runs in a child process, as it loads the tokenizer. Findings name files, lines and counts, never a row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import chat, console, data_hub, model_folder, sources, splits, stages
from scripts.utils.config import data_name
from scripts.utils.encoding import Encoded
from scripts.utils.errors import RefusedError, SFTError, UserError
from scripts.utils.findings import USER, Finding, fault, from_problem, ok, warning
from scripts.utils.rendered import encode_row
from scripts.utils.rendering import render_row

if TYPE_CHECKING:
    from scripts.utils.schema import Config, RenderSection

FILES, ROWS = 5, 20  # files looked into, and rows of each
_NO_LIMIT = 1 << 30  # tokens: a row's own length is wanted
_SAME = "(same CONFIG and RAW)"


def raw(config: "Config") -> Iterator[Finding]:
    """The raw files that the config names; a data set of the hub that is not here is not fetched for it."""
    data = config.data
    if absent := not_fetched(config):
        yield ok("data", f"{', '.join(absent)}: fetched when make process first reads it")
        return
    try:
        found, warnings = sources.find(data)
    except SFTError as problem:
        yield from_problem("data", "data-missing", problem)
        return
    paths = [path for source in found for path in source.paths]
    for text in warnings:
        yield warning("data", "file-passed-over", text, "convert it to .jsonl or .csv, or move it away")
    unreadable = [path for path in paths if not _readable(path)]
    if unreadable:
        text = f"{unreadable[0].absolute()} cannot be read by this user"
        yield fault("data", "data-unreadable", text, f"chmod u+r '{unreadable[0]}', or change its owner", USER)
        return
    shown = ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5:,} more" if len(paths) > 5 else "")
    yield ok(
        "data",
        f"{len(paths):,} file{'' if len(paths) == 1 else 's'}, {console.size(sum(p.stat().st_size for p in paths))}: {shown}",
    )
    given = splits.given_splits(paths)
    if len(given) == len(paths) and config.eval.split not in given.values():
        text = f"the files give {' and '.join(sorted(set(given.values())))}, but no {config.eval.split} rows, which eval.split asks for"
        hint = f'add {config.eval.split}.jsonl, or SET="eval.split={next(s for s in ("test", "val", "train") if s in given.values())}"'
        yield warning("data", "split-missing", text, hint)


def not_fetched(config: "Config") -> list[str]:
    """The data sets of the hub that the config names and that are not on this disk."""
    named = [source.raw for source in config.data.sources] or [config.data.raw]
    names = [name for part in named for name in ([part] if isinstance(part, str) else part)]
    return [name for name in names if name.startswith(data_hub.PREFIX) and not _fetched(name)]


def _fetched(name: str) -> bool:
    owner = name.removeprefix(data_hub.PREFIX).replace("/", "--", 1)
    return model_folder.is_whole(data_hub.cache_folder() / owner.partition("/")[0])


def _readable(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.read(1)
        return True
    except OSError:
        return False


def rendered(config: "Config") -> Iterator[Finding]:
    """The rendered rows, where there are any: whole, and with the splits that the config needs."""
    folder = stages.folder("render", data_name(config))
    try:
        manifest = stages.read_manifest(folder)
    except RefusedError as problem:
        yield fault("rendered", "rows-damaged", problem.message, f"make render FORCE=1 {_SAME}", USER)
        return
    if manifest is None:
        yield ok("rendered", f"nothing in {folder} yet; make train makes it")
        return
    if not stages.outputs_whole(folder, manifest):
        gone = [name for name in manifest.get("outputs", {}) if not (folder / name).is_file()]
        text = f"{folder} is not as render left it" + (f": {', '.join(gone)} is missing" if gone else "")
        yield fault("rendered", "split-missing", text, f"make render FORCE=1 {_SAME}", USER)
        return
    rows, train = manifest["splits"], config.train
    text = f"{folder}: " + ", ".join(f"{count:,} {split}" for split, count in rows.items())
    wants_val = train.load_best_model_at_end is True or train.early_stopping_patience
    if not rows.get("train"):
        yield fault(
            "rendered", "split-missing", f"{text}; nothing to train on", f"add rows, then: make render {_SAME}", USER
        )
    elif wants_val and not rows.get("val"):
        key = "load_best_model_at_end" if train.load_best_model_at_end is True else "early_stopping_patience"
        hint = 'SET="data.val_fraction=0.1" or more rows; or SET="train.load_best_model_at_end=auto train.early_stopping_patience=0"'
        yield fault("rendered", "split-missing", f"{text}; train.{key} needs val rows", hint, USER)
    elif not rows.get(config.eval.split):
        filled = next(split for split in ("test", "val", "train") if rows.get(split))
        yield warning(
            "rendered",
            "split-missing",
            f"{text}; make eval would find no {config.eval.split} row",
            f'SET="eval.split={filled}"',
        )
    else:
        yield ok("rendered", text)


@dataclass
class Looked:
    """What the first rows came to; ``problems`` counts reasons, with the place of the first row of each."""

    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    without_end: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    problems: dict[str, tuple[str, int]] = field(default_factory=dict)
    unusable: dict[str, tuple[str, int]] = field(default_factory=dict)
    files: int = 0

    def note(self, kind: dict[str, tuple[str, int]], reason: str, place: str) -> None:
        first, count = kind.get(reason, (place, 0))
        kind[reason] = (first, count + 1)


def first_rows(config: "Config", tokenizer: Any) -> Iterator[Finding]:
    """Render the first rows of the first files, and look at their masks and lengths."""
    if not_fetched(config):
        return
    try:
        template = chat.choose_template(tokenizer, config.render.template)
        for text in chat.template_warnings(template, tokenizer):
            yield warning("rows", "template-foreign", text, 'SET="render.template=auto"')
        seen = look(config, tokenizer, template)
    except SFTError as problem:
        yield from_problem("rows", "rows-unreadable", problem)
        return
    yield from judge(seen, config)


def look(config: "Config", tokenizer: Any, template: chat.Template) -> Looked:
    seen = Looked()
    settings = config.render.model_copy(update={"max_length": _NO_LIMIT})
    opened = [(source, path) for source in sources.find(config.data)[0] for path in source.paths]
    for source, path in opened[:FILES]:
        seen.files += 1
        for record in itertools.islice(source.open_file(path).records, ROWS):
            place = f"{record.raw.file}:{record.raw.line}"
            if record.content is None:
                seen.note(seen.unusable, record.reason, place)
                continue
            row = {"id": "0", **record.content, "source": {"file": record.raw.file, "line": record.raw.line}}
            _add(seen, row, place, tokenizer, template, settings)
    return seen


def _add(
    seen: Looked, row: dict[str, Any], place: str, tokenizer: Any, template: chat.Template, settings: "RenderSection"
) -> None:
    try:
        made = render_row(template, tokenizer, row, settings)[0]
    except (UserError, RefusedError) as problem:
        seen.note(seen.problems, problem.message, place)
        return
    encoded = encode_row(tokenizer, made[0])
    seen.lengths.append(made[0]["tokens"])
    seen.trained += encoded.trained_tokens
    if "text" not in row and settings.train_on != "all":
        if not ends_trained(tokenizer, encoded):
            seen.without_end.append(place)
        if encoded.trained_tokens >= len(encoded.ids) - 1:  # the first token never carries loss
            seen.whole.append(place)


def ends_trained(tokenizer: Any, encoded: Encoded) -> bool:
    """Whether the last trained token is one that can end an answer: the end token or another control token."""
    last = max((at for at, yes in enumerate(encoded.trained) if yes), default=-1)
    known = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return last >= 0 and encoded.ids[last] in known


def judge(seen: Looked, config: "Config") -> Iterator[Finding]:
    looked_at = len(seen.lengths) + sum(n for kind in (seen.problems, seen.unusable) for _, n in kind.values())
    unusable = sum(count for _, count in seen.unusable.values())
    if unusable:
        text = f"{unusable} of the first {looked_at} rows cannot be used: {_told(seen.unusable)}"
        if unusable > config.data.max_rejected * looked_at:
            hint = 'mend these rows, or SET="data.max_rejected=1" to leave them out'
            yield fault("rows", "rows-unusable", text, hint, USER)
        else:
            yield warning(
                "rows", "rows-unusable", text, "mend these rows; they are left out, with their reason in rejected.jsonl"
            )
    if seen.problems:
        refused = sum(count for _, count in seen.problems.values())
        text = f"{refused} of the first {looked_at} rows do not become training text: {_told(seen.problems)}"
        no_loss = all("loss" in reason for reason in seen.problems)
        name, hint = ("mask-empty", 'SET="render.train_on=assistant", and take out "train": false') if no_loss else (
            "template-broken", 'SET="render.template=auto", or mend the template')  # fmt: skip
        if seen.lengths:
            yield warning("rows", name, text, hint)
        else:
            yield fault("rows", name, text, hint, USER)
    if seen.lengths:
        yield from _lengths(seen, config)
        yield from _masks(seen)


def _told(kind: dict[str, tuple[str, int]]) -> str:
    return "; ".join(f"{reason} ({place})" for reason, (place, _) in list(kind.items())[:3])


def _lengths(seen: Looked, config: "Config") -> Iterator[Finding]:
    limit, count = config.render.max_length, len(seen.lengths)
    over = sum(length > limit for length in seen.lengths)
    told = f"{min(seen.lengths):,} to {max(seen.lengths):,} tokens"
    longest = f'SET="render.max_length={-(-max(seen.lengths) // 64) * 64}"'
    if over and config.render.too_long == "error":
        text = f"{over} of the first {count} rows are longer than render.max_length ({limit:,}), and render.too_long is error"
        yield fault("rows", "rows-too-long", text, longest, USER)
    elif over == count and config.render.too_long == "drop":
        text = f"all of the first {count} rows ({told}) are longer than render.max_length ({limit:,}) and would be left out"
        yield fault("rows", "rows-too-long", text, longest, USER)
    elif over:
        text = f"{over} of the first {count} rows ({told}) are longer than render.max_length ({limit:,}): {config.render.too_long}"
        yield warning("rows", "rows-too-long", text, f"{longest}; or render.too_long: truncate_start or split_turns")
    else:
        share = seen.trained / max(sum(seen.lengths), 1)
        yield ok(
            "rows", f"the first {count} of {seen.files} files: {told} (limit {limit:,}), {share:.0%} of them carry loss"
        )


def _masks(seen: Looked) -> Iterator[Finding]:
    if seen.without_end:
        text = f"{len(seen.without_end)} of {len(seen.lengths)} answers end without a trained end token ({seen.without_end[0]}): the model would not learn to stop"
        yield warning(
            "rows",
            "end-untrained",
            text,
            'SET="render.template=auto", or end the assistant\'s turn with {{ eos_token }}',
        )
    if seen.whole:
        text = f"in {len(seen.whole)} of {len(seen.lengths)} rows every token carries loss ({seen.whole[0]}): the template shows no prompt"
        yield warning("rows", "mask-full", text, 'SET="render.template=auto"')
