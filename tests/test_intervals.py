"""What the intervals promise: the same each time, as wide as chance is, and noise is never called a gain."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import intervals
from scripts.utils.intervals import Interval, bootstrap, mean, verdict


def spread(base: list[float], tuned: list[float]) -> Interval:
    found = bootstrap(mean(base), mean(tuned))
    assert found is not None
    return found


def test_the_interval_is_the_same_each_time_and_holds_the_difference() -> None:
    random = numpy.random.default_rng(1)
    base, tuned = random.normal(0, 1, 50).tolist(), random.normal(1, 1, 50).tolist()
    first = spread(base, tuned)
    assert first == spread(base, tuned)
    assert first.low < numpy.mean(tuned) - numpy.mean(base) < first.high
    assert (first.rows, first.changed) == (50, 50)


def test_pairs_are_kept_together() -> None:
    """Rows differ a hundred times more among one another than by tuning: unpaired, the gain would drown."""
    base = [float(100 * n) for n in range(30)]
    found = spread(base, [value + 1 + 0.1 * (-1) ** n for n, value in enumerate(base)])
    assert 0.9 < found.low < 1.0 < found.high < 1.1


def test_weights_make_a_loss_a_token() -> None:
    """Long rows count as often as they have tokens; a mean of the rows' means would be 0.5."""
    base, tuned = (
        mean([1.0] * 10 + [90.0] * 10, [1] * 10 + [90] * 10),
        mean([0.0] * 10 + [90.0] * 10, [1] * 10 + [90] * 10),
    )
    assert tuned.value - base.value == pytest.approx(-10 / 910)
    found = bootstrap(base, tuned)
    assert found is not None and -0.05 < found.low < found.high < 0
    assert found.changed == 10


@pytest.mark.parametrize("rows", [10, 20, 60])
def test_noise_is_called_a_change_in_no_more_than_one_case_of_twenty(rows: int) -> None:
    """Two models that are equally good, 800 times: right in 70 % of the rows each, and a graded score."""
    random = numpy.random.default_rng(rows)
    for draw in (lambda: (random.random(rows) < 0.7).astype(float), lambda: random.normal(0, 1, rows)):
        said = 0
        for _ in range(800):
            interval = bootstrap(mean(draw()), mean(draw()))
            said += verdict(interval, "higher") != "no clear change"
        assert said / 800 < 0.07


def test_a_real_gain_is_found() -> None:
    assert verdict(spread([0.0] * 15 + [1.0] * 5, [1.0] * 20), "higher") == "better"
    assert verdict(spread([0.0] * 15 + [1.0] * 5, [1.0] * 20), "lower") == "worse"
    assert verdict(spread([3.0] * 20, [5.0] * 20), "") == "changed"


def test_five_rows_that_all_turn_right_are_no_clear_change() -> None:
    """They do so by chance once in sixteen times, however many rows stay as they were."""
    for rows in (20, 1000):
        base, tuned = [0.0] * rows, [1.0] * 5 + [0.0] * (rows - 5)
        assert spread(base, tuned).changed == 5
        assert verdict(spread(base, tuned), "higher") == "no clear change"
        tuned[5:8] = [1.0] * 3
        assert verdict(spread(base, tuned), "higher") == "better"


def test_too_few_rows_have_no_interval_and_no_verdict() -> None:
    assert bootstrap(mean([0.0] * 9), mean([1.0] * 9)) is None
    assert verdict(None, "higher") == "unknown"


def test_no_difference_at_all_is_no_change() -> None:
    found = spread([1.0, 2.0] * 10, [1.0, 2.0] * 10)
    assert (found.low, found.high, found.changed) == (0.0, 0.0, 0)
    assert verdict(found, "lower") == verdict(found, "") == "no clear change"


def test_many_rows_are_drawn_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = numpy.random.default_rng(3)
    base, tuned = random.normal(0, 1, 40).tolist(), random.normal(0.2, 1, 40).tolist()
    whole = spread(base, tuned)
    monkeypatch.setattr(intervals, "_AT_ONCE", 400)
    assert spread(base, tuned) == whole


def test_a_perplexity_that_is_no_number_has_no_interval() -> None:
    high = intervals.exponential(mean([800.0] * 20))
    with numpy.errstate(invalid="ignore"):
        assert bootstrap(high, high) is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=10, max_size=30))
def test_swapping_the_sides_turns_the_interval_round(pairs: list[tuple[float, float]]) -> None:
    base, tuned = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = spread(base, tuned), spread(tuned, base)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
