"""Predicted peak memory of training, by part, from the model's shape and the run's settings: arithmetic, nothing is loaded.

Counted are live tensors, as a GPU's allocator counts them. docs/memory.md derives the formula and compares it with measured
steps. All sizes in bytes.
"""

from dataclasses import dataclass
from typing import Literal

from scripts.utils.architecture import Architecture

FRAMEWORK = {
    "cuda": 0.8 * 2**30,
    "mps": 0.8 * 2**30,
    "cpu": 0.7 * 2**30,
}  # context and kernels, or the libraries: assumed
_LOGITS = 2**24  # of a chunk, as chunked_loss.py has it


@dataclass(frozen=True)
class Setting:
    """What decides the memory. ``tokens`` of a micro batch; ``longest``: tokens of its longest example."""

    device: Literal["cuda", "mps", "cpu"]
    mode: Literal["qlora", "lora", "full"]
    precision: Literal["bf16", "fp16", "fp32"]
    tokens: int
    longest: int
    rank: int
    targets: list[str] | None
    dropout: bool
    optimizer: str  # TrainingArguments' name
    checkpointing: bool
    host_embeddings: bool = False
    offload: bool = False
    chunked: bool = True
    scores_kept: bool = False  # eager attention
    processes: int = 1
    sharded: bool = False  # FSDP: each process holds its part of weights, gradients and states; else all of them (DDP)
    load_on_host: bool = False  # sharded weights wait in host memory until they are cut


@dataclass(frozen=True)
class Memory:
    """``always`` lies there throughout; of ``turns`` one at a time, so the largest counts."""

    always: dict[str, int]
    turns: dict[str, int]
    host: int = 0  # what a lever moves from the device into the host's memory

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(self.turns.values())

    @property
    def largest_turn(self) -> str:
        return max(self.turns, key=lambda name: self.turns[name])


