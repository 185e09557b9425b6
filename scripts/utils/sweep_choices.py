"""The points of a sweep: grid × random draws × variants × seeds, each a few config keys with their values."""

import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.utils.sweep_file import Places, place_of

if TYPE_CHECKING:
    from scripts.utils.sweep_schema import Plan, RandomPart

Value = tuple[str, Any, str]  # dotted key, value, the place where it stands
_OTHER_WAYS = {"data.raw": "data:", "run.name": "name:", "train.seed": "seeds:"}


@dataclass(frozen=True)
class Choice:
    """``values`` go over a run's config; ``variant`` is the name of its variant, or empty, and ``named`` the keys that it stands for."""

    values: tuple[Value, ...] = ()
    variant: str = ""
    named: tuple[str, ...] = ()
    seed: int | None = None


def choices(plan: "Plan", places: Places) -> list[Choice]:
    """Every combination, in the order in which the plan names them."""
    parts = [list(_grid(plan, places)), list(_drawn(plan.random, places)), list(_variants(plan, places))]
    seeds = [Choice((("train.seed", seed, place_of(places, ("seeds",))),), seed=seed) for seed in plan.seeds]
    found = []
    for together in itertools.product(*parts, seeds or [Choice()]):
        values = tuple(value for part in together for value in part.values)
        variant = together[2]
        found.append(Choice(values, variant.variant, variant.named, together[-1].seed))
    return found


def count(plan: "Plan") -> int:
    """How many combinations there are; they are not made for it."""
    draws = plan.random.count if plan.random else 1
    return math.prod(map(len, plan.grid.values())) * draws * max(len(plan.variants), 1) * max(len(plan.seeds), 1)


def problems(plan: "Plan", places: Places) -> Iterator[str]:
    """Keys that cannot be varied here, and keys that two parts of the plan would set."""
    parts = {
        "grid": [canonical(key) for key in plan.grid],
        "random": [canonical(key) for key in (plan.random.values if plan.random else ())],
        "variants": [canonical(key) for variant in plan.variants for key in variant if key != "name"],
        "seeds": ["train.seed"] if plan.seeds else [],
    }
    spelt = {"grid": list(plan.grid), "random": list(plan.random.values) if plan.random else []}
    for part, keys in spelt.items():
        for key in keys:
            if (name := canonical(key)) in _OTHER_WAYS:
                yield f"{place_of(places, (part, key))}: {name} is not varied here; say it with {_OTHER_WAYS[name]}"
    for number, variant in enumerate(plan.variants):
        for key in variant:
            if canonical(key) in ("data.raw", "run.name"):
                where = place_of(places, ("variants", str(number), key))
                yield f"{where}: {key} is not varied here; say it with {_OTHER_WAYS[canonical(key)]}"
    for one, other in itertools.combinations(parts, 2):
        for key in sorted(set(parts[one]) & set(parts[other])):
            yield f"{place_of(places, (other,))}: {key} stands in {one} and in {other}; take one of them out"


def canonical(key: str) -> str:
    """The key's own name, where another tool's was written: train.lr is train.learning_rate."""
    from scripts.utils.schema import ALIASES

    section, dot, name = key.partition(".")
    return f"{section}.{ALIASES.get(section, {}).get(name, name)}" if dot else key


def _grid(plan: "Plan", places: Places) -> Iterator[Choice]:
    named = [[(key, value, place_of(places, ("grid", key))) for value in values] for key, values in plan.grid.items()]
    for point in itertools.product(*named):
        yield Choice(point)


def _variants(plan: "Plan", places: Places) -> Iterator[Choice]:
    if not plan.variants:
        yield Choice()
    for number, variant in enumerate(plan.variants):
        values = [
            (key, value, place_of(places, ("variants", str(number), key)))
            for key, value in variant.items()
            if key != "name"
        ]
        name = str(variant.get("name") or "")
        yield Choice(tuple(values), name, tuple(canonical(key) for key, _, _ in values) if name else ())


def _drawn(part: "RandomPart | None", places: Places) -> Iterator[Choice]:
    """A dice for each key: another key, or more draws, leave the draws that were there as they were."""
    if part is None:
        yield Choice()
        return
    dice = {key: random.Random(f"{part.seed} {canonical(key)}") for key in part.values}
    for _ in range(part.count):
        yield Choice(
            tuple(
                (key, _draw(dice[key], canonical(key), possible), place_of(places, ("random", key)))
                for key, possible in part.values.items()
            )
        )


def _draw(dice: random.Random, key: str, possible: Any) -> Any:
    if isinstance(possible, list):
        return dice.choice(possible)
    share = dice.random()
    if possible.log:
        drawn = math.exp(math.log(possible.min) + share * (math.log(possible.max) - math.log(possible.min)))
    else:
        drawn = possible.min + share * (possible.max - possible.min)
    # three digits are as many as matter, and names stay short; rounding must not leave the range
    rounded = min(max(float(f"{drawn:.3g}"), possible.min), possible.max)
    return round(rounded) if takes_whole_numbers(key) else rounded


@functools.cache
def takes_whole_numbers(key: str) -> bool:
    """Whether the config key is a number without a fraction."""
    from scripts.utils.schema import Config

    section, _, name = key.partition(".")
    schema = Config.model_json_schema()
    field = schema["properties"].get(section, {})
    definition = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
    entry = definition.get("properties", {}).get(name, {})
    kinds = {option.get("type") for option in entry.get("anyOf", [entry])}
    return "integer" in kinds and "number" not in kinds
