"""Adapter into base weights, and how far the result is from the adapter model.

Everything is computed in fp32 where the memory is there for it, so that the only rounding is the one to the saved
precision. A QLoRA adapter was trained against NF4 weights: those are dequantised and merged into. PEFT's own merge
of a 4-bit layer would quantise the sum again, and the original weights never were what the adapter completes.
"""

import gc
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import files, stamp
from scripts.utils.backends import load_causal_lm, torch_dtype
from scripts.utils.chat import Template, choose_template, load_tokenizer, render_prompt
from scripts.utils.encoding import encode_prompt
from scripts.utils.errors import MachineError, RefusedError, UserError
from scripts.utils.trained import attach_adapter, base_path, stop_ids

if TYPE_CHECKING:
    import torch

    from scripts.utils.hardware import Precision

TOP = 10  # the likeliest tokens of the adapter model at each position are what is compared
LIKELY = 0.01  # probability from which a token counts for the largest difference
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_BUILTIN = (
    "What is the capital of France?",
    "Write one sentence about rain.",
    "List three colours.",
    "What is 17 + 25?",
)


@dataclass(frozen=True)
class Source:
    """What is merged and how: ``dtype`` is the saved precision, ``compute`` the one that is calculated in."""

    run: str
    base: Path
    adapter: Path
    tokenizer: Any
    template: Template
    quantised: bool
    dtype: "Precision"
    dtype_why: str
    compute: "Precision"
    device: str
    parameters: int


@dataclass(frozen=True)
class Reference:
    """The adapter model on one row: ``top`` int64 [tokens, 10] (its likeliest tokens), their log-probabilities with
    the adapter and without it (both float [tokens, 10])."""

    ids: list[int]
    top: "torch.Tensor"
    adapted: "torch.Tensor"
    plain: "torch.Tensor"


