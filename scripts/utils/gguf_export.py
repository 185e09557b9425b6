"""Writes a model folder as one GGUF file, tensor by tensor, and reads it back to compare.

The tables (names of tensors, kinds of numbers, quantisation) are those of the `gguf` package.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, gguf_model, gguf_tokenizer, model_folder
from scripts.utils.chat import Template
from scripts.utils.errors import RefusedError, UserError

if TYPE_CHECKING:
    import numpy as np

# QUANT: GGUF's kind of number, and how far a weight may be from the original, relative to the largest of its block of 32
KINDS = {"f32": ("F32", 0.0), "bf16": ("BF16", 2.0**-8), "f16": ("F16", 2.0**-10), "q8_0": ("Q8_0", 0.005)}
_FILE_TYPES = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # weights that share a scale in q8_0
_SMALLEST_F16 = 2.0**-24


@dataclass(frozen=True)
class Plan:
    """``places``: the folder's file that holds each tensor; ``shapes`` by the folder's names."""

    model: gguf_model.Model
    words: gguf_tokenizer.Vocabulary
    places: dict[str, Path]
    shapes: dict[str, list[int]]
    name: str


def check_kind(quant: str) -> None:
    if quant not in KINDS:
        raise UserError(f"QUANT={quant} is not known", f"known are: {', '.join(KINDS)}; or name a CONVERTER=")


def plan(folder: Path, tokenizer: Any, template: Template, stop_ids: Sequence[int], name: str) -> Plan:
    """Everything but the numbers, so that what cannot be written is refused before anything is."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for path in model_folder.weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118
                places[tensor], shapes[tensor] = path, list(file.get_slice(tensor).get_shape())
    model = gguf_model.describe(folder, list(places))
    words = gguf_tokenizer.describe(tokenizer, template, model.config.vocab_size, stop_ids)
    return Plan(model, words, places, shapes, name)


def write(plan: Plan, path: Path, quant: str) -> None:
    """Write ``path``; its folder must be there. Holds one tensor at a time."""
    gguf = gguf_model.package()
    writer = gguf.GGUFWriter(str(path), plan.model.name)
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[quant]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_model.add_parameters(writer, plan.model)
    gguf_tokenizer.add_vocabulary(writer, plan.words)
    kinds = {name: kind_of(shape, quant) for name, shape in plan.shapes.items()}
    import numpy as np

    if plan.model.rope_freqs is not None:
        freqs = plan.model.rope_freqs
        writer.add_tensor_info("rope_freqs.weight", freqs.shape, freqs.dtype, freqs.nbytes)
    for name, kind in kinds.items():
        packed = gguf.GGMLQuantizationType[kind]
        shape = plan.shapes[name]
        if kind not in ("F32", "F16"):
            shape = list(gguf.quant_shape_to_byte_shape(shape, packed))
        size = {"F32": 4, "F16": 2}.get(kind, 1)
        number = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        count = int(np.prod(shape)) * size
        writer.add_tensor_info(plan.model.names[name] or name, shape, np.dtype(number), count, raw_dtype=packed)
    progress = console.Progress("export-gguf", "tensors", len(kinds))
    with files.disk_errors(path), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if plan.model.rope_freqs is not None:
            writer.write_tensor_data(plan.model.rope_freqs)
        for name, kind in kinds.items():
            values, heads = original(plan, name), plan.model.heads(name)
            values = gguf_model.to_neighbours(values, heads) if heads else values
            writer.write_tensor_data(packed_values(name, values, kind))
            progress.advance()
    progress.close()


def kind_of(shape: Sequence[int], quant: str) -> str:
    """Vectors (norms, biases) stay F32; what q8_0 cannot cut into blocks becomes F16."""
    if len(shape) < 2:
        return "F32"
    return "F16" if quant == "q8_0" and shape[-1] % _BLOCK else KINDS[quant][0]


def packed_values(name: str, values: "np.ndarray", kind: str) -> "np.ndarray":
    import numpy as np

    gguf = gguf_model.package()
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(packed).all():
        raise UserError(
            f"{name} has weights beyond what f16 holds (up to {float(abs(values).max()):.3g})",
            "choose QUANT=bf16 or f32",
        )
    return packed


def original(plan: Plan, name: str) -> "np.ndarray":
    """A tensor of the folder as float32."""
    import torch
    from safetensors import safe_open

    with safe_open(str(plan.places[name]), framework="pt") as file:
        values: np.ndarray = file.get_tensor(name).to(torch.float32).numpy()
    return values


def stored(path: Path, plan: Plan) -> "Iterator[tuple[str, np.ndarray]]":
    """Each tensor of the GGUF file, dequantised, by the folder's names and with the folder's order of rows.

    Raises ``RefusedError`` where the file is damaged or its tensors are not those of the folder.
    """
    gguf = gguf_model.package()
    try:
        reader = gguf.GGUFReader(str(path))
    except Exception as error:  # the reader raises what its arithmetic on a damaged file happens to run into
        raise RefusedError(f"{path.absolute()}: not a readable GGUF file ({error})", "write it again") from error
    known = {gguf_name: name for name, gguf_name in plan.model.names.items()}
    here = {tensor.name for tensor in reader.tensors} - {"rope_freqs.weight"}
    if here != set(known):
        odd = sorted(here ^ set(known))
        raise RefusedError(
            f"{path.absolute()}: its tensors are not the model's ({len(odd)} differ, e.g. {odd[0]})", "write it again"
        )
    for tensor in reader.tensors:
        if tensor.name in known:
            name = known[tensor.name]
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise UserError(
                    f"{path.absolute()}: {error}, so it cannot be compared", "choose another QUANT"
                ) from error
            if list(values.shape) != plan.shapes[name]:
                raise RefusedError(f"{path.absolute()}: {tensor.name} has another shape", "write it again")
            heads = plan.model.heads(name)
            yield name, gguf_model.to_halves(values, heads) if heads else values


def largest_difference(values: "np.ndarray", original: "np.ndarray") -> float:
    """Largest |difference| of a weight, relative to the largest |weight| of its block of 32 (of its row where none fit)."""
    import numpy as np

    width = _BLOCK if original.shape[-1] % _BLOCK == 0 else original.shape[-1]
    off, size = (abs(part).reshape(-1, width).max(-1) for part in (values - original, original))
    # below f16's smallest number everything is the rounding's
    return float((np.maximum(off - _SMALLEST_F16, 0) / np.maximum(size, 1e-30)).max())


def compare_tensors(path: Path, plan: Plan, quant: str) -> dict[str, float]:
    """Every weight read back beside the folder's; raises ``RefusedError`` beyond what the kind of number may lose."""
    worst, count = 0.0, 0
    progress = console.Progress("export-gguf", "tensors read back", len(plan.shapes))
    for name, values in stored(path, plan):
        known = original(plan, name)
        off, limit = largest_difference(values, known), KINDS[quant][1] if known.ndim > 1 else 0.0
        if not off <= limit:
            raise RefusedError(
                f"{path.absolute()}: {name} differs from the model by {off:.2e} of its largest weights, {quant} may by {limit:.2e}",
                "write it again; if it stays so, report it as a bug",
            )
        worst, count = max(worst, off), count + 1
        progress.advance()
    progress.close()
    return {"tensors": count, "largest_difference": worst}


def load_into(model: Any, path: Path, plan: Plan) -> None:
    """Put the file's weights into transformers' model of the same folder, each in the place of its own."""
    import torch

    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in stored(path, plan):
            places[name].copy_(torch.from_numpy(values.copy()))
