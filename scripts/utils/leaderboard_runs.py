"""What a leaderboard knows of each run: its settings, state, losses and evaluation, read from what it left so far.

Nothing here needs torch, and a damaged or missing file of one run costs that run's figures and a line of warning.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.utils import files, growing, hparams, metrics, stamp
from scripts.utils.errors import RefusedError, SFTError, UserError

Points = list[tuple[int, float]]
SEED = "train.seed"


@dataclass(frozen=True)
class Entry:
    """A run. ``scores``: the tuned model's metrics by name, and ``val_loss``, the lowest validation loss.

    ``settings`` by dotted key; ``rows`` is the hash of the rows that it was evaluated on; ``memory`` is the peak in GiB;
    ``seconds`` those of its starts, ``seconds_known`` False where one was killed and its end is not known.
    """

    run: str
    state: str
    detail: str = ""
    base: str = ""
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    rows: str = ""
    tokens_per_second: float | None = None
    seconds: float | None = None
    seconds_known: bool = True
    memory: float | None = None
    train: Points = field(default_factory=list)
    val: Points = field(default_factory=list)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    name: str
    runs: list[dict[str, Any]]


def all_runs() -> list[Entry]:
    """Every run in outputs/ that came so far as to load its model."""
    return [read(path.parent.name) for path in sorted(Path("outputs").glob("*/backend.json"))]


def read(run: str) -> Entry:
    """What there is of a run; never an error."""
    folder, warnings = Path("outputs") / run, list[str]()

    def attempt(what: Any, otherwise: Any) -> Any:
        try:
            return what()
        except (OSError, SFTError, ValueError, KeyError, TypeError, AttributeError) as problem:
            said = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            warnings.append(f"run {run}: {said}")
            return otherwise

    facts = attempt(lambda: _facts(folder / "backend.json"), {})
    config = attempt(lambda: hparams.read_config(folder), {})
    evaluation = attempt(lambda: _evaluation(folder), None)
    logged = attempt(lambda: _logged(folder / "metrics.jsonl", warnings), [])
    rows = attempt(lambda: _rows(folder, evaluation), "") if evaluation else ""
    state, detail = attempt(lambda: _state(facts, folder), ("unknown", "")) if facts else ("damaged", "")
    seconds, known = attempt(lambda: _seconds(facts, state), (None, True))
    train, val = (
        [(line["step"], line[key]) for line in logged if _number(line.get(key))] for key in ("loss", "eval_loss")
    )
    scores = attempt(lambda: _scores(evaluation), {}) if evaluation else {}
    if val:
        scores = {"val_loss": min(loss for _, loss in val), **scores}
    return Entry(
        run=run,
        state=state,
        detail=detail,
        base=str(attempt(lambda: facts["model"]["name"], "") if facts else ""),
        data=str(attempt(lambda: facts["data"]["name"], "") if facts else ""),
        settings=dict(hparams.deciding(config)),
        facts=facts,
        steps=max((line["step"] for line in logged), default=None),
        scores=scores,
        evaluation=evaluation,
        rows=rows,
        tokens_per_second=_speed(logged),
        seconds=seconds,
        seconds_known=known,
        memory=max((line["memory_gib"] for line in logged if _number(line.get("memory_gib"))), default=None),
        train=train,
        val=val,
        warnings=tuple(warnings),
    )


def _facts(path: Path) -> dict[str, Any]:
    found = files.read_json(path)
    if not isinstance(found, dict) or "status" not in found:
        raise ValueError(f"{path} is damaged: there is no status in it")
    return found


def _evaluation(folder: Path) -> dict[str, Any] | None:
    found = hparams.read_evaluation(folder)
    settings = found["settings"] if found else {}
    known = (settings.get("rows"), settings.get("max_new_tokens", 0))
    if found and not all(isinstance(value, int) for value in known):
        raise ValueError(f"{folder / 'eval' / 'metrics.json'} is damaged: its settings are none")
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _logged(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    found, damaged = growing.entries(path)
    if damaged:
        warnings.append(f"{path}: {damaged:,} damaged lines were passed over")
    return found


def _rows(folder: Path, evaluation: Mapping[str, Any]) -> str:
    """Hash of the rows that were evaluated; an older evaluation did not write it down."""
    known = evaluation["data"].get("rows_sha256")
    return str(known) if known else metrics.rows_hash(samples(folder.name, evaluation))


def samples(run: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run's evaluation with their scores; raises ``ValueError`` where the file is of another evaluation."""
    path = Path("outputs") / run / "eval" / "samples.jsonl"
    if not path.is_file() or files.sha256_file(path) != evaluation.get("samples_sha256"):
        raise ValueError(f"{path} is missing or of another evaluation than metrics.json")
    return list(files.read_jsonl(path))


