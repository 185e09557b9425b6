"""What a checkpoint holds beside the weights: optimizer, schedule, scaler, random numbers and the loop's own counters.

Tensors go into a safetensors file and everything else into JSON, so that no pickle is ever written or read: the stock
files (optimizer.pt, scheduler.pt, rng_state.pth) are pickles.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scripts.utils import files
from scripts.utils.errors import RefusedError

TENSORS, TREE = "training_state.safetensors", "training_state.json"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, text, tensors and numpy arrays into ``folder``."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _to_json(state, "", tensors)
    save_file(tensors, str(folder / TENSORS))
    files.usual_mode(folder / TENSORS)
    files.write_json(folder / TREE, tree)


def load(folder: Path) -> dict[str, Any]:
    """The tree that ``save`` wrote, tensors on the CPU. Raises ``RefusedError`` for anything else."""
    try:
        tensors = load_file(str(folder / TENSORS))
        return _from_json(files.read_json(folder / TREE), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"{folder.absolute()}: the training state does not load: {error}",
            "delete nothing; go on from an older checkpoint by moving this folder away",
        ) from error


def _to_json(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # a copy: safetensors refuses tensors that share memory, as the tables of 8-bit optimizers do
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, np.ndarray):
        return {"$array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        # pairs, as the keys of an optimizer's state are numbers
        return {"$dict": [[key, _to_json(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [_to_json(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint")


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$array" in value:
        return np.array(value["$array"], dtype=value["dtype"])
    if "$tuple" in value:
        return tuple(_from_json(item, tensors) for item in value["$tuple"])
    return {key: _from_json(item, tensors) for key, item in value["$dict"]}


def random_state() -> dict[str, Any]:
    """Where every generator stands that training may draw from (dropout is all that does)."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def seed_anew(seed: int, rank: int, step: int) -> None:
    """Other numbers on each rank, where none were saved for it: each would draw the dropout of the first one otherwise."""
    mixed = (seed * 1_000_003 + rank * 10_007 + step) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
