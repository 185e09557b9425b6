"""Whether a run starts, goes on or is done, and what must be the same for it to go on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import checkpoints, console, files, stages, stamp
from scripts.utils.errors import RefusedError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

# keys of train: that decide the loss curve
_CURVE = (
    "seed batch_size gradient_accumulation packing pack_length optimizer learning_rate scheduler warmup weight_decay "
    "max_grad_norm epochs max_steps early_stopping_patience"
).split()
Change = tuple[str, Any, Any]


def identity_of(
    config: "Config",
    backend: str,
    precision: str,
    model_hash: str,
    manifest: dict[str, Any],
    init_adapter: str | None = None,
) -> dict[str, Any]:
    """What decides the loss curve: a resumed run must have all of it in common with its start."""
    return {
        "backend": backend,
        "model": model_hash,
        "mode": config.tuning.mode,
        "lora": None if config.tuning.mode == "full" else config.lora.model_dump(),
        "init_adapter": init_adapter,
        "precision": precision,
        "data": stages.data_hash(manifest),
        "template": manifest["template"]["sha256"],
        "max_length": config.render.max_length,
        **{key: getattr(config.train, key) for key in _CURVE},
    }


def changed_identity(then: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Keys that decide the loss curve and differ: (key, then, now).

    A longer run is no change where every step that was done would have been the same: with a constant learning rate.
    """
    changes = [(key, then.get(key), now.get(key)) for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    names = {key for key, _, _ in changes}
    if names <= {"epochs", "max_steps"} and _is_constant(now) and _is_longer(then, now):
        return []
    return changes


def _is_constant(identity: dict[str, Any]) -> bool:
    scheduler, warmup = identity.get("scheduler"), identity.get("warmup", 0)
    # a warmup below 1 is a share of the steps, so it moves with them
    return scheduler == "constant" or (scheduler == "constant_with_warmup" and (warmup == 0 or warmup >= 1))


def _is_longer(then: dict[str, Any], now: dict[str, Any]) -> bool:
    if bool(then.get("max_steps")) != bool(now.get("max_steps")):
        return False  # steps and epochs cannot be compared without the data
    key = "max_steps" if now.get("max_steps") else "epochs"
    # part of an epoch ends where the next whole one would go on, so only the length matters
    return bool(now[key] >= then[key])


def is_extension(run: str, identity: dict[str, Any]) -> bool:
    """Whether a finished run is asked to go on for longer."""
    known = stamp.read(run)
    return known is not None and known.get("identity") != identity


def decide_start(run: str, folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    Raises ``RefusedError`` when the run's earlier start does not match what is asked for now, when ``resume`` is
    'never' and the run exists, or 'must' and there is nothing to resume.
    """
    known = stamp.read(run)
    if known is None:
        if resume == "must":
            raise RefusedError(
                f"run {run!r} has nothing to resume (no {stamp.path_of(run)})", "leave RESUME out to start it"
            )
        return None
    if resume == "never":
        raise RefusedError(
            f"run {run!r} exists already ({folder.absolute()})", "choose another name with RUN=…, or leave RESUME out"
        )
    checkpoint, passed_over = checkpoints.newest_whole(folder)
    trained = bool(checkpoints.listed(folder)) or any(start["step"] for start in known["starts"])
    if trained or known["status"] == "finished":  # before the first step there is nothing to protect
        _refuse_changes(run, "was started", changed_identity(known.get("identity", {}), identity))
    if known["status"] != "finished":
        for line in passed_over:
            console.warn(f"passed over {line}")
    if checkpoint is None:
        if resume == "must":
            raise RefusedError(
                f"run {run!r} has no whole checkpoint to resume from", "leave RESUME out to start it again"
            )
        if known["status"] != "finished":
            console.note("train", f"run {run} was started before but has no whole checkpoint: starting again")
        return None
    _refuse_changes(
        run,
        f"has a checkpoint ({checkpoint.name}) that was trained",
        changed_identity(checkpoints.identity_in(checkpoint), identity),
    )
    return checkpoint


def _refuse_changes(run: str, what: str, changed: list[Change]) -> None:
    if not changed:
        return
    cells = [("key", "then", "now"), *((key, _shown(then), _shown(now)) for key, then, now in changed)]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    lines = "\n".join(f"         {a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in cells)
    raise RefusedError(
        f"run {run!r} {what} with other settings:\n{lines}",
        f"three ways on: another run, RUN={run}-2; restore the values under 'then' to go on; or another run that "
        f'begins with this one\'s adapter, RUN={run}-2 SET="tuning.init_adapter={run}"',
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    text = "–" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text  # a hash


def has_ended(checkpoint: Path, steps: int, patience: int) -> bool:
    """Whether training was over when the checkpoint was saved: all steps done, or stopped early."""
    state = files.read_json(checkpoint / "trainer_state.json")
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    return bool(state["global_step"] >= steps) or stops_early(losses, patience)


def cut_metrics(path: Path, step: int) -> None:
    """Take out of metrics.jsonl what lies after ``step``: those steps are about to be made again.

    A last line that a kill cut in half goes too.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            kept.append(entry)
    files.write_jsonl(path, kept)


def stops_early(losses: list[float], patience: int) -> bool:
    """Whether the last ``patience`` validation losses brought no new minimum (0: never)."""
    return patience > 0 and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def is_finished(run: str) -> bool:
    known = stamp.read(run)
    return known is not None and known["status"] == "finished"
