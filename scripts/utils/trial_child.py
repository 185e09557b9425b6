"""The child of ``trial``: torch on this device, attention, bitsandbytes, and the first rows, each of which may crash.

What ran on a GPU is in docs/check.md.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import environment
from scripts.utils.errors import MachineError, SFTError
from scripts.utils.files import REPO_ROOT
from scripts.utils.findings import Finding, fault, from_problem, ok
from scripts.utils.trial import MARK

if TYPE_CHECKING:
    import torch

    from scripts.utils.hardware import Hardware, Precision
    from scripts.utils.schema import Config

Attend = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
# of the largest value: 16-bit numbers hold about three digits
_ALLOWED = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_NF4_WORST = 0.2  # of the largest weight of its block: half the widest gap between NF4's levels is 0.152


def say(**words: Any) -> None:
    print(MARK + json.dumps(words), flush=True)


def tell(finding: Finding) -> None:
    say(finding=finding.as_json())


def device(config: "Config | None") -> None:
    """The machine as training will see it, and its attention, forward and backward in the run's precision."""
    say(stage="importing torch")
    from scripts.utils import hardware

    machine = hardware.detect()
    say(machine=dataclasses.asdict(machine))
    precision = hardware.best_precision(machine)[0]
    if config:
        with contextlib.suppress(MachineError):  # said in a line of its own
            precision = hardware.choose_precision(config, machine).actual
    say(stage=f"running attention in {precision} on {machine.device}")
    attention(machine, precision, config.model.attention if config else "auto")


def attention(machine: "Hardware", precision: "Precision", wanted: str) -> None:
    import importlib.util

    from torch.nn.functional import scaled_dot_product_attention

    def fused(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    error = difference(fused, machine.device, precision)
    text = f"scaled dot product runs forward and backward in {precision} on {machine.device}"
    if error > _ALLOWED[precision]:
        text += f", but differs from plain arithmetic by {error:.1e}"
        tell(
            fault(
                "attention",
                "attention-wrong",
                text,
                'SET="model.attention=eager", and please report it (make support-bundle)',
            )
        )
    else:
        kernels = f"; kernels: {', '.join(cuda_kernels(precision))}" if machine.device == "cuda" else ""
        tell(ok("attention", f"{text} (within {error:.0e} of plain arithmetic){kernels}"))
    if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        text = "model.attention asks for flash_attention_2, and flash-attn is not installed"
        tell(
            fault(
                "attention",
                "attention-missing",
                text,
                'SET="model.attention=auto" (torch brings its own flash attention)',
            )
        )


def difference(attend: Attend, device: str, precision: "Precision") -> float:
    """Largest difference of ``attend`` and its gradients from plain arithmetic in fp32, relative to the largest value."""
    import torch

    from scripts.utils.backends import torch_dtype

    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(1, 4, 64, 64, generator=generator) for _ in range(4)]

    def run(by: Attend, place: str, dtype: "torch.dtype") -> list["torch.Tensor"]:
        q, k, v, upstream = (tensor.to(place, dtype, copy=True).requires_grad_() for tensor in plain)
        output = by(q, k, v)
        (output * upstream.detach()).sum().backward()  # a scalar: else autograd imports sympy first, 3 s
        return [tensor.detach().float().cpu() for tensor in (output, q.grad, k.grad, v.grad)]  # type: ignore[union-attr]

    def by_hand(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
        later = torch.ones(64, 64, dtype=torch.bool).triu(1)
        return torch.softmax((q @ k.transpose(2, 3) / 8).masked_fill(later, -torch.inf), -1) @ v

    expected, found = run(by_hand, "cpu", torch.float32), run(attend, device, torch_dtype(precision))
    worst = [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]
    return max(worst) if all(value == value for value in worst) else float("inf")


def cuda_kernels(precision: "Precision") -> list[str]:
    """Which of CUDA's kernels for attention run here, forward and backward, and are right."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "plain": SDPBackend.MATH,
    }
    found = []
    for name, kind in kinds.items():

        def only(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", kind: Any = kind) -> "torch.Tensor":
            with sdpa_kernel([kind]):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        try:
            if difference(only, "cuda", precision) <= _ALLOWED[precision]:
                found.append(name)
        except RuntimeError:  # no such kernel for this card or precision
            continue
    return found


def bitsandbytes(config: "Config | None") -> None:
    """NF4 there and back on the device, by the library's own code."""
    say(stage="importing bitsandbytes")
    import torch

    # bitsandbytes prepares two functions for compilation as it is imported: 7 s, of nothing that is looked at here
    torch.compile = lambda model=None, **options: model or (lambda function: function)  # type: ignore[assignment]
    from bitsandbytes import cextension, functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(stage=f"quantising on {device}")
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    blocks = weights.flatten().reshape(-1, 64)
    back = functional.dequantize_4bit(packed, state).to(weights.dtype).flatten().reshape(-1, 64)
    worst = float(((back - blocks).abs().max(1).values / blocks.abs().max(1).values).max())
    native = not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    say(native=native, worst=worst, bytes=packed.numel() * packed.element_size(), device=device)
    if not worst <= _NF4_WORST or packed.numel() * packed.element_size() != weights.numel() // 2:
        text = f"4-bit weights come back wrong on {device} (by {worst:.2f} of a block's largest)"
        tell(
            fault(
                "bitsandbytes",
                "four-bits-wrong",
                text,
                'SET="tuning.mode=lora", and please report it (make support-bundle)',
            )
        )
    elif not native:
        text = f"its compiled library for {device} does not load" + (
            "; 4-bit weights go through plain torch, slowly" if device == "cpu" else ""
        )
        tell(fault("bitsandbytes", "bitsandbytes-broken", text, "make install FORCE=1"))
    else:
        tell(
            ok(
                "bitsandbytes",
                f"NF4 there and back on {device}: half a byte a weight, within {worst:.2f} of a block's largest",
            )
        )


def rows(config: "Config", model: str) -> None:
    """What transformers makes of the model, and the first rows by its tokenizer and template."""
    say(stage="importing transformers")
    from scripts.utils import backends, chat, doctor_data, doctor_trials

    try:
        say(attention=backends.attention_in_transformers(Path(model), config.model.attention))
    except (ValueError, ImportError, OSError, KeyError) as error:
        text = f"{config.model.name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        tell(fault("backend", "model-unknown-here", text, 'SET="model.attention=auto"; or another model'))
    say(stage=doctor_trials.READING)
    try:
        tokenizer = chat.load_tokenizer(Path(model))
    except SFTError as problem:
        tell(from_problem("rows", "tokenizer-broken", problem))
        return
    for finding in doctor_data.first_rows(config, tokenizer):
        tell(finding)


def main() -> None:
    environment.prepare(REPO_ROOT)
    question = json.loads(sys.stdin.read())
    config = None
    if question["config"] is not None:
        from scripts.utils.schema import Config

        config = Config.model_validate(question["config"])
    match sys.argv[1]:
        case "device":
            device(config)
        case "bitsandbytes":
            bitsandbytes(config)
        case "rows":
            assert config is not None
            rows(config, question["model"])


if __name__ == "__main__":
    main()
