"""Adapter into base weights, with the whole model in memory; ``merge_layers`` does it tensor by tensor.

Everything is computed in fp32, so that the only rounding is the one to the saved precision. A QLoRA adapter was
trained against NF4 weights: those are dequantised and merged into. PEFT's own merge of a 4-bit layer would quantise
the sum again, and the original weights never were what the adapter completes.
"""

import gc
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import files, stamp
from scripts.utils.backends import load_causal_lm, torch_dtype
from scripts.utils.chat import Template, choose_template, load_tokenizer
from scripts.utils.errors import MachineError, RefusedError, UserError
from scripts.utils.trained import attach_adapter, base_path, stop_ids

if TYPE_CHECKING:
    from scripts.utils.hardware import Precision
    from scripts.utils.schema import Switch

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Source:
    """What is merged and how: ``dtype`` is the saved precision, ``compute`` the one that is calculated in.

    ``by_layer``: one tensor at a time. ``proof`` is the precision in which adapter model and merged model are run to be
    compared, None where neither fits into the memory.
    """

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
    by_layer: bool
    by_layer_why: str
    proof: "Precision | None"


def check_shard_size(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*([KMGT]i?B)", text, re.IGNORECASE):
        raise UserError(
            f"merge.shard_size is {text!r}, expected a size such as 4GB or 500MB", "set merge.shard_size: 4GB"
        )


def prepare(run: str, facts: dict[str, Any], dtype: str, by_layer: "Switch" = "auto") -> Source:
    """Find base and adapter, and choose the precisions. Raises ``RefusedError`` for a base other than the stamp's."""
    adapter = stamp.adapter_folder(run)
    base = base_path(facts)
    saved = _saved_precision(base)
    chosen: Precision = saved if dtype == "auto" else dtype  # type: ignore[assignment]
    why = "as the base model" if dtype == "auto" else "merge.dtype"
    parameters = sum(path.stat().st_size for path in base.glob("*.safetensors")) // BYTES[saved]
    quantised = facts["tuning"]["mode"] == "qlora"
    device, free = _memory(quantised)
    fits = free > 5 * parameters  # in fp32, with room for a layer's work
    layers = not fits if by_layer == "auto" else by_layer
    layers_why = (
        "merge.by_layer"
        if by_layer != "auto"
        else f"in fp32 the model takes {4 * parameters / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    )
    compute: Precision = "fp32" if fits or layers else chosen
    proof: Precision | None = (
        compute if fits or not layers else chosen if free > (BYTES[chosen] + 1) * parameters else None
    )
    tokenizer = load_tokenizer(adapter)
    return Source(
        run=run,
        base=base,
        adapter=adapter,
        tokenizer=tokenizer,
        template=choose_template(tokenizer, "auto"),
        quantised=quantised,
        dtype=chosen,
        dtype_why=why,
        compute=compute,
        device=device,
        parameters=parameters,
        by_layer=layers,
        by_layer_why=layers_why,
        proof=proof,
    )


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


def _memory(quantised: bool) -> tuple[str, int]:
    """The device to merge on and its free bytes.

    bitsandbytes' 4-bit layers are made where the GPU is, if there is one, as in training.
    """
    import psutil
    import torch

    if quantised and torch.cuda.is_available():
        return "cuda", torch.cuda.mem_get_info()[0]
    return "cpu", psutil.virtual_memory().available


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
    precision = source.proof or source.compute
    base = load_causal_lm(source.base, precision=precision, device=source.device, quantised=source.quantised)
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
    """Weights in the saved precision, and all that belongs to them."""
    model.to(torch_dtype(source.dtype))
    for owner in (model, model.config):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    with files.disk_errors(folder):
        model.save_pretrained(str(folder), max_shard_size=shard_size, safe_serialization=True)
    save_settings(model, source, folder)


def save_settings(model: Any, source: Source, folder: Path) -> None:
    """Config, generation config with the run's end tokens, tokenizer with the run's template."""
    model.config.dtype = torch_dtype(source.dtype)
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    model.generation_config.eos_token_id = stop_ids(model, source.tokenizer)
    source.tokenizer.chat_template = source.template.text
    with files.disk_errors(folder):
        model.config.save_pretrained(str(folder))
        model.generation_config.save_pretrained(str(folder))
        source.tokenizer.save_pretrained(str(folder))


def load_merged(folder: Path, source: Source) -> Any:
    """The saved model from disk, computing as the adapter model did."""
    return load_causal_lm(folder, precision=source.proof or source.compute, device=source.device)
