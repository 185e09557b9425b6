"""A run's settings and results as TensorBoard's HPARAMS page sorts them: which keys count, and what came of them."""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from scripts.utils import console, event_log, files, metrics, stamp
from scripts.utils.errors import SFTError

# what says only where things lie, how often something is written, or how the same is computed
_NOT_DECIDING = re.compile(
    r"data\.(raw|sources|name|format|columns|max_rejected)$|train\.(logging_steps|eval_steps|eval_strategy|save_\w+|self_test"
    r"|bf16|fp16|precision_strict|lean_lora|share_prefix|fused_kernels|activation_offload|gradient_checkpointing)$"
    r"|model\.embeddings$|tuning\.fallback$"
)


def deciding(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of each key that decides what a run learns, in the config's order."""
    for section in ("model", "data", "style", "render", "tuning", "lora", "train"):
        values = config.get(section)
        if section == "lora" and (config.get("tuning") or {}).get("mode") == "full":
            continue
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if not _NOT_DECIDING.match(f"{section}.{key}"):
                yield f"{section}.{key}", value


def of_config(config: Mapping[str, Any], data: str) -> dict[str, str | float | bool]:
    """The deciding keys of a resolved config as HParams: numbers, switches and texts; what is not set is left out."""
    found: dict[str, str | float | bool] = {"data": data}
    for key, value in deciding(config):
        if value is not None and value != {} and value != []:
            found[key] = value if isinstance(value, str | int | float | bool) else str(value)
    return found


def results_of(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """An ended run's results by name: the lowest validation loss, and the tuned model's figures on its split."""
    best = (facts.get("result") or {}).get("best_eval_loss")
    return ({"eval/best_loss": best} if best is not None else {}) | scores_of(evaluation)


def scores_of(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """The tuned model's metrics as the trackers name them: ``test/exact_match``."""
    if not evaluation:
        return {}
    split, tuned = evaluation["settings"]["split"], evaluation["tuned"]
    return {f"{split}/{name}": tuned[name] for name in metrics.METRICS if tuned.get(name) is not None}


def fill(run: str) -> bool:
    """Put an ended run's settings and results into its TensorBoard folder, once; whether that changed anything.

    Nothing is done where the run has no TensorBoard files or has not ended, and no failure is more than a warning.
    """
    try:
        folder = stamp.run_folder(run)
        facts = stamp.read(run)
        events = folder / "tensorboard"
        if not facts or facts.get("status") != "finished" or not events.is_dir() or not any(events.iterdir()):
            return False
        return event_log.put_results(
            events,
            run,
            of_config(read_config(folder), facts["data"]["name"]),
            results_of(facts, read_evaluation(folder)),
            (facts.get("result") or {}).get("steps") or 0,
            _seconds((facts.get("starts") or [{}])[0].get("at")),
        )
    except (OSError, SFTError, ValueError, KeyError, TypeError, AttributeError) as problem:
        said = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        console.warn(f"run {run}: TensorBoard's HPARAMS page does not show its results ({said})")
        return False


def as_text(config: Mapping[str, Any]) -> str:
    """A resolved config as YAML without secrets. Taken out before it becomes YAML: a bare ``***`` would be read as an alias."""
    import yaml

    return str(yaml.safe_dump(stamp.without_secrets(dict(config)), sort_keys=False, allow_unicode=True))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    files.write_text(folder / "config.yaml", as_text(config))


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config in a run's folder, in sections, without secrets; empty where there is none. Damage is a ``ValueError``."""
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no mapping of sections")
    return dict(stamp.without_secrets(found))


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What the newest evaluation of a run found; None where there is none. Damage is a ``ValueError``."""
    path = folder / "eval" / "metrics.json"
    if not path.is_file():
        return None
    try:
        found = files.read_json(path)
    except SFTError as error:
        raise ValueError(f"{path} is damaged") from error
    parts = ("tuned", "settings", "data")
    if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in parts):
        raise ValueError(f"{path} is damaged: it lacks one of {', '.join(parts)}")
    return found


def _seconds(time: str | None) -> float:
    return datetime.fromisoformat(time).timestamp() if time else 0.0
