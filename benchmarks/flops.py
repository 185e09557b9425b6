"""How many floating-point operations a step needs, and how many this processor can do: ``python -m benchmarks.flops fp32``.

A linear layer of N weights takes 2 N operations a token forward (a multiplication and an addition a weight), and backward
2 N for the gradient of its input and 2 N for that of its weights: 6 N where it is trained (Kaplan et al. 2020,
arXiv 2001.08361, section 2.1). A frozen layer has no gradient of its weights: 4 N. The head is frozen here and needed only at
trained positions. Attention multiplies twice forward (queries by keys, weights by values) and four times backward, each
2 × heads × head size operations for each pair of a token and one that it sees (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B); with a causal mask an example of L tokens has L (L + 1) / 2 pairs.

What is left out: norms, activations, the softmax, the optimizer, the input gradient that the first layer does not need. What
checkpointing computes twice, padding, and logits without a label count once or not at all: it is the work that has to be done.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """``frozen``: weights of all linear layers but the head; ``trained``: those of the adapter; ``attention``: layers × heads × head size."""

    frozen: int
    trained: int
    head: int
    attention: int

    def step(self, lengths: Sequence[int], trained_tokens: int) -> int:
        """Operations for one pass, forward and backward, over examples of these lengths."""
        tokens = sum(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        linear = (4 * self.frozen + 6 * self.trained) * tokens
        return linear + 4 * self.head * trained_tokens + 12 * self.attention * pairs


def shape_of(model: Path, rank: int) -> Shape:
    """Of a model folder with LoRA on every linear layer but the head; looks at its config.json only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(model), local_files_only=True)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    linear = [m for m in built.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        frozen=sum(m.weight.numel() for m in linear),
        trained=sum(rank * (m.in_features + m.out_features) for m in linear),
        head=head.weight.numel(),
        attention=text.num_hidden_layers * text.num_attention_heads * size,
    )


def limit(precision: str, seconds: float = 3.0) -> float:
    """Operations a second of torch's matrix multiplication: the best of several sizes, each tried many times."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    best, device = 0.0, "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else int
    for size in (768, 1536, 3072) if device == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
        left @ right
        wait()
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            start = time.perf_counter()
            left @ right
            wait()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    print(json.dumps({"limit": limit(sys.argv[1])}))
