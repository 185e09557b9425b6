"""A decoder's shape from its config.json alone: what its linear layers, norms and embeddings take, without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.utils import files
from scripts.utils.errors import UserError

# norms of hidden size in a layer; whether embeddings and head are tied where config.json does not say (transformers 5.17)
_FAMILIES = {
    "llama": (2, False), "mistral": (2, False), "qwen2": (2, False), "qwen3": (2, False), "phi3": (2, False),
    "smollm3": (2, True), "gemma": (2, True), "gemma2": (4, True), "gemma3_text": (4, True),
}  # fmt: skip
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Linear:
    """A linear layer of each of the model's layers; ``source`` names the activation that it reads."""

    name: str
    inputs: int
    outputs: int
    source: str

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """Sizes in numbers (not bytes). ``queries`` and ``keys``: heads times head size."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    linears: tuple[Linear, ...]
    vectors: int  # norms and biases of a layer
    query_norm: bool  # a norm of each head's query and key
    norms: int  # of hidden size, in a layer
    scores_kept: bool  # capped attention scores, which no fused kernel knows

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def in_linears(self) -> int:
        return self.layers * sum(linear.size for linear in self.linears)

    @property
    def total(self) -> int:
        tables = self.embedding * (1 if self.tied else 2)
        return self.in_linears + tables + self.layers * self.vectors + self.hidden

    def adapter(self, rank: int, names: list[str] | None) -> int:
        """Weights of a LoRA adapter (arXiv 2106.09685) on the layers called ``names``, None: on all."""
        return self.layers * sum(rank * (linear.inputs + linear.outputs) for linear in self.targets(names))

    def targets(self, names: list[str] | None) -> list[Linear]:
        return [linear for linear in self.linears if names is None or linear.name in names]


def read(folder: Path) -> Architecture:
    """From ``folder``/config.json; raises ``UserError`` for a kind of model that cannot be planned."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path.absolute()}: no such file", "name a model folder or a hub id in model.name")
    return from_config(files.read_json(path), str(path))


def from_config(config: dict[str, Any], where: str = "config.json") -> Architecture:
    config = config if "hidden_size" in config else {**config, **(config.get("text_config") or {})}
    family = str(config.get("model_type"))
    experts = any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    missing = [key for key in _SIZES if not isinstance(config.get(key), int) or config[key] < 1]
    if family not in _FAMILIES or experts or missing:
        why = (
            "has experts" if experts else f"lacks {', '.join(missing)}" if missing else "is built in a way unknown here"
        )
        raise UserError(
            f"{where}: cannot plan this model: {family!r} {why}",
            f"planned are: {', '.join(_FAMILIES)}; train works without",
        )
    norms, tied = _FAMILIES[family]
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    query_norm = family in ("qwen3", "gemma3_text")
    biases = (
        queries + 2 * keys if family == "qwen2" else queries + 2 * keys + hidden if config.get("attention_bias") else 0
    )
    biases += 2 * inner + hidden if config.get("mlp_bias") else 0
    return Architecture(
        family=family,
        hidden=hidden,
        intermediate=inner,
        layers=config["num_hidden_layers"],
        heads=heads,
        queries=queries,
        keys=keys,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", tied),
        linears=_linears(family, hidden, inner, queries, keys),
        vectors=norms * hidden + biases + (2 * size if query_norm else 0),
        query_norm=query_norm,
        norms=norms,
        scores_kept=bool(config.get("attn_logit_softcapping")),
    )


def _linears(family: str, hidden: int, inner: int, queries: int, keys: int) -> tuple[Linear, ...]:
    out, down = Linear("o_proj", queries, hidden, "attended"), Linear("down_proj", inner, hidden, "gated")
    if family == "phi3":
        fused = Linear("qkv_proj", hidden, queries + 2 * keys, "normed")
        return fused, out, Linear("gate_up_proj", hidden, 2 * inner, "normed again"), down
    return (
        Linear("q_proj", hidden, queries, "normed"),
        Linear("k_proj", hidden, keys, "normed"),
        Linear("v_proj", hidden, keys, "normed"),
        out,
        Linear("gate_proj", hidden, inner, "normed again"),
        Linear("up_proj", hidden, inner, "normed again"),
        down,
    )
