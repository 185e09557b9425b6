"""Fused kernels come where they are had and change nothing, or leave no trace. On a card: tests/test_gpu.py."""

import types
from typing import Any

import pytest
import torch

from scripts.utils import fused_kernels
from scripts.utils.errors import MachineError
from scripts.utils.loss import plain_loss
from tests.test_loss import VOCAB, examples
from tests.tiny_models import tiny


def test_without_a_card_auto_does_without_and_true_says_why() -> None:
    model = tiny("llama", vocab=VOCAB)
    before = plain_loss(model, examples())
    assert fused_kernels.put(model, "auto", "cpu", lambda: 1.0, 1e-4) is None
    assert fused_kernels.put(model, False, "cuda", lambda: 1.0, 1e-4) is None
    with pytest.raises(MachineError, match="NVIDIA"):
        fused_kernels.put(model, True, "cpu", lambda: 1.0, 1e-4)
    assert plain_loss(model, examples()) == before


@pytest.mark.skipif(fused_kernels.version() is not None, reason="liger-kernel is installed")
def test_where_the_package_is_absent_the_error_says_how_to_get_it() -> None:
    with pytest.raises(MachineError) as caught:
        fused_kernels.put(tiny("llama", vocab=VOCAB), True, "cuda", lambda: 1.0, 1e-4)
    assert "not installed" in caught.value.message and "EXTRAS=liger" in caught.value.hint


def change(model: Any, factor: float, fails: bool = False) -> None:
    """As a library does it: a norm's forward on the instance, a function of the modelling file."""
    from transformers.models.llama import modeling_llama

    norm = model.model.norm
    plain, rotate = type(norm).forward, modeling_llama.apply_rotary_pos_emb
    norm.forward = types.MethodType(lambda self, x: factor * plain(self, x), norm)
    modeling_llama.apply_rotary_pos_emb = lambda *a, **o: tuple(factor * part for part in rotate(*a, **o))
    if fails:
        raise RuntimeError("no kernel for this\nsecond line")


@pytest.mark.parametrize(("factor", "fails", "said"), [(1.5, False, "changed the loss"), (1.0, True, "no kernel for this"), (float("nan"), False, "nan")])  # fmt: skip
def test_what_changes_the_loss_is_taken_out_again(factor: float, fails: bool, said: str) -> None:
    from transformers.models.llama import modeling_llama

    model, rotate = tiny("llama", vocab=VOCAB), modeling_llama.apply_rotary_pos_emb
    before = plain_loss(model, examples())
    why = fused_kernels._try(model, lambda: plain_loss(model, examples()), 1e-4, lambda m: change(m, factor, fails))
    assert why is not None and said in why
    assert "forward" not in vars(model.model.norm) and modeling_llama.apply_rotary_pos_emb is rotate
    assert plain_loss(model, examples()) == before


def test_what_changes_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    model = tiny("llama", vocab=VOCAB)
    assert fused_kernels._try(model, lambda: plain_loss(model, examples()), 1e-4, lambda m: change(m, 1.0)) is None
    assert "forward" in vars(model.model.norm)
    assert torch.isfinite(torch.tensor(plain_loss(model, examples())))
