"""Every key of a sweep's plan. The schema is closed, as the config's is; docs/sweeps.md explains the keys."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from scripts.utils.schema import Positive, Section

# one thing needs no brackets
_listed = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
Texts = Annotated[list[str], _listed]
Values = Annotated[list[Any], Field(min_length=1), _listed]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Range(Section):
    """Numbers to draw from, evenly, or with ``log`` evenly in their logarithm."""

    min: float
    max: float
    log: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if not self.min < self.max:
            raise ValueError(f"min ({self.min:g}) must be below max ({self.max:g})")
        if self.log and self.min <= 0:
            raise ValueError(f"log needs a min above 0, this is {self.min:g}")
        return self


def _kind(value: Any) -> str:
    return "range" if isinstance(value, dict | Range) else "list"


class RandomPart(Section):
    """``count`` draws; the reader has put the config keys beside count and seed into ``values``."""

    count: Positive
    seed: int = 0
    values: dict[str, Annotated[Annotated[Values, Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)]]


class Budget(Section):
    """What the runs may take together, over all starts of the sweep."""

    runs: Positive | None = None
    hours: Annotated[float, Field(gt=0)] | None = None


class Prune(Section):
    """Which runs are given up: those whose best validation loss so far is not among the best ``percentile`` at that step."""

    percentile: Annotated[float, Field(gt=0, lt=100)] = 50
    after_runs: Positive = 4
    from_step: Annotated[int, Field(ge=0)] = 0


class Plan(Section):
    data: Texts = Field(default_factory=list)
    configs: Texts = Field(default_factory=list)
    set: Texts = Field(default_factory=list)
    steps: Annotated[list[Literal["process", "style", "render", "train", "eval", "merge"]], _listed] = Field(
        default_factory=list
    )
    grid: dict[str, Values] = Field(default_factory=dict)
    random: RandomPart | None = None
    variants: Annotated[list[dict[str, Any]], _listed] = Field(default_factory=list)
    seeds: Annotated[list[Seed], _listed] = Field(default_factory=list)
    name: str | None = None
    budget: Budget = Budget()
    prune: Prune | None = None
