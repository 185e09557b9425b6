"""Fused CUDA kernels of the package liger-kernel for norms, rotary positions and the MLP's gate, where they are installed.

The loss and attention stay SFT-Play's own. What is put into the model is compared with what was there, and taken out again
where it changes the loss.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from scripts.utils.errors import MachineError

PACKAGE = "liger-kernel"


def version() -> str | None:
    """The installed version, or None."""
    from importlib import metadata  # --help does not wait for it

    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def put(model: Any, wanted: "str | bool", device: str, loss: Callable[[], float], tolerance: float) -> str | None:
    """Put the kernels into ``model`` where ``wanted`` (true, false, auto); return whose they are, or None for none.

    ``loss`` computes some loss of the model: more than ``tolerance`` of it off, and they are taken out again. Raises
    ``MachineError`` where they were asked for (true) and cannot be had.
    """
    if wanted is False:
        return None
    why = None
    if device != "cuda":
        why = "they run on NVIDIA cards"
    elif version() is None:
        why = f"{PACKAGE} is not installed"
    if why is None:
        why = _try(model, loss, tolerance, _liger)
        if why is None:
            return f"{PACKAGE} {version()}"
    if wanted is True:
        raise MachineError(
            f"train.fused_kernels: true cannot be had: {why}",
            "make install EXTRAS=liger, or set train.fused_kernels: auto",
        )
    return None


def _try(model: Any, loss: Callable[[], float], tolerance: float, change: Callable[[Any], None]) -> str | None:
    """None where ``change`` left the loss as it was; else the reason why it was undone."""
    before = loss()
    with _undoing(model) as undo:
        try:
            change(model)
            after = loss()
        except Exception as error:  # a library's own trouble with this model; the plain way is there
            undo()
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not abs(after - before) <= tolerance * abs(before) + 1e-6:  # NaN fails too
            undo()
            return f"they changed the loss of two examples from {before:.6g} to {after:.6g}"
    return None


def _liger(model: Any) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it names every backend that it does not find

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


@contextlib.contextmanager
def _undoing(model: Any) -> Iterator[Callable[[], None]]:
    """A function that gives modules and the modelling file's names back what they had at the beginning."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    namespaces = [vars(module) for module in model.modules()] + [vars(sys.modules[type(causal).__module__])]
    kept = [dict(namespace) for namespace in namespaces]

    def undo() -> None:
        for namespace, earlier in zip(namespaces, kept, strict=True):
            namespace.clear()
            namespace.update(earlier)

    yield undo
