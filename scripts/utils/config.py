"""From YAML files and SET overrides to one frozen ``Config``: the only place that knows what a key may be.

``load_config`` merges (``include:`` depth first, then the file, then SET, then the flags of the command),
coerces by the schema's types, collects every problem and raises them all at once.
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Origins = dict[tuple[str, ...], str]
_MAPPINGS = ("data.columns",)  # keys whose value is a mapping; elsewhere a "{" in SET is text


def load_config(
    path: str | Path,
    overrides: str = "",
    flags: dict[str, Any] | None = None,
    values: Sequence[tuple[str, Any, str]] = (),
) -> "Config":
    """Return the validated config.

    ``overrides`` is the text of SET (``section.key=value`` words, quoted as in a shell); ``values`` are a sweep's own
    over it: dotted key, value, and where it was written; ``flags`` maps dotted keys to values given by a command's
    own flags, which win. Raises ``UserError`` with every problem found.
    """
    from pydantic import ValidationError

    from scripts.utils.schema import Config

    merged: dict[str, Any] = {}
    origins: Origins = {}
    _merge_file(Path(path), merged, origins, ())
    for key, value in parse_overrides(overrides):
        _set(merged, origins, key, value, "SET")
    for dotted, value, where in values:
        _set(merged, origins, tuple(dotted.split(".")), value, where)
    for dotted, value in (flags or {}).items():
        if value is not None:
            _set(merged, origins, tuple(dotted.split(".")), value, "flag")
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        problems = [_problem(item, origins, str(path)) for item in error.errors()]
        raise UserError("\n       ".join(problems), "configs/base.yaml shows every key with its meaning") from error
    _check_together(config, str(path))
    return config


def _merge_file(path: Path, merged: dict[str, Any], origins: Origins, seen: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: includes itself by way of {seen[-1]}", "take one of the include: lines out")
    from scripts.utils import yaml_text

    values, lines = yaml_text.load(path)
    include = values.pop("include", None)
    for name in [include] if isinstance(include, str) else include or []:
        _merge_file(path.parent / str(name), merged, origins, (*seen, resolved))
    for section, keys in values.items():
        if isinstance(keys, dict):
            merged.setdefault(section, {})
            for key, value in keys.items():
                line = lines.get((section, key), 0)
                _set(merged, origins, (section, key), value, f"{path}:{line}")
        elif keys is not None:
            _set(merged, origins, (section,), keys, f"{path}:{lines.get((section,), 0)}")
        elif section not in merged:
            _set(merged, origins, (section,), {}, f"{path}:{lines.get((section,), 0)}")


def _set(merged: dict[str, Any], origins: Origins, key: tuple[str, ...], value: Any, origin: str) -> None:
    from scripts.utils.schema import ALIASES

    if len(key) == 2 and isinstance(merged.get(key[0], {}), dict):
        name = ALIASES.get(key[0], {}).get(key[1], key[1])
        merged.setdefault(key[0], {})[name] = value
        origins[(key[0], name)] = origin
    else:
        merged[".".join(key) if len(key) > 2 else key[0]] = value
        origins[key[:1]] = origin


def parse_overrides(text: str, where: str = "SET") -> list[tuple[tuple[str, ...], Any]]:
    """``train.lr=1e-4 style.text='be brief'`` as pairs of key path and value; ``where`` it stands, for errors."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where}={text!r}: {error}", "close the quote") from error
    pairs = []
    remaining = iter(words)
    for word in remaining:
        key, equals, value = word.partition("=")
        # spaces within brackets are part of the value
        opening = "[{" if key in _MAPPINGS else "["
        while value and value[0] in opening and value[-1] != {"[": "]", "{": "}"}[value[0]]:
            more = next(remaining, None)
            if more is None:
                raise UserError(f"{where}: the bracket in {word!r} is never closed", "close it, or quote the value")
            value = f"{value} {more}"
        if not equals or key.count(".") != 1:
            raise UserError(f"{where}: {word!r} is not section.key=value", 'write for example SET="train.epochs=1"')
        # lists, mappings and null are YAML; any other value is taken letter by letter, so it may hold ': ' or '#'
        is_yaml = (value and value[0] in opening) or value in ("null", "~", "")
        from scripts.utils import yaml_text  # --help needs none of it

        pairs.append((tuple(key.split(".")), yaml_text.parse(value, f"{where} {key}")[0] if is_yaml else value))
    return pairs


def _problem(item: Any, origins: Origins, path: str) -> str:
    """One line for one problem: where, which key, what was expected, the nearest known key."""
    location = tuple(str(part) for part in item["loc"])
    key = location[:2]
    where = origins.get(key) or origins.get(key[:1]) or path
    dotted = ".".join(key)
    if item["type"] == "extra_forbidden" and len(location) > 2:
        return f"{where}: unknown key {location[-1]!r} in {dotted}"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key {dotted!r}{_nearest(key)}"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: {dotted!r} is a section of keys, not a value"
    expected = item["msg"].removeprefix("Input should be ").replace("a valid string", "text")
    if key == ("data", "sources"):
        dotted = ".".join(location)
    return f"{where}: {dotted} is {item['input']!r}, expected {expected}"


def _nearest(key: tuple[str, ...]) -> str:
    from scripts.utils.schema import ALIASES, Config

    sections = Config.model_fields
    if len(key) == 1 and (close := difflib.get_close_matches(key[0], sections, 1)):
        return f"; did you mean the section {close[0]!r}?"
    known = {f"{s}.{k}": f"{s}.{k}" for s, f in sections.items() for k in f.annotation.model_fields}  # type: ignore[union-attr]
    known |= {f"{s}.{a}": f"{s}.{k}" for s, names in ALIASES.items() for a, k in names.items()}
    name = key[-1]
    same_name = [target for spelt, target in known.items() if spelt.partition(".")[2] == name]
    close = difflib.get_close_matches(".".join(key), known, 1, 0.75)
    by_name = difflib.get_close_matches(name, [spelt.partition(".")[2] for spelt in known], 1, 0.75)
    found = (
        same_name
        or [known[c] for c in close]
        or [t for s, t in known.items() if by_name and s.endswith("." + by_name[0])]
    )
    return f"; did you mean {found[0]!r}?" if found else ""


