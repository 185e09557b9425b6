"""Which runs a sweep gives up: by the validation losses that they write, against finished runs of the same rows."""

import json
from pathlib import Path

import pytest

from scripts.utils import sweep_plan, sweep_schema
from scripts.utils.sweep_plan import Run, Wanted
from scripts.utils.sweep_prune import Watch, losses

pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("{}")
    return tmp_path


def some_runs(count: int, data: str = "a.jsonl") -> list[Run]:
    plan = sweep_schema.Plan.model_validate({"seeds": list(range(count))})
    return sweep_plan.expand(Wanted((data,), ("one.yaml",), ("train",), (), plan))


def write(run: Run, losses_at: dict[int, float], tail: str = "") -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "loss": 1.0} for step in losses_at] + [
        {"step": s, "eval_loss": v} for s, v in losses_at.items()
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def watch(finished: list[Run], **settings: float) -> Watch:
    return Watch(sweep_schema.Prune.model_validate({"after_runs": 3, **settings}), finished)


def finished_runs(count: int = 3, data: str = "a.jsonl") -> tuple[list[Run], Run]:
    """Runs that ended with losses 1, 2, 3 … at step 10, the half of it higher at step 5; and one that is new."""
    runs = some_runs(count + 1, data)
    for number, run in enumerate(runs[:-1], 1):
        write(run, {5: number + 0.5, 10: float(number)})
    return runs[:-1], runs[-1]


def test_the_worse_half_at_the_same_step_is_given_up() -> None:
    done, new = finished_runs()
    write(new, {5: 2.6})
    assert watch(done).is_hopeless(new)
    write(new, {5: 2.4})
    assert not watch(done).is_hopeless(new)
    # a stricter share
    assert watch(done, percentile=25).is_hopeless(new)


def test_nothing_is_given_up_too_early_or_at_its_end() -> None:
    done, new = finished_runs()
    write(new, {5: 9.0})
    assert not watch(done[:2]).is_hopeless(new)
    assert not watch(done, from_step=6).is_hopeless(new)
    write(new, {10: 9.0})
    assert not watch(done).is_hopeless(new)


def test_a_run_on_other_rows_says_nothing_about_it() -> None:
    others, _ = finished_runs(data="b.jsonl")
    done, new = finished_runs(1)
    write(new, {5: 9.0})
    assert not watch([*others, *done]).is_hopeless(new)
    assert watch([*others, *done], after_runs=1).is_hopeless(new)


def test_a_run_that_finishes_now_counts_from_now_on() -> None:
    done, new = finished_runs()
    seen = watch(done[:2])
    write(new, {5: 9.0})
    assert not seen.is_hopeless(new)
    seen.finished(done[2])
    # it is asked again when it has written more
    write(new, {5: 9.0, 7: 9.0})
    assert not seen.is_hopeless(new)  # nobody else was measured at step 7
    write(done[0], {5: 1.0, 8: 1.0, 10: 1.0})
    fresh = watch([done[0], done[1], done[2]])
    write(new, {5: 1.0, 8: 9.0})
    assert not fresh.is_hopeless(new)  # its best loss so far is what counts


def test_a_line_that_is_being_written_is_passed_over() -> None:
    done, new = finished_runs()
    write(new, {5: 9.0}, tail='{"step": 10, "eval_l')
    assert losses(new) == {5: 9.0}
    assert watch(done).is_hopeless(new)
    assert losses(some_runs(9)[-1]) == {}