def predict(shape: Architecture, run: Setting) -> Memory:
    full, wide = run.mode == "full", 4 if run.precision == "fp32" else 2
    stored = 4 if full else wide
    elsewhere = shape.embedding * stored if run.host_embeddings and not shape.tied else 0
    embeddings = 0 if elsewhere else shape.embedding * stored
    others = (shape.total - shape.in_linears - shape.embedding) * stored
    adapter = 0 if full else shape.adapter(run.rank, run.targets)
    trained = shape.total if full else adapter
    saved = saved_by_layer(shape, run, wide)
    inputs = run.tokens * shape.hidden * (4 if full else wide)
    kept = inputs * shape.layers + saved if run.checkpointing else saved * shape.layers
    away, kept = (kept, saved) if run.offload else (0, kept)  # all but the layer at work lie in host memory
    always = {
        "weights": round(shape.in_linears * (0.5 if run.mode == "qlora" else stored)) + embeddings + others,
        "quantisation tables": quantisation_tables(shape.in_linears) if run.mode == "qlora" else 0,
        "adapter": adapter * 4,
        "gradients": trained * 4,
        "optimizer": optimizer_states(trained, run.optimizer),
        "activations": kept + end_of_model(shape, run, wide) + copies_of_weights(shape, adapter, full, wide),
        "framework": round(FRAMEWORK[run.device]),
    }
    widest = max(linear.size for linear in shape.linears)
    unpacked = widest * wide if run.mode == "qlora" else 0
    head = shape.embedding * 4 if full else 0  # the head's gradient, computed with the loss, and a chunk's share of it
    largest = max(shape.embedding if full else 0, 0 if full else run.rank * shape.intermediate)
    turns = {
        "loss": logits(shape, run, wide) + head + (head if wide == 4 else head * 3 // 2),
        "backward": going_back(shape, run, wide) + unpacked + head,
        # Adam's own temporaries, where it is not fused; activations are gone by then
        "optimizer step": max(0, (2 * largest * 4 if run.optimizer == "adamw_torch" else 0) - always["activations"]),
        "validation": max(
            0, no_gradient(shape, run, wide) + unpacked + logits(shape, run, wide) - always["activations"]
        ),
    }
    one = _of_one_process(always, shape, run, adapter)
    if run.sharded:  # the weights are loaded whole, looked at, then cut
        whole = always["weights"] + always["quantisation tables"] + always["adapter"]
        away += whole if run.load_on_host else 0
        turns["loading"] = 0 if run.load_on_host else max(0, whole + always["framework"] - sum(one.values()))
    return Memory(one, turns, away + elsewhere)


def _of_one_process(always: dict[str, int], shape: Architecture, run: Setting, adapter: int) -> dict[str, int]:
    """What one of several processes holds.

    DDP keeps the gradients once more, in the buckets that it sends. FSDP has a part of the weights and of what belongs to
    them, and in whole the layer at work, the next one, which is on its way already, and the table of embeddings.
    """
    if run.processes < 2:
        return always
    if not run.sharded:
        return {**always, "reduction": always["gradients"]}
    kept = ("weights", "quantisation tables", "adapter", "gradients", "optimizer")
    parts = {name: -(-always[name] // run.processes) if name in kept else always[name] for name in always}
    tables = shape.embedding * (1 if shape.tied else 2)
    full, wide = run.mode == "full", 4 if run.precision == "fp32" else 2
    stored = 4 if full else wide
    layer = max(0, always["weights"] - tables * stored) // shape.layers
    if full:  # gathered in the run's precision, and no copies of autocast beside it
        parts["activations"] -= copies_of_weights(shape, adapter, full, wide)
        layer = layer * wide // stored
    return {**parts, "gathered": 2 * layer + shape.embedding * wide}


def quantisation_tables(weights: int) -> int:
    """NF4 with double quantisation: 8 bits a block of 64 and 32 bits for 256 of these (QLoRA, arXiv 2305.14314, section 3)."""
    return weights // 64 + 4 * (weights // (64 * 256))


def optimizer_states(trained: int, name: str) -> int:
    """Adam's two moments: 32 bits each, or 8 bits and a 32-bit scale for 256 of them (arXiv 2110.02861)."""
    return 2 * trained + 8 * (trained // 256) if "8bit" in name else 8 * trained


def saved_by_layer(shape: Architecture, run: Setting, wide: int) -> int:
    """What autograd keeps of one layer for its backward pass, in transformers' own order of operations."""
    tokens, full = run.tokens, run.mode == "full"
    norms = shape.norms * tokens * shape.hidden * (4 + (wide if full else 0))  # their inputs in fp32; full: also normed
    if shape.query_norm:
        norms += tokens * (shape.queries + shape.keys) * 4
    # attention: query, key and value (but on a CPU repeated for each head), output, and a number a head and token
    keys = shape.keys if run.device == "cpu" and not shape.scores_kept else shape.queries
    attention = tokens * 2 * (shape.queries + keys) * wide + tokens * shape.heads * 4
    if shape.scores_kept or run.scores_kept:
        attention += shape.heads * tokens * run.longest * (2 * wide + 4)
    gates = 3 * tokens * shape.intermediate * wide  # gate, its activation, up: what their product needs
    targets = list(shape.linears) if full else shape.targets(run.targets)
    # under dropout each layer's adapter reads a copy of its own
    read = [(str(number) if run.dropout else linear.source, linear.inputs) for number, linear in enumerate(targets)]
    inputs = tokens * sum(dict(read).values()) * (wide + (1 if run.dropout else 0))
    low_rank = 0 if full else tokens * run.rank * len(targets) * wide
    return norms + attention + gates + inputs + low_rank


def end_of_model(shape: Architecture, run: Setting, wide: int) -> int:
    """Behind the layers: the last norm's input and output, the trained positions picked out, and their gradient (of fp16 in fp32)."""
    return run.tokens * shape.hidden * (4 + 3 * wide + (2 if run.precision == "fp16" else 0))


def copies_of_weights(shape: Architecture, adapter: int, full: bool, wide: int) -> int:
    """Autocast keeps a 16-bit copy of each trained weight until the forward pass ends; backward needs it."""
    return 0 if wide == 4 else 2 * ((shape.in_linears + shape.embedding) if full else adapter)


def logits(shape: Architecture, run: Setting, wide: int) -> int:
    """A chunk's logits and their log-probabilities in fp32; or all rows at once."""
    rows = min(max(_LOGITS // shape.vocabulary, 16), run.tokens) if run.chunked else run.tokens
    return rows * shape.vocabulary * 8


def going_back(shape: Architecture, run: Setting, wide: int) -> int:
    """Gradients of activations at work at once: the MLP's product, gate and up; or a norm's three in fp32."""
    mlp = 3 * run.tokens * shape.intermediate * wide + run.tokens * shape.hidden * 2 * wide
    return max(mlp, 3 * run.tokens * shape.hidden * 4)


def no_gradient(shape: Architecture, run: Setting, wide: int) -> int:
    """Activations at work at once without gradients."""
    return run.tokens * (3 * shape.intermediate * wide + shape.hidden * (4 + 2 * wide))
