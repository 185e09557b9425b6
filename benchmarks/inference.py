"""Greedy answers to 32 prompts: in one batch, one by one, and by transformers' own generate; the texts compared."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.rows import Rows

PROMPTS, NEW_TOKENS = 32, 48


def prompts_of(rows: Rows, count: int = PROMPTS) -> list[list[int]]:
    """The rows' ids up to the first token with loss: what an answer would follow."""
    examples = [*rows.encoded, *rows.encoded_held]
    return [example.ids[: example.trained.index(True)] for example in examples if True in example.trained][:count]


def ways(model: Any, tokenizer: Any, stops: Sequence[int], prompts: Sequence[list[int]]) -> dict[str, Callable[[], list[list[int]]]]:  # fmt: skip
    """Name, and what gives the ids of the answers."""
    import torch

    from scripts.utils.generation import generate

    def ours(batch_size: int) -> list[list[int]]:
        made = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=NEW_TOKENS,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            stop_ids=stops,
            batch_size=batch_size,
        )
        return [answer.ids for answer in made]

    def alone() -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            new = output[0, len(prompt) :].tolist()
            found.append(new[: next((at for at, token in enumerate(new) if token in stops), len(new))])
        return found

    return {
        f"{len(prompts)} in one batch": lambda: ours(len(prompts)),
        "one by one": lambda: ours(1),
        "transformers' generate, one by one": alone,
    }


def inference(arguments: argparse.Namespace, base: Path, rows: Rows, model: Path) -> tuple[str, dict[str, Any], str]:
    from benchmarks import results
    from scripts.utils import chat
    from scripts.utils.backends import load_causal_lm
    from scripts.utils.trained import stop_ids

    loaded = load_causal_lm(model, precision=arguments.precision, device="cpu").eval()
    tokenizer = chat.load_tokenizer(model)
    prompts = prompts_of(rows)
    known = ways(loaded, tokenizer, stop_ids(loaded, tokenizer), prompts)
    seconds: dict[str, list[float]] = {name: [] for name in known}
    answers: dict[str, list[list[int]]] = {}
    loaded.generate(max_new_tokens=2, do_sample=False, pad_token_id=0, inputs=_tensor(prompts[0]))  # warms up
    for number in range(arguments.rounds):
        for name in known if number % 2 == 0 else reversed(known):
            start = time.perf_counter()
            answers[name] = known[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"bench: {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    plain = "one by one"
    rates = {name: sum(map(len, answers[name])) / middle[name] for name in known}
    equal = {name: sum(a == b for a, b in zip(answers[name], answers[plain], strict=True)) for name in known}
    text = results.table(
        ["", "answers' tokens/s", "of one by one", "same text as one by one"],
        [
            [name, f"{rates[name]:,.1f}", f"{rates[name] / rates[plain]:.2f}×", f"{equal[name]} of {len(prompts)}"]
            for name in known
        ],
    )
    found = {
        "machine": results.machine(),
        "date": date.today().isoformat(),
        "precision": arguments.precision,
        "seconds": seconds,
        "rates": rates,
        "equal": equal,
    }
    ended = (
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, padded on the left, up to "
        f"{NEW_TOKENS} new tokens, greedy, in {arguments.precision}; {results.of_rounds(arguments.rounds)}. "
        f"{found['machine']}, {found['date']}."
    )
    return "inference", found, f"### Inference in {arguments.precision}\n\n{text}\n\n{ended}\n"


def _tensor(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])
