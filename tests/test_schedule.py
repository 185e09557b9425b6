"""The schedule: every example once an epoch, in an order that the seed alone decides."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.utils.encoding import Encoded
from scripts.utils.schedule import Schedule, make_schedule, row_budget
from scripts.utils.schema import Config, RenderSection, TrainSection


def config(**train: object) -> Config:
    return Config(render=RenderSection(max_length=64), train=TrainSection(**train))  # type: ignore[arg-type]


def examples(count: int) -> list[Encoded]:
    return [Encoded([1] * (n % 40 + 5), [True] * (n % 40 + 5)) for n in range(count)]


def seen(schedule: Schedule, start: int = 0, stop: int | None = None) -> Counter[int]:
    return Counter(i for step in schedule.steps[start:stop] for row in step for i in row)


@given(st.integers(1, 80), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(1, 3))
@settings(max_examples=60)
def test_whole_epochs_hold_each_example_once_each(
    count: int, epochs: int, group: int, packing: bool, batch: int
) -> None:
    schedule = make_schedule(
        config(epochs=epochs, gradient_accumulation=group, packing=packing, batch_size=batch), examples(count)
    )
    assert seen(schedule) == Counter(dict.fromkeys(range(count), epochs))
    ends = sorted(schedule.epoch_ends)
    assert len(ends) == epochs and ends[-1] == len(schedule.steps)
    for start, end in zip([0, *ends], ends, strict=False):
        assert seen(schedule, start, end) == Counter(range(count)), "a step holds rows of two epochs"


@pytest.mark.parametrize("epochs", [0.25, 0.5, 1.5])
def test_a_fraction_of_an_epoch_is_that_fraction_of_its_steps(epochs: float) -> None:
    whole = make_schedule(config(epochs=1, gradient_accumulation=1), examples(80))
    part = make_schedule(config(epochs=epochs, gradient_accumulation=1), examples(80))
    assert len(part.steps) == pytest.approx(epochs * len(whole.steps), abs=1.5)


def test_max_steps_wins_over_epochs_in_both_directions() -> None:
    for steps in (1, 3, 500):
        assert len(make_schedule(config(epochs=1, max_steps=steps), examples(40)).steps) == steps


def test_the_seed_decides_the_order_and_more_steps_keep_the_first_ones() -> None:
    short, long = (make_schedule(config(max_steps=n, gradient_accumulation=2), examples(50)) for n in (5, 20))
    assert long.steps[:5] == short.steps
    assert make_schedule(config(max_steps=5, gradient_accumulation=2, seed=7), examples(50)).steps != short.steps


def test_a_packed_row_has_the_length_that_the_config_says() -> None:
    assert row_budget(config()) == 64 and row_budget(config(batch_size=3)) == 192
    assert row_budget(config(pack_length=20, batch_size=3)) == 20
    rows = [row for step in make_schedule(config(epochs=1, pack_length=50), examples(60)).steps for row in step]
    lengths = [len(example.ids) for example in examples(60)]
    assert all(sum(lengths[i] for i in row) <= 50 or len(row) == 1 for row in rows)
    assert max(len(row) for row in rows) > 1
