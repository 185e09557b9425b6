"""Adapter into base weights, one tensor at a time: for a model that does not fit into the memory.

Each weight is read from the base's files, given what the adapter adds, rounded and written, so that the memory holds
one weight in fp32 and no model. The result is the in-memory merge's to the bit, which a test holds for each family.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, model_folder, safetensors_writer
from scripts.utils.backends import torch_dtype
from scripts.utils.errors import RefusedError, UserError
from scripts.utils.merging import Source, save_settings

if TYPE_CHECKING:
    import torch

_KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_IN_MEMORY = 'merge it in memory: SET="merge.by_layer=false"'
# what an adapter may say beyond plain LoRA on linear layers, and the value that means nothing of it
_PLAIN = {
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "bias": "none",
    "modules_to_save": None, "lora_bias": False, "target_parameters": None, "trainable_token_indices": None,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """``places``: the base's file that holds each weight; ``pairs``: the adapter's name for each weight that it changes;
    ``scaling``: alpha/r of the adapter; ``four_bit``: the weights that training had as NF4."""

    model: Any
    places: dict[str, Path]
    shapes: dict[str, list[int]]
    pairs: dict[str, str]
    scaling: float
    four_bit: frozenset[str]


def plan(source: Source) -> Plan:
    """Compare the names in the files with those of the model and the adapter; loads no weight.

    Raises ``UserError`` or ``RefusedError`` where they do not fit one another, or where the adapter is no plain LoRA.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(source.base), local_files_only=True, trust_remote_code=False)
        )
    if (source.base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source.base), local_files_only=True)
    places, shapes = _places(source, model)
    settings = files.read_json(source.adapter / "adapter_config.json")
    odd = [name for name, value in _PLAIN.items() if settings.get(name, value) != value and settings.get(name)]
    if settings.get("peft_type") != "LORA" or odd:
        raise UserError(f"{source.adapter}: no plain LoRA adapter ({', '.join(odd)})", _IN_MEMORY)
    root = math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"]
    pairs = _pairs(source, shapes)
    return Plan(model, places, shapes, pairs, settings["lora_alpha"] / root, _four_bit(source, model))


def _places(source: Source, model: Any) -> tuple[dict[str, Path], dict[str, list[int]]]:
    """File and shape of each weight that is written, in the order of a saved model; of tied weights only one is."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in model_folder.weight_files(source.base):
        with safe_open(str(path), framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    tied = set(model.all_tied_weights_keys)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{source.base}: the files name their weights otherwise than the model does, e.g. no {missing[0]}",
            _IN_MEMORY,
        )
    return {name: found[name] for name in wanted}, {name: wanted[name] for name in sorted(wanted, key=_natural)}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """transformers' own order when it saves: names part by part, numbers by size."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _pairs(source: Source, shapes: dict[str, list[int]]) -> dict[str, str]:
    """Weight to the adapter's name for it; raises ``RefusedError`` unless every tensor of the adapter has its place."""
    from safetensors import SafetensorError, safe_open

    weights = source.adapter / "adapter_model.safetensors"
    try:
        with safe_open(str(weights), framework="pt") as file:
            adapter = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RefusedError(f"{weights.absolute()}: does not load: {error}", "the file is damaged") from error
    pairs, used = {}, set()
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if len(s) == 2):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if down in adapter and adapter[down][1:] == [columns] and adapter.get(up) == [rows, adapter[down][0]]:
            pairs[name] = stem
            used |= {down, up}
    if not adapter or (odd := sorted(set(adapter) - used)):
        raise RefusedError(
            f"{source.adapter.absolute()}: its weights do not fit this base model, e.g. {odd[:2] if adapter else 'none'}",
            "use the base of its stamp",
        )
    return pairs


def _four_bit(source: Source, model: Any) -> frozenset[str]:
    """Weights that transformers quantises for QLoRA: linear layers, but for the head and what is tied to it."""
    if not source.quantised:
        return frozenset()
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(model))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return frozenset(f"{name}.weight" for name in linears if name not in kept)


