"""Whether a run starts, goes on or is done, and what must be the same for it to go on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import checkpoints, console, stages, stamp
from scripts.utils.errors import RefusedError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

# keys of train: that decide the loss curve
_CURVE = (
    "seed batch_size gradient_accumulation packing pack_length optimizer learning_rate scheduler warmup weight_decay "
    "max_grad_norm epochs max_steps early_stopping_patience"
).split()


def identity_of(
    config: "Config", backend: str, precision: str, model_hash: str, manifest: dict[str, Any]
) -> dict[str, Any]:
    """What decides the loss curve: a resumed run must have all of it in common with its start."""
    return {
        "backend": backend,
        "model": model_hash,
        "mode": config.tuning.mode,
        "lora": None if config.tuning.mode == "full" else config.lora.model_dump(),
        "precision": precision,
        "data": stages.data_hash(manifest),
        "template": manifest["template"]["sha256"],
        "max_length": config.render.max_length,
        **{key: getattr(config.train, key) for key in _CURVE},
    }


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
    if changed := stamp.changed_identity(known, identity):
        lines = "\n".join(f"         {key}: then {then}, now {now}" for key, then, now in changed)
        raise RefusedError(
            f"run {run!r} was started with other settings:\n{lines}",
            "start another run with RUN=…, or restore the old values",
        )
    if known["status"] == "finished":
        return None
    checkpoint, passed_over = checkpoints.newest_whole(folder)
    for line in passed_over:
        console.warn(f"passed over {line}")
    if checkpoint is None:
        if resume == "must":
            raise RefusedError(
                f"run {run!r} has no whole checkpoint to resume from", "leave RESUME out to start it again"
            )
        console.note("train", f"run {run} was started before but has no whole checkpoint: starting again")
        return None
    console.note("train", f"run {run}: going on from {checkpoint}")
    return checkpoint


def is_finished(run: str) -> bool:
    known = stamp.read(run)
    return known is not None and known["status"] == "finished"