def _check_together(config: "Config", path: str) -> None:
    """Refuse values that are each allowed but not together."""
    problems: list[str] = []
    train, data = config.train, config.data
    problems += _column_problems(data.columns, data.format, "data.")
    if data.sources and data.raw != type(data).model_fields["raw"].default:
        problems.append("data.raw (RAW) and data.sources both say what is read; take one of them out")
    for number, source in enumerate(data.sources, 1):
        where = f"data.sources, item {number}: "
        if source.weight is not None and source.limit is not None:
            problems.append(f"{where}weight and limit are two ways to say how many rows; take one of them out")
        if source.columns is not None or source.format is not None:
            columns = data.columns if source.columns is None else source.columns
            problems += _column_problems(columns, source.format or data.format, where)
    if data.val_fraction + data.test_fraction >= 1:
        problems.append("data.val_fraction + data.test_fraction leave no rows to train on; make their sum less than 1")
    asked = train.load_best_model_at_end is True
    unfit = asked and "no" in (train.eval_strategy, train.save_strategy)
    if unfit or (train.chooses_best and train.eval_strategy != train.save_strategy):
        problems.append(
            f"train.load_best_model_at_end needs train.eval_strategy ({train.eval_strategy}) and train.save_strategy "
            f"({train.save_strategy}) to be the same; set both to 'epoch' or both to 'steps', or load_best_model_at_end: false"
        )
    if (
        train.chooses_best
        and train.save_strategy == train.eval_strategy == "steps"
        and train.save_steps % train.eval_steps
    ):
        problems.append(
            f"train.save_steps ({train.save_steps}) must be a multiple of train.eval_steps ({train.eval_steps}), "
            "so that every checkpoint has a validation loss to be chosen by"
        )
    if train.early_stopping_patience and not train.chooses_best:
        problems.append(
            "train.early_stopping_patience needs load_best_model_at_end: auto or true, and an eval_strategy"
        )
    if data.val_fraction == 0 and (asked or train.early_stopping_patience):
        key = "load_best_model_at_end" if asked else "early_stopping_patience"
        problems.append(
            f"train.{key} needs val rows, and data.val_fraction is 0; set data.val_fraction: 0.1, or "
            + ("load_best_model_at_end: auto" if asked else "early_stopping_patience: 0")
        )
    if config.tuning.init_adapter and config.tuning.mode == "full":
        problems.append(
            "tuning.init_adapter begins with an adapter, and tuning.mode full trains none; use qlora or lora"
        )
    if train.precision in ("bf16", "fp16") and getattr(train, train.precision) is False:
        problems.append(
            f"train.precision is {train.precision}, but train.{train.precision} is false; take one of them out"
        )
    if problems:
        raise UserError("\n       ".join(f"{path}: {problem}" for problem in problems), "change the values named above")


def _column_problems(columns: Mapping[Any, str], row_format: str, where: str) -> Iterator[str]:
    """What is wrong with own column names for rows of that format; ``where`` stands before the key's name."""
    named = set(columns)
    pair_names = named & {"user", "assistant"}
    if "messages" in named and pair_names:
        yield f"{where}columns names messages and also user or assistant; a row has the one or the others"
    if "text" in named and len(named) > 1:
        yield f"{where}columns names text and also others; a text has no other part"
    allowed = {"messages": named - pair_names, "sharegpt": named - pair_names, "pairs": named - {"messages"}}
    allowed["text"] = named & {"text"}
    allowed["alpaca"] = named - {"messages", "user"}  # its question is made from two columns
    if wrong := sorted(named - allowed.get(row_format, named)):
        yield f"{where}columns names {' and '.join(wrong)}, which rows of data.format {row_format} do not have"
    if len({name.strip().lower() for name in columns.values()}) < len(named):
        yield f"{where}columns gives one column two meanings"


def to_yaml(config: "Config") -> str:
    """The resolved config as YAML text, every key spelt out."""
    import yaml

    return str(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def data_name(config: "Config") -> str:
    """Name of the data set's folders: ``data.name``, else made from the names of the raw files."""
    from scripts.utils.files import check_name, sha256_json

    if config.data.name:
        return check_name(config.data.name, "data.name")
    named = [source.raw for source in config.data.sources] or [config.data.raw]
    paths = [path for raw in named for path in ([raw] if isinstance(raw, str) else raw)]
    stems = [_stem(Path(path.rstrip("/"))) for path in paths] or ["raw"]
    safe = [
        "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in stem).strip("-_") for stem in stems
    ]
    name = "+".join(part or "data" for part in safe)
    return name if len(name) <= 60 else f"{name[:48].rstrip('+-')}-{sha256_json(paths)[:8]}"


def _stem(path: Path) -> str:
    """The name of a file or folder up to its first dot; of a pattern all of it, and the folder that it looks in."""
    if set("*?[") & set(path.name):
        return re.sub(r"[^A-Za-z0-9_]+", "-", f"{path.parent.name} {path.name}")
    return path.name.split(".")[0]


def run_name(config: "Config", path: str | Path) -> str:
    """Name of the run: RUN or ``run.name``, else ``<config file>-<data set>``."""
    from scripts.utils.files import check_name

    return check_name(config.run.name or f"{Path(path).stem}-{data_name(config)}", "run name")