def merged(source: Source, plan: Plan, names: list[str]) -> "Iterator[torch.Tensor]":
    """Each named weight with what the adapter adds, in the saved precision.

    Raises ``RefusedError`` for a weight that is no finite number.
    """
    import torch
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(str(path), framework="pt"))
            for path in {plan.places[name] for name in names}
        }
        adapter = stack.enter_context(safe_open(str(source.adapter / "adapter_model.safetensors"), framework="pt"))
        for name in names:
            weight = opened[plan.places[name]].get_tensor(name).to(torch_dtype(source.compute))
            if name in plan.four_bit:
                weight = _through_nf4(weight, source.device)
            if stem := plan.pairs.get(name):
                down, up = (adapter.get_tensor(f"{stem}.lora_{letter}.weight").float() for letter in "AB")
                weight = weight + (up.to(weight.device) @ down.to(weight.device)) * plan.scaling
            if not bool(torch.isfinite(weight).all()):
                raise RefusedError(
                    f"{name}: the merged weight is not finite", "the adapter is damaged; nothing was written"
                )
            yield weight.to(torch_dtype(source.dtype))


def _through_nf4(weight: "torch.Tensor", device: str) -> "torch.Tensor":
    """What training had in place of the weight: NF4 with double quantisation, and back (see ``backends.nf4``)."""
    import bitsandbytes

    packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        device
    )
    return bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)


def write(source: Source, plan: Plan, folder: Path, shard_size: str) -> None:
    """Write the merged model to ``folder``: the same files as the in-memory way, one tensor in memory at a time."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {
        name: torch.empty(shape, dtype=torch_dtype(source.dtype), device="meta") for name, shape in plan.shapes.items()
    }
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    progress = console.Progress("merge", "tensors", len(plan.shapes))
    for file, names in split.filename_to_tensors.items():
        with_progress = _counted(merged(source, plan, names), progress)
        safetensors_writer.write(
            folder / file, {name: plan.shapes[name] for name in names}, _KINDS[source.dtype], with_progress
        )
    progress.close()
    if split.is_sharded:
        count = sum(math.prod(shape) for shape in plan.shapes.values())
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        files.write_json(folder / model_folder.WEIGHTS_INDEX, index)
    save_settings(plan.model, source, folder)


def _counted(tensors: "Iterator[torch.Tensor]", progress: console.Progress) -> "Iterator[torch.Tensor]":
    for tensor in tensors:
        yield tensor
        progress.advance()


def verify(source: Source, plan: Plan, folder: Path) -> dict[str, float]:
    """Read every weight back and compare it with base and adapter, computed once more: equal to the bit, or refused.

    Gives the number of weights, how many the adapter changed, and the largest change relative to its weight.
    """
    import torch
    from safetensors import safe_open

    progress = console.Progress("merge", "tensors read back", len(plan.shapes))
    names, changed, largest = [], 0, 0.0
    for path in model_folder.weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            here = list(file.keys())
            names += here
            for name, wanted in zip(here, merged(source, plan, here), strict=True):
                if not torch.equal(file.get_tensor(name), wanted.cpu()):
                    raise RefusedError(
                        f"{path}: {name} is not what was merged", "the disk may be failing; run it again"
                    )
                if name in plan.pairs:
                    with safe_open(str(plan.places[name]), framework="pt") as base:
                        before = base.get_tensor(name).float()
                    share = float((wanted.float().cpu() - before).norm() / before.norm())
                    changed, largest = changed + (share > 0), max(largest, share)
                progress.advance()
    progress.close()
    if sorted(names) != sorted(plan.shapes) or not changed:
        raise RefusedError(
            f"{len(names)} of {len(plan.shapes)} weights were written, {changed} of them changed",
            "report this as a bug",
        )
    return {"tensors": len(names), "changed": changed, "largest_change": largest}
