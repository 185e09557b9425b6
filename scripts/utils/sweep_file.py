"""The YAML file of a sweep, with what it includes: its values, each with the file and line that it stands in."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import yaml_text
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from scripts.utils.sweep_schema import Plan

Places = dict[tuple[str, ...], str]
_OF_THE_SCHEMA = ("values", "list", "range")  # steps of a problem's location that do not stand in the file
_RESERVED = ("count", "seed")


def read(path: Path) -> tuple["Plan", Places]:
    """The plan and the place (``file:line``) of each of its keys. Raises ``UserError`` with every problem at once."""
    from pydantic import ValidationError

    from scripts.utils.sweep_schema import Plan

    values, places = _merged(path, ())
    random = values.get("random")
    if isinstance(random, dict):
        drawn = {key: value for key, value in random.items() if key not in _RESERVED}
        values["random"] = {**{key: random[key] for key in _RESERVED if key in random}, "values": drawn}
    try:
        return Plan.model_validate(values), places
    except ValidationError as error:
        problems = [_problem(item, places, path) for item in error.errors()]
        raise UserError("\n       ".join(problems), "docs/sweeps.md explains the keys; nothing was run") from error


def place_of(places: Mapping[tuple[str, ...], str], key: tuple[str, ...], otherwise: str = "") -> str:
    """Where ``key`` stands, or the nearest key around it."""
    return next((places[key[:length]] for length in range(len(key), 0, -1) if key[:length] in places), otherwise)


def _merged(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Places]:
    """The file over what it includes: mappings are merged key by key, everything else is replaced."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: includes itself by way of {seen[-1]}", "take one of the include: lines out")
    own, lines = yaml_text.load(path)
    include = own.pop("include", None)
    values: dict[str, Any] = {}
    places: Places = {}
    for name in [include] if isinstance(include, str) else include or []:
        inner, inner_places = _merged(path.parent / str(name), (*seen, resolved))
        _put(values, places, inner, inner_places)
    _put(values, places, own, {key: f"{path}:{line}" for key, line in lines.items()})
    return values, places


def _put(values: dict[str, Any], places: Places, new: dict[str, Any], new_places: Places) -> None:
    for key, value in new.items():
        if value is None:
            continue  # a key without a value says nothing
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        else:
            values[key] = value
            for old in [place for place in places if place[0] == key]:
                del places[old]
    places.update({key: place for key, place in new_places.items() if key[0] in values})


def _problem(item: Any, places: Places, path: Path) -> str:
    """One line for one problem: where, which key, what was expected, the nearest known key."""
    location = tuple(str(part) for part in item["loc"] if part not in _OF_THE_SCHEMA)
    where = place_of(places, location, str(path))
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_beside(location)
        close = difflib.get_close_matches(location[-1], known, 1)
        return f"{where}: unknown key {dotted!r}; " + (
            f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        )
    if item["type"] == "missing":
        return f"{where}: {dotted} is missing"
    if item["type"] == "value_error":
        return f"{where}: {dotted}: {item['ctx']['error']}"
    expected = item["msg"].removeprefix("Input should be ").replace("a valid string", "text")
    return f"{where}: {dotted} is {item['input']!r}, expected {expected}"


def _known_beside(location: tuple[str, ...]) -> list[str]:
    from scripts.utils import sweep_schema

    if len(location) == 1:
        return ["include", *sweep_schema.Plan.model_fields]
    if location[0] == "random":
        return list((sweep_schema.Range if len(location) > 2 else sweep_schema.RandomPart).model_fields)
    return list((sweep_schema.Budget if location[0] == "budget" else sweep_schema.Prune).model_fields)
