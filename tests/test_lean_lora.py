"""A linear layer and its adapter in one step: PEFT's own loss and gradients, for every family, precision and kind of base."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from scripts.utils.backends import linear_names
from scripts.utils.lean_lora import LeanLinear, dense, lean, lean_layers
from scripts.utils.loss import find_exact, summed_loss, whole_loss
from scripts.utils.packing import to_row
from tests.test_loss import VOCAB, examples, gradients
from tests.tiny_models import FAMILIES, tiny


def adapted(model: Any, **changes: Any) -> Any:
    """With LoRA on every linear layer, and an adapter that already does something."""
    shape = {"r": 4, "lora_alpha": 8, "target_modules": linear_names(model), "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model.requires_grad_(False), LoraConfig(**shape))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_pefts_loss_and_gradients(name: str) -> None:
    model = adapted(tiny(name, vocab=VOCAB))
    row = to_row(examples(3))
    plain = whole_loss(model, row)
    wanted = gradients(model, plain)
    layers = lean_layers(model)
    assert (
        len(layers)
        == sum(type(module).__name__ == "Linear" and hasattr(module, "lora_A") for module in model.modules())
        > 6
    )
    with lean(model):
        found = whole_loss(model, row)
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
        got = gradients(model, found)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 1e-5)
    assert all("forward" not in layer.__dict__ for layer in layers), "PEFT's own again"
    assert find_exact(model, examples()).lean


def test_under_checkpointing_and_with_frozen_inputs() -> None:
    model = adapted(tiny("qwen2", vocab=VOCAB)).train()
    row = to_row(examples(3))
    wanted = gradients(model, summed_loss(model, row))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with lean(model):
        found = gradients(model, summed_loss(model, row))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_the_derivative(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 6), (7, 6), (3, 6), (7, 3)))
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    for part in (x, a, b):
        part.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: LeanLinear.apply(x, weight, offset, a, b, 0.5), (x, a, b))


def test_in_bf16_as_under_autocast() -> None:
    model = adapted(tiny("llama", vocab=VOCAB).to(torch.bfloat16))
    row = to_row(examples(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = gradients(model, plain := whole_loss(model, row))
        with lean(model):
            got = gradients(model, found := whole_loss(model, row))
    assert got.dtype == torch.float32, "the adapter's own precision"
    assert abs(float(found) - float(plain)) < 2e-2 * float(plain)
    assert float((got - wanted).norm()) < 5e-2 * float(wanted.norm())


def test_on_a_4_bit_base() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 32, bias=False)})
    plain = torch.nn.Linear(64, 32, bias=False)
    model["up"] = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model["up"].load_state_dict({"weight": plain.weight})
    model = model.to("cpu")
    layer = get_peft_model(model, LoraConfig(r=4, target_modules=["up"])).base_model.model["up"]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 5, 64, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    wanted = torch.autograd.grad((before := layer(x)).square().sum(), weights)
    assert lean_layers(torch.nn.ModuleList([layer])) == [layer]
    assert not torch.equal(dense(layer.base_layer.weight, torch.float32), plain.weight), "it is quantised"
    with lean(torch.nn.ModuleList([layer])):
        torch.testing.assert_close(after := layer(x), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(after.square().sum(), weights), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_plain_lora_stays_with_peft(changes: dict[str, Any]) -> None:
    model = adapted(tiny("llama", vocab=VOCAB), **changes)
    assert lean_layers(model) == [] and not find_exact(model, examples()).lean


def test_a_wrong_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LeanLinear.backward
    monkeypatch.setattr(
        LeanLinear, "backward", staticmethod(lambda ctx, g: (*real(ctx, g)[:4], 2 * real(ctx, g)[4], None))
    )
    exact = find_exact(adapted(tiny("llama", vocab=VOCAB)), examples())
    assert not exact.lean and exact.chunked and exact.segments