def check_shard_size(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*([KMGT]i?B)", text, re.IGNORECASE):
        raise UserError(
            f"merge.shard_size is {text!r}, expected a size such as 4GB or 500MB", "set merge.shard_size: 4GB"
        )


def prepare(run: str, facts: dict[str, Any], dtype: str) -> Source:
    """Find base and adapter, and choose the precisions. Raises ``RefusedError`` for a base other than the stamp's."""
    adapter = stamp.adapter_folder(run)
    base = base_path(facts)
    saved = _saved_precision(base)
    chosen: Precision = saved if dtype == "auto" else dtype  # type: ignore[assignment]
    why = "as the base model" if dtype == "auto" else "merge.dtype"
    parameters = sum(path.stat().st_size for path in base.glob("*.safetensors")) // BYTES[saved]
    quantised = facts["tuning"]["mode"] == "qlora"
    device, compute = _where(parameters, chosen, quantised)
    tokenizer = load_tokenizer(adapter)
    template = choose_template(tokenizer, "auto")
    return Source(run, base, adapter, tokenizer, template, quantised, chosen, why, compute, device, parameters)


def _saved_precision(base: Path) -> "Precision":
    """The precision of most of the base's weights, from the headers of its files."""
    from collections import Counter

    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for path in base.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                size = 1
                for length in part.get_shape():
                    size *= length
                counts[part.get_dtype()] += size
    most = counts.most_common(1)[0][0] if counts else ""
    if most not in ("F32", "BF16", "F16"):
        raise UserError(
            f"{base}: weights of type {most or 'none'} cannot be merged into", "use a base model in bf16, fp16 or fp32"
        )
    return {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}[most]  # type: ignore[return-value]


def _where(parameters: int, dtype: "Precision", quantised: bool) -> "tuple[str, Precision]":
    """fp32 on the CPU where it fits into the free memory with room for a layer's work; else the saved precision.

    bitsandbytes' 4-bit layers are made where the GPU is, if there is one, as in training.
    """
    import psutil
    import torch

    if quantised and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        return "cuda", "fp32" if free > 5 * parameters else dtype
    return "cpu", "fp32" if psutil.virtual_memory().available > 5 * parameters else dtype


def check_space(target: Path, source: Source) -> None:
    """Raises ``MachineError`` where the merged model will not fit on the disk."""
    need = source.parameters * BYTES[source.dtype] + 50_000_000
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise MachineError(
            f"{folder}: the merged model needs {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free",
            "free some space (make clean shows what it would remove), then run the same command again",
        )


def load_adapter_model(source: Source) -> Any:
    """The base as it was in training (4-bit for QLoRA), with its adapter on."""
    base = load_causal_lm(source.base, precision=source.compute, device=source.device, quantised=source.quantised)
    return attach_adapter(base, source.adapter)


def merged(source: Source, model: Any) -> Any:
    """The model with the adapter in its weights, still in the computing precision."""
    if not source.quantised:
        return model.merge_and_unload(safe_merge=True)
    del model
    gc.collect()
    base = load_causal_lm(source.base, precision=source.compute, device=source.device, quantised=True).dequantize()
    for name, weight in base.named_parameters():
        if weight.__class__.__name__ == "Params4bit":
            raise RefusedError(f"{name} is still quantised", "report this as a bug; nothing was written")
    return attach_adapter(base.to(torch_dtype(source.compute)), source.adapter).merge_and_unload(safe_merge=True)


def save(model: Any, source: Source, folder: Path, shard_size: str) -> None:
    """Weights in the saved precision, tokenizer with the run's template, generation config with the run's end tokens."""
    model.to(torch_dtype(source.dtype))
    model.config.dtype = torch_dtype(source.dtype)
    for owner in (model, model.config):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    model.config.use_cache = True
    model.generation_config.eos_token_id = stop_ids(model, source.tokenizer)
    with files.disk_errors(folder):
        model.save_pretrained(str(folder), max_shard_size=shard_size, safe_serialization=True)
        source.tokenizer.chat_template = source.template.text
        source.tokenizer.save_pretrained(str(folder))


def load_merged(folder: Path, source: Source) -> Any:
    """The saved model from disk, computing as the adapter model did."""
    return load_causal_lm(folder, precision=source.compute, device=source.device)


def reference(model: Any, rows: Sequence[list[int]]) -> list[Reference]:
    """What the adapter model says on each row, and what it says with the adapter off."""
    found = []
    for ids in rows:
        adapted = log_probabilities(model, ids)
        top = adapted.topk(min(TOP, adapted.shape[-1])).indices
        with model.disable_adapter():
            plain = log_probabilities(model, ids).gather(-1, top)
        found.append(Reference(ids, top, adapted.gather(-1, top), plain))
    return found


def compare(model: Any, references: Sequence[Reference]) -> dict[str, float]:
    """Absolute differences of log-probabilities (nats) between ``model`` and the adapter model.

    ``mean_difference`` weighs each token by the probability that the adapter model gives it, for that is how often it
    would be written: rounding to bf16 moves the log-probability of a token of 0.1 % far more than anyone will ever
    see. ``max_difference`` is over tokens of at least 1 %. ``adapter_effect`` is the weighted mean between adapter
    model and base, as the measure of what would be lost.
    """
    import torch

    weights, differences, effects, agreed = [], [], [], []
    for known in references:
        now = log_probabilities(model, known.ids)
        weights.append(known.adapted.exp())
        differences.append((now.gather(-1, known.top) - known.adapted).abs())
        effects.append((known.plain - known.adapted).abs())
        agreed.append(now.argmax(-1) == known.top[:, 0])
    weight, difference, effect, same = (torch.cat(parts) for parts in (weights, differences, effects, agreed))
    return {
        "mean_difference": float((weight * difference).sum(-1).mean()),
        "max_difference": float(torch.where(weight >= LIKELY, difference, 0.0).max()),
        "adapter_effect": float((weight * effect).sum(-1).mean()),
        "greedy_agreement": float(same.float().mean()),
        "positions": same.numel(),
    }


def log_probabilities(model: Any, ids: list[int]) -> "torch.Tensor":
    """float32 [tokens, vocabulary] on the CPU."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()


def builtin_prompts(source: Source) -> list[list[int]]:
    chats = [[{"role": "user", "content": text}] for text in _BUILTIN]
    return [encode_prompt(source.tokenizer, render_prompt(source.template, source.tokenizer, chat)) for chat in chats]
