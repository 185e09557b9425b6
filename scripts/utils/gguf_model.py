"""A model folder as GGUF describes it: the architecture's name, its hyper-parameters, and the name of each tensor.

For Llama- and Qwen-type decoders. Names and keys come from the `gguf` package; what a runtime does with them was read
in llama.cpp (src/llama-model.cpp) and is compared with the model's own logits at each export.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console
from scripts.utils.errors import MachineError, UserError

if TYPE_CHECKING:
    import numpy as np

# transformers' model_type: GGUF's architecture, and whether the runtime turns neighbours instead of halves (RoPE)
_KINDS = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "smollm3": ("SMOLLM3", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
_CONVERTER = "convert it with llama.cpp's own converter: CONVERTER=path/to/convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Model:
    """``name`` is GGUF's architecture; ``config`` transformers' config; ``names``: tensor in the folder to tensor in GGUF;
    ``rope_freqs``: a factor for each rotary frequency, where the model scales them one by one (Llama 3.1)."""

    name: str
    config: Any
    names: dict[str, str]
    neighbours: bool
    context: int
    rope_freqs: "np.ndarray | None"

    def heads(self, tensor: str) -> int:
        """Heads of a query's or key's weight or bias that has to be reordered; 0 for every other tensor."""
        part = tensor.split(".")[-2] if "." in tensor else ""
        if not self.neighbours or part not in ("q_proj", "k_proj"):
            return 0
        return int(self.config.num_attention_heads if part == "q_proj" else self.config.num_key_value_heads)


def package() -> Any:
    """The `gguf` package; raises ``MachineError`` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MachineError("the package gguf is not installed", "run: make install EXTRAS=gguf") from error
    return gguf


def describe(folder: Path, tensors: list[str]) -> Model:
    """Raises ``UserError`` for a kind of model, or a setting of it, that cannot be written here."""
    from transformers import AutoConfig

    gguf = package()
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if config.model_type not in _KINDS:
        raise UserError(
            f"{folder}: models of type {config.model_type} are not exported to GGUF here, only {', '.join(_KINDS)}",
            _CONVERTER,
        )
    kind, neighbours = _KINDS[config.model_type]
    arch = getattr(gguf.MODEL_ARCH, kind)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    if unknown := [name for name, known in names.items() if known is None]:
        raise UserError(f"{folder}: GGUF has no name for the tensor {unknown[0]} of a {config.model_type}", _CONVERTER)
    if config.hidden_act != "silu":
        raise UserError(f"{folder}: its activation is {config.hidden_act}, runtimes compute silu here", _CONVERTER)
    if config.model_type == "smollm3":
        wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != wanted:  # the pattern is not in the file but in the runtime
            raise UserError(f"{folder}: its layers without positions are not every fourth one", _CONVERTER)
    return Model(
        name=gguf.MODEL_ARCH_NAMES[arch],
        config=config,
        names=names,
        neighbours=neighbours,
        context=_context(folder, config),
        rope_freqs=_rope_freqs(folder, config),
    )


def _context(folder: Path, config: Any) -> int:
    """Tokens that a runtime may be given: without a sliding window, which runtimes do not have for these models."""
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and sliding and window < config.max_position_embeddings:
        console.warn(
            f"{folder}: attention looks back {window:,} tokens, runtimes look back to the start: the file says {window:,} "
            "as the longest context, up to which both are the same"
        )
        return int(window)
    return int(config.max_position_embeddings)


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _rope_freqs(folder: Path, config: Any) -> "np.ndarray | None":
    """float32 [head size / 2]: what divides each frequency (rope_type llama3), by transformers' own function."""
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"{folder}: positions scaled by {kind} are not exported here", _CONVERTER)
    if kind != "llama3":
        return None
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    size = 2 * len(scaled)
    plain = 1.0 / _rope(config)["rope_theta"] ** (np.arange(0, size, 2) / size)
    return (plain / scaled).astype(np.float32)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_parameters(writer: Any, model: Model) -> None:
    """Write the hyper-parameters of ``model`` (metadata only)."""
    gguf, config, rope = package(), model.config, _rope(model.config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(model.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def to_neighbours(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Reorder a query's or key's rows from two halves a head, as transformers turns them, to pairs of neighbours."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def to_halves(values: "np.ndarray", heads: int) -> "np.ndarray":
    """The inverse of ``to_neighbours``."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


Reorder = Callable[["np.ndarray", int], "np.ndarray"]
