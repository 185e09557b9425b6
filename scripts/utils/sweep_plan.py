"""From a sweep's plan to its runs: every data set with every config and every choice, named and checked before the first starts."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, stamp, sweep_choices
from scripts.utils.config import data_name, load_config, parse_overrides, run_name
from scripts.utils.errors import UserError
from scripts.utils.sweep_choices import Choice, Value
from scripts.utils.sweep_file import Places, place_of

if TYPE_CHECKING:
    from scripts.utils.schema import Config
    from scripts.utils.sweep_schema import Budget, Plan, Prune

STEPS = ("process", "style", "render", "train", "eval", "merge")
DATA_STEPS = STEPS[:3]
DEFAULT_STEPS = STEPS[:5]
_FIELD = re.compile(r"\{([^{}]*)\}")
_MOST_PROBLEMS = 20
_MOST_RUNS = 5_000


@dataclass(frozen=True)
class Wanted:
    """What is to be run: data sets and configs to combine, values for all (``given``), the plan's choices and the steps."""

    data: tuple[str, ...]
    configs: tuple[str, ...]
    steps: tuple[str, ...]
    given: tuple[Value, ...] = ()
    plan: "Plan | None" = None
    places: Places = field(default_factory=dict)

    @property
    def budget(self) -> "Budget | None":
        return self.plan.budget if self.plan else None

    @property
    def prune(self) -> "Prune | None":
        return self.plan.prune if self.plan else None


@dataclass(frozen=True)
class Run:
    """One run of a sweep. ``variant``: the keys that the plan varies, with this run's values; ``resolved``: its whole config.

    ``fingerprint``: hash of all that it does; equal ones are the same run.
    """

    name: str
    data: str
    config: str
    variant: dict[str, Any]
    seed: int | None
    resolved: "Config"
    fingerprint: str
    steps: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path("outputs") / self.name

    @property
    def log(self) -> Path:
        return self.folder / "batch.log"

    @property
    def data_name(self) -> str:
        return self.resolved.data.name or data_name(self.resolved)


def given_by(plan: "Plan | None", places: Places, words: str, variables: Mapping[str, tuple[str, str]]) -> list[Value]:
    """Values for every run: the plan's set, over it the words of SET, over these make's variables (name → key and value)."""
    where = place_of(places, ("set",))
    found = [
        (".".join(key), value, where)
        for text in (plan.set if plan else [])
        for key, value in parse_overrides(shlex.join([text]), where)
    ]
    found += [(".".join(key), value, "SET") for key, value in parse_overrides(words)]
    return [*found, *((key, value, name) for name, (key, value) in variables.items())]


def expand(wanted: Wanted) -> list[Run]:
    """Every run, checked; raises ``UserError`` with all that is wrong with any of them."""
    problems = dict.fromkeys(sweep_choices.problems(wanted.plan, wanted.places)) if wanted.plan else {}
    total = len(wanted.data) * len(wanted.configs) * (sweep_choices.count(wanted.plan) if wanted.plan else 1)
    if total > _MOST_RUNS:
        hint = "fewer values in grid; or draw from them: random, with a count"
        raise UserError(f"the plan comes to {total:,} runs; a sweep has at most {_MOST_RUNS:,}", hint)
    found = sweep_choices.choices(wanted.plan, wanted.places) if wanted.plan else [Choice()]
    runs: list[Run] = []
    seen = set()
    progress = console.Progress("sweep", "runs checked", total)
    for path in wanted.data:
        for config in wanted.configs:
            for choice in found:
                progress.advance()
                try:
                    run = _one(wanted, path, config, choice, len(runs) + 1)
                except UserError as error:
                    problems |= dict.fromkeys(error.message.split("\n       "))
                    continue
                # two draws may come to the same
                if (path, config, run.fingerprint) not in seen:
                    seen.add((path, config, run.fingerprint))
                    runs.append(run)
    progress.close()
    if problems:
        lines = list(problems)
        more = [f"… and {len(lines) - _MOST_PROBLEMS} more"] if len(lines) > _MOST_PROBLEMS else []
        raise UserError("\n       ".join([*lines[:_MOST_PROBLEMS], *more]), "mend these; nothing was run")
    return _in_folders_of_their_own(_named_apart(runs))