def _scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {name: evaluation["tuned"][name] for name in metrics.METRICS if _number(evaluation["tuned"].get(name))}


def _state(facts: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """trained, training, interrupted, killed or failed, and in the last case why."""
    if facts["status"] == "finished":
        return "trained", ""
    if is_locked(folder / ".lock"):
        return "training", ""
    how = str((facts.get("starts") or [{}])[-1].get("ended", ""))
    if how.startswith("failed"):
        return "failed", how.removeprefix("failed").strip(": ")
    return ("killed" if how == "running" else how or "unknown"), ""


def is_locked(path: Path) -> bool:
    """Whether a process is training this run: it holds the lock until it ends, however it ends."""
    import fcntl

    try:
        with path.open("rb") as file:
            # shared, and for an instant: a training that begins just now waits for no one
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _seconds(facts: Mapping[str, Any], state: str) -> tuple[float | None, bool]:
    """Seconds of all starts, loading and validation included; and whether the end of each is known."""
    total, known, any_start = 0.0, True, False
    for start in facts.get("starts") or ():
        until = start.get("until") or (stamp.now() if state == "training" and start.get("ended") == "running" else None)
        if start.get("at") and until:
            total += (_time(until) - _time(start["at"])).total_seconds()
            any_start = True
        else:
            known = False
    return (total if any_start else None), known


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _speed(logged: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens a second over all logged steps: all tokens by all the time they took."""
    tokens = seconds = before = 0.0
    for line in logged:
        if (
            _number(line.get("tokens_seen"))
            and _number(line.get("tokens_per_second"))
            and line["tokens_per_second"] > 0
        ):
            seconds += (line["tokens_seen"] - before) / line["tokens_per_second"]
            tokens, before = line["tokens_seen"], line["tokens_seen"]
    return tokens / seconds if seconds > 0 else None


def read_sweep(given: str) -> Sweep:
    """The sweep of that name, or of that plan (a YAML file).

    Raises ``UserError`` where there is none, ``RefusedError`` where its record is damaged.
    """
    folder = Path("outputs/sweeps")
    there = {path.parent.name: path for path in sorted(folder.glob("*/sweep.json"))}
    name = given if given in there else Path(given).stem
    path = there.get(name) or next((p for p in there.values() if _plan_of(p) == given), None)
    if path is None:
        hint = f"sweeps here: {', '.join(there)}" if there else "start one first: make sweep SWEEP=<plan>.yaml"
        raise UserError(f"there is no sweep {given!r} (looked for {(folder / name / 'sweep.json').absolute()})", hint)
    found = files.read_json(path)
    runs = found.get("runs") if isinstance(found, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) and isinstance(run.get("run"), str) for run in runs):
        raise RefusedError(
            f"{path.absolute()} is damaged: it holds no list of runs",
            "start the sweep again, which writes it anew from the runs that are there",
        )
    return Sweep(str(found.get("name") or path.parent.name), runs)


def _plan_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("plan"))
    except (OSError, ValueError, AttributeError):
        return ""


def of_sweep(sweep: Sweep) -> list[Entry]:
    """The sweep's runs: what each left, with the state and the failure that the sweep has noted."""
    return [_with_sweep(known) for known in sweep.runs]


def _with_sweep(known: Mapping[str, Any]) -> Entry:
    run, state = str(known["run"]), str(known.get("state") or "unknown")
    variant: dict[str, Any] = found if isinstance(found := known.get("variant"), dict) else {}
    if (Path("outputs") / run / "backend.json").is_file():
        entry = read(run)
    else:
        settings = {**variant, **({SEED: known["seed"]} if known.get("seed") is not None else {})}
        entry = Entry(run, state, data=Path(str(known.get("data") or "")).stem, settings=settings)
    if state in ("failed", "stopped", "pruned"):
        last = [str(line) for line in known.get("last_lines") or () if str(line).strip()]
        error = next((line for line in reversed(last) if line.startswith("error:")), last[-1] if last else "")
        error = str(known.get("error") or error)
        where = f" at {known['step']}" if known.get("step") else ""
        code = f", exit code {known['exit_code']}" if known.get("exit_code") is not None else ""
        tries = f", {known['attempts']} attempts" if (known.get("attempts") or 0) > 1 else ""
        said = f": {error.removeprefix('error:').strip()}" if error else ""
        return replace(entry, state=state, detail=f"{state}{where}{code}{tries}{said}")
    if state in ("waiting", "not started") or (state == "running" and entry.state not in ("training", "trained")):
        return replace(entry, state=state)
    if state == "running" and entry.state == "trained":
        return replace(entry, state="evaluating")
    return entry
