"""How the next token is chosen, and where an answer ends by its text. Both are called by transformers after each token.

Each row draws with random numbers of its own, so that its text does not depend on the rows that it shares a batch with.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Draw:
    """Draw a token for each row at ``temperature`` (above 0) from the likeliest tokens that make up ``top_p``.

    Row ``i`` draws with ``seeds[i]``. The scores that it gives leave one token possible, so generation must be greedy.
    Each token runs a race against an exponential clock of its own, and the first wins: that is a draw by probability,
    and one that rounding in the logits almost never changes, for only a near tie can fall otherwise. (A point on the
    summed probabilities would lie near one of tens of thousands of edges.)
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        warpers = [TemperatureLogitsWarper(temperature)] + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        self._warp = LogitsProcessorList(warpers)
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """``input_ids``: int64 [rows, tokens], ``scores``: float [rows, vocabulary]."""
        import torch

        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        clocks = torch.empty_like(scores, dtype=torch.float32)
        for row, own in enumerate(self._generators):
            clocks[row].exponential_(generator=own)
        tokens = (self._warp(input_ids, scores).float() - clocks.log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)


class StopAtText:
    """Ends a row once its answer holds one of ``stops``. ``ends`` maps a row to its tokens at that moment."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str], prompt_tokens: int) -> None:
        self._decode, self._stops, self._from = decode, stops, prompt_tokens
        # a character has at most four tokens, its bytes; the rest is for what a decoder does to the first token
        self._window = 4 * max(map(len, stops)) + 16
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: "torch.Tensor", scores: Any, **_: Any) -> "torch.Tensor":
        import torch

        count = input_ids.shape[1]
        for row, tail in enumerate(input_ids[:, max(self._from, count - self._window) :].tolist()):
            if row not in self.ends and cut_at(self._decode(tail), self._stops)[1]:
                self.ends[row] = count - self._from
        return torch.tensor([row in self.ends for row in range(input_ids.shape[0])], device=input_ids.device)


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of ``stops`` in it, and whether there was one."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop, and must wait."""
    longest = max((len(stop) for stop in stops), default=0)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