def _one(wanted: Wanted, path: str, config: str, choice: Choice, number: int) -> Run:
    values = [*wanted.given, *choice.values]
    resolved = load_config(config, "", {"data.raw": path}, values)
    if stamp.holds_secret(resolved.model_dump_json()):
        raise UserError(
            f"{config}: a value of this config holds a secret, and a sweep writes the config of each run down", ""
        )
    varied = [sweep_choices.canonical(key) for key, _, _ in choice.values if key != "train.seed" or choice.seed is None]
    variant = {key: value_of(resolved, key) for key in varied}
    pattern = wanted.plan.name if wanted.plan else None
    if pattern:
        facts = {
            "config": Path(config).stem,
            "data": data_name(resolved),
            "seed": resolved.train.seed,
            "number": number,
        }
        facts["variant"] = choice.variant or "-".join(_short(key, value) for key, value in variant.items())
        name = _filled(pattern, facts, resolved, wanted.places.get(("name",), ""))
    else:
        name = "-".join([run_name(resolved, config), *_parts(choice, variant)])
    if len(name) > 100:
        name = f"{name[:90].rstrip('-.')}-{files.sha256_json(name)[:8]}"
    if name == "sweeps":
        raise UserError(f"a run cannot have the name {name!r}: outputs/sweeps holds what sweeps keep", "")
    return Run(
        files.check_name(name, "run name"),
        path,
        config,
        variant,
        choice.seed,
        resolved,
        _fingerprint(resolved, wanted.steps),
        wanted.steps,
    )


def value_of(config: "Config", key: str) -> Any:
    """The config's value for a dotted key."""
    section, _, name = key.partition(".")
    value: Any = config.model_dump(mode="json")[section][name]
    return value


def _parts(choice: Choice, variant: Mapping[str, Any]) -> Iterator[str]:
    """What the name of a run says of its choice: the variant's name for the variant's values, the others one by one."""
    yield from (_short(key, value) for key, value in variant.items() if key not in choice.named)
    if choice.variant:
        yield _safe(choice.variant)
    if choice.seed is not None:
        yield f"seed{choice.seed}"


def _short(key: str, value: Any) -> str:
    """``lr0.001`` for train.learning_rate: the shortest name that the key has."""
    from scripts.utils.schema import ALIASES

    section, _, name = key.partition(".")
    names = [name, *(other for other, own in ALIASES.get(section, {}).items() if own == name)]
    return min(names, key=len) + _word(value)


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(_word(item) for item in value)
    return _safe(str(value).lower() if value is None or isinstance(value, bool) else str(value))


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).replace("..", ".").strip("-.")


def _filled(pattern: str, facts: Mapping[str, Any], config: "Config", where: str) -> str:
    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if name in facts:
            return _word(facts[name])
        try:
            return _word(value_of(config, sweep_choices.canonical(name)))
        except KeyError:
            known = ", ".join(f"{{{fact}}}" for fact in facts)
            raise UserError(f"{where}: name: {{{name}}} is neither a config key nor one of {known}", "") from None

    return _safe(_FIELD.sub(value, pattern))


def _fingerprint(config: "Config", steps: Sequence[str]) -> str:
    """Hash of what a run does: its config, but for the names of run and data folders, and its steps."""
    settings = config.model_dump(mode="json")
    settings["run"].pop("name")
    settings["data"].pop("name")
    return files.sha256_json([settings, list(steps)])


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs that would meet in one folder get a few letters of a hash of what the plan says of them: it stays, whatever else changes."""
    count = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name[:93]}-{files.sha256_json([run.data, run.config, run.variant, run.seed])[:6]}")
        if count[run.name] > 1
        else run
        for run in runs
    ]


def _in_folders_of_their_own(runs: Sequence[Run]) -> list[Run]:
    """Name runs and data folders in the configs: rows that come out differently never share a folder.

    Equal ones do, so they are made once.
    """

    def made_by(config: "Config") -> str:
        settings = config.model_dump(mode="json")
        settings["data"].pop("name")
        model = config.model.name, config.model.revision
        return files.sha256_json([settings["data"], settings["style"], settings["render"], model])

    kinds: dict[str, set[str]] = {}
    for run in runs:
        kinds.setdefault(data_name(run.resolved), set()).add(made_by(run.resolved))
    named = []
    for run in runs:
        name = data_name(run.resolved)
        if len(kinds[name]) > 1:
            name = f"{name[:93]}-{made_by(run.resolved)[:6]}"
        sections = {
            "run": run.resolved.run.model_copy(update={"name": run.name}),
            "data": run.resolved.data.model_copy(update={"name": name}),
        }
        named.append(replace(run, resolved=run.resolved.model_copy(update=sections)))
    return named
