"""A linear layer with its LoRA adapter as one step of autograd: fewer passes over the activations, the same result.

PEFT computes the adapter beside the layer: a copy of the input in the adapter's precision, a product scaled, then added, each a
tensor of its own in both directions. Here the adapter's product is added in place, and its gradients come from what was kept.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scripts.utils.autocast import computed_in


class LeanLinear(torch.autograd.Function):
    """``x @ weight.T + bias + scale * (x @ a.T) @ b.T`` with a frozen ``weight`` and ``bias``.

    ``x``: [..., in], ``weight``: [out, in] (or bitsandbytes' 4-bit form of it), ``a``: [rank, in], ``b``: [out, rank].
    Computes in x's precision; gradients of ``a`` and ``b`` are in theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        flat = x.flatten(0, -2)
        inner = flat @ low_a.T
        out = torch.nn.functional.linear(flat, dense(weight, x.dtype), bias if bias is None else bias.to(x.dtype))
        out.addmm_(inner, low_b.T, alpha=scale)
        ctx.save_for_backward(x, low_a, low_b, inner)
        ctx.weight, ctx.scale, ctx.dtypes = weight, scale, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, low_a, low_b, inner = ctx.saved_tensors
        flat = upstream.flatten(0, -2)
        of_inner = (flat @ low_b).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = flat @ dense(ctx.weight, x.dtype)
            of_x.addmm_(of_inner, low_a)
            of_x = of_x.view(x.shape)
        of_a = (of_inner.T @ x.flatten(0, -2)).to(ctx.dtypes[0])
        of_b = (flat.T @ inner).to(ctx.dtypes[1]).mul_(ctx.scale)
        return of_x, None, None, of_a, of_b, None


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a matrix [out, in] of ``dtype``; a 4-bit one is unpacked for the moment."""
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


def lean_layers(model: Any) -> list[torch.nn.Module]:
    """The model's LoRA layers that are a plain or 4-bit linear layer with one adapter, without dropout and other extras."""
    from peft.tuners.lora import Linear

    kinds: tuple[type, ...] = (Linear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds = (Linear, Linear4bit)
    except ImportError:
        pass
    return [module for module in model.modules() if type(module) in kinds and _is_simple(module)]


def _is_simple(layer: Any) -> bool:
    names = layer.active_adapters
    if len(names) != 1 or layer.merged or layer.disable_adapters or names[0] not in layer.lora_A:
        return False
    name = names[0]
    base = type(layer.base_layer).__name__
    return (
        base in ("Linear", "Linear4bit")
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and name not in getattr(layer, "lora_variant", {})
        and not layer.fan_in_fan_out
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and not layer.base_layer.weight.requires_grad
    )


@contextmanager
def lean(model: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, every layer of ``lean_layers`` computes its adapter together with itself; gradients are wanted there."""
    layers = lean_layers(model) if wanted else []
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    base, name = layer.base_layer, layer.active_adapters[0]
    if getattr(base, "quant_state", None) is not None and getattr(base.weight, "quant_state", None) is None:
        base.weight.quant_state = (
            base.quant_state
        )  # lost where FSDP put the weight together; bitsandbytes does the same
    # 4-bit weights have no precision of their own
    wanted = computed_in(x if hasattr(base.weight, "quant_state") else base.weight)
    with torch.autocast(x.device.type, enabled=False):
        return LeanLinear.apply(
            x.to(wanted),
            base.weight,
            base.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
        )
