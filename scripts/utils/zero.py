"""ZeRO by DeepSpeed: each rank holds a part of the optimizer's states (stage 1), and of the gradients too (stage 2).

DeepSpeed gets the trained weights, torch's own AdamW and the loss of a row. The rest of the model it never sees, it compiles
nothing, and its checkpoints, which are pickles, are not used: what is saved and loaded here is what one process has.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from scripts.utils import environment, ranks

_BUCKET = 2**26  # numbers that are sent at a time; DeepSpeed lays out a buffer for as many


class _RowLoss(torch.nn.Module):
    """What DeepSpeed takes for the model: the trained weights, and a row's loss as its forward pass."""

    def __init__(self, loss: Callable[[Any], torch.Tensor], trained: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.trained = torch.nn.ParameterList(trained)
        self._loss = loss

    def forward(self, row: Any) -> torch.Tensor:
        return self._loss(row)


class ZeroOptimizer(torch.optim.Optimizer):
    """What the Trainer steps, saves and restores: groups and state as ``plain``, the optimizer of one process, has them.

    ``plain`` itself goes to DeepSpeed and works on this rank's part of the weights from here on. All ranks must call each
    method, in the same order.
    """

    def __init__(
        self, plain: torch.optim.Optimizer, loss: Callable[[Any], torch.Tensor], *, stage: int, clip: float, device: str
    ) -> None:
        # DeepSpeed takes out the groups without a weight and the weights out of the others; the Trainer's stay as they are
        super().__init__([{**group} for group in plain.param_groups], plain.defaults)
        trained = [weight for group in self._groups() for weight in group["params"]]
        self.engine = _start(_RowLoss(loss, trained), plain, stage, clip, device)
        self._plain = plain

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["params"]]

    def loss_of_row(self, row: Any, last: bool) -> torch.Tensor:
        """The summed loss of one micro batch; ``last``: of the step, on this rank. A call of ``backward`` must follow."""
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(row)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def gradients(self) -> list[torch.Tensor]:
        """This rank's part of the step's gradients: none before the last micro batch, and after the step."""
        parts = self.engine.optimizer.averaged_gradients.values()
        return [gradient for part in parts if part is not None for gradient in part]

    def norm(self) -> torch.Tensor:
        """The norm of the step's gradients over all ranks; DeepSpeed clips by it in the step."""
        return self.engine.optimizer.scaled_global_norm() if self.gradients() else torch.zeros(())

    def leave_out(self) -> None:
        """Forget the step's gradients."""
        inner = self.engine.optimizer
        inner.zero_grad(set_to_none=True)
        for held in (inner.averaged_gradients, inner.all_grad_tensors):
            held.update(dict.fromkeys(held))

    def step(self, closure: Any = None) -> None:
        if not self.gradients():  # as any optimizer, which leaves alone what has no gradient
            return
        for mine, part in zip(self._groups(), self._plain.param_groups, strict=True):
            part.update({name: value for name, value in mine.items() if name != "params"})
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.optimizer.zero_grad(set_to_none=True)

    # --- the whole state, as one process has it

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the first rank; on the others without its tensors."""
        found = super().state_dict()
        found["state"] = dict(enumerate(self._states())) if self._plain.state else {}
        return found

    def _states(self) -> Iterator[dict[str, Any]]:
        for group, part in zip(self._groups(), self._plain.param_groups, strict=True):
            held = self._plain.state[part["params"][0]]
            for weight in group["params"]:
                wholes = {name: _whole(weight, value) if value.dim() else value.clone() for name, value in held.items()}
                yield {name: value for name, value in wholes.items() if value is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a whole state. Raises ``ValueError`` or ``KeyError`` for one of other weights."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = state_dict["state"]
        parts: dict[int, dict[str, torch.Tensor]] = {}
        number = 0
        for index, (group, part) in enumerate(zip(self._groups(), self._plain.param_groups, strict=True)):
            for weight in group["params"]:
                if saved:
                    _put(weight, saved[number], part["params"][0], parts.setdefault(index, {}))
                number += 1
        self._plain.load_state_dict({**self._plain.state_dict(), "state": parts})


def _whole(weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor | None:
    """A weight's numbers out of the parts that the ranks hold: float32 on the CPU of the first one, None on the others."""
    found = torch.zeros(weight.numel(), dtype=part.dtype, device=part.device)
    if (place := weight._hp_mapping) is not None:  # type: ignore[attr-defined]  # None: no number of it is in this rank's part
        mine, held = place.lp_fragment_address, place.hp_fragment_address
        found.narrow(0, mine.start, mine.numel).copy_(part.narrow(0, held.start, held.numel))
    dist.reduce(found, dst=0)
    return found.view(weight.shape).cpu() if ranks.is_first() else None


def _put(
    weight: torch.Tensor, saved: dict[str, torch.Tensor], flat: torch.Tensor, part: dict[str, torch.Tensor]
) -> None:
    """Write what this rank holds of a weight's ``saved`` state into ``part``, which is laid out as ``flat``."""
    place = weight._hp_mapping  # type: ignore[attr-defined]
    for name, value in saved.items():
        if not value.dim():  # the number of steps, the same for all
            part[name] = value
            continue
        if value.shape != weight.shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {tuple(weight.shape)}")
        buffer = part.setdefault(name, torch.zeros_like(flat, dtype=value.dtype, requires_grad=False))
        if place is not None:
            mine, held = place.lp_fragment_address, place.hp_fragment_address
            buffer.narrow(0, held.start, held.numel).copy_(value.flatten().narrow(0, mine.start, mine.numel))


def _start(model: _RowLoss, optimizer: torch.optim.Optimizer, stage: int, clip: float, device: str) -> Any:
    """DeepSpeed's engine, among the ranks that are connected already."""
    deepspeed = _import(device)
    numbers = sum(weight.numel() for weight in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop says which micro batch is the step's last
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,  # it knows its own compiled ones; AdamW treats each number by itself
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(numbers, _BUCKET),
            "allgather_bucket_size": _BUCKET,
        },
        "timers": {"throughput": {"enabled": False}},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def _import(device: str) -> Any:
    """DeepSpeed, told which device it works on, not to look for a compiler, and to be quiet."""
    environment.show_hidden(("deepspeed",))
    os.environ["DS_ACCELERATOR"] = device
    # it calls what torch has renamed, a thousand times a run
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # written to stdout, where our results go
    deepspeed.ops.__compatible_ops__ = {}  # else it tries for each of its ops whether it could be compiled here
    return deepspeed
