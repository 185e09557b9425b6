"""The loss of a run, and of the faster ways to compute it those that are equal to the plain one on its own model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scripts.utils import console, fused_kernels, ranks, sharding, train_words
from scripts.utils.encoding import Encoded
from scripts.utils.loss import (
    Exact,
    Loss,
    find_exact,
    fused_loss,
    plain_loss,
    summed_loss,
    tolerance,
    whole_loss,
)

if TYPE_CHECKING:
    from scripts.utils.hardware import Precision
    from scripts.utils.schema import Config


def choose_loss(
    config: "Config", model: Any, examples: Sequence[Encoded], precision: "Precision", fused: bool
) -> tuple[Loss, Exact]:
    """The loss, and the ways of computing it that the config wants and that are equal to the plain one on this model.

    Full tuning compares them in fp32, as its weights are, and then computes in ``precision``.
    """
    from scripts.utils.autocast import mixed
    from scripts.utils.backends import torch_dtype
    from scripts.utils.offload import computing_device

    loss: Loss = fused_loss if fused else summed_loss
    packing = config.train.packing
    if fused and not packing:
        return loss, Exact(packing=False, segments=False, shared=False, chunked=False)
    kernels = None
    if not fused:  # Unsloth brings its own
        kernels = fused_kernels.put(
            model,
            config.train.fused_kernels,
            computing_device(model).type,
            lambda: plain_loss(model, examples),
            tolerance(model),
        )
    exact = ranks.from_first(lambda: find_exact(model, examples, loss, fused=fused))
    if packing and not exact.packing:
        console.warn("with this backend and device, packed examples would see one another: packing is off")
    packing = packing and exact.packing
    # under dropout the examples that share a beginning would share its noise too
    shared = packing and exact.shared and config.train.share_prefix and not config.lora.dropout
    lean = exact.lean and config.train.lean_lora
    segments = packing and exact.segments
    kernel = segments and exact.kernel
    exact = replace(exact, packing=packing, segments=segments, shared=shared, lean=lean, kernel=kernel, fused=kernels)
    exact = sharding.allowed(config, exact)
    train_words.say_exact(exact, fused)
    if fused:
        return loss, exact
    chosen = loss if exact.chunked else whole_loss
    if config.tuning.mode == "full":
        chosen = mixed(chosen, computing_device(model).type, torch_dtype(precision))
    return chosen, exact
