"""Which rows every optimizer step trains on, fixed before the first step.

A schedule depends on the data, the config and the seed alone, so a resumed run goes on with exactly the rows that an
uninterrupted one would have seen: nothing random happens inside a loader, a collator or a worker.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from scripts.utils.encoding import Encoded
from scripts.utils.packing import make_rows

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Step = list[list[int]]


@dataclass(frozen=True)
class Schedule:
    """``steps[i]`` are the micro batches of optimizer step i + 1; ``epoch_ends`` are the steps that end an epoch."""

    steps: list[Step]
    epoch_ends: frozenset[int]
    steps_per_epoch: float

    def is_due(self, step: int, strategy: str, every: int) -> bool:
        """Whether what is done by this strategy (no, steps, epoch) is done after this step, from 1."""
        if strategy == "steps":
            return step % every == 0 or step >= len(self.steps)
        return strategy == "epoch" and step in self.epoch_ends


def row_budget(config: "Config") -> int:
    """Tokens of a packed row."""
    return config.train.pack_length or config.render.max_length * config.train.micro_batch


def make_schedule(config: "Config", examples: Sequence[Encoded]) -> Schedule:
    """Shuffle and pack each epoch anew by the seed; a step never holds rows of two epochs.

    ``train.max_steps`` wins over ``train.epochs``; a fraction of an epoch is a fraction of the first one's steps.
    """
    train = config.train
    budget = row_budget(config)
    group = train.gradient_accumulation
    steps: list[Step] = []
    ends: set[int] = set()
    wanted = per_epoch = 0
    for epoch in itertools.count():
        seed = train.seed * 100_003 + epoch
        rows = make_rows(examples, budget=budget, batch_size=train.micro_batch, packing=train.packing, seed=seed)
        steps += [rows[start : start + group] for start in range(0, len(rows), group)]
        per_epoch = per_epoch or len(steps)
        whole, part = divmod(train.epochs, 1)
        # epochs differ by a step or so, as each is packed anew: whole epochs end where they end
        wanted = train.max_steps or (len(steps) if epoch + 1 <= whole else wanted)
        if not train.max_steps and epoch + 1 > whole:
            wanted += max(1, round(part * per_epoch)) if part else 0
        if len(steps) >= wanted and (train.max_steps or epoch + 1 >= train.epochs):
            break
        ends.add(len(steps))
    ends.add(min(wanted, len(steps)))
    return Schedule(steps[:wanted], frozenset(ends), per_epoch)


class Steps(Dataset[Step]):
    """One item an optimizer step: its micro batches as lists of examples' numbers."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __len__(self) -> int:
        return len(self.schedule.steps)

    def __getitem__(self, index: int) -> Step:
        return self.schedule.steps[index]
