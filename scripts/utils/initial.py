"""An adapter that a new run begins with (``tuning.init_adapter``), proven to be of the same base and shape."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import adapters, console, files, stamp
from scripts.utils.errors import RefusedError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import LoraSection


@dataclass(frozen=True)
class InitialAdapter:
    """``hash`` is the sha256 of the weights, which the new run's identity holds."""

    folder: Path
    hash: str


def find(name: str, lora: "LoraSection", model_hash: str) -> InitialAdapter:
    """The adapter called ``name`` (a run, or a folder) if a run on this base model with these settings can begin with it.

    Raises ``UserError`` when it is not there or of another shape, ``RefusedError`` when it is damaged, pickled, or was
    trained on another base model.
    """
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        folder = stamp.adapter_folder(name) if "/" not in name else folder
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"tuning.init_adapter: {name!r} is neither a run with an adapter nor an adapter's folder "
            f"(looked for {(folder / 'adapter_config.json').absolute()})",
            "name a finished run, or the folder that holds adapter_model.safetensors",
        )
    adapters.verify(folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise RefusedError(f"{weights.absolute()} is missing", "only safetensors adapters are loaded")
    shape = files.read_json(folder / "adapter_config.json")
    other = [
        f"{key}: the adapter has {shape.get(theirs)}, lora.{key} is {ours}"
        for key, theirs, ours in (("r", "r", lora.r), ("alpha", "lora_alpha", lora.alpha))
        if shape.get(theirs) != ours
    ]
    if other:
        raise UserError(f"{folder}: {'; '.join(other)}", "set the same values as the adapter was trained with")
    if not (folder / adapters.MANIFEST).is_file():
        console.warn(f"{folder} says nothing of its base model's content; only names and shapes can be compared")
    elif (base := files.read_json(folder / adapters.MANIFEST)["base"].get("path_hash")) != model_hash:
        raise RefusedError(
            f"{folder}: it was trained on another base model ({str(base)[:12]}…, this is {model_hash[:12]}…)",
            "set model.name to the base model of that adapter",
        )
    return InitialAdapter(folder, files.sha256_file(weights))


def put(model: Any, init: InitialAdapter) -> None:
    """Give a fresh adapter the weights of ``init``; raises ``RefusedError`` unless each one fits."""
    adapters.load_weights(model, init.folder)
