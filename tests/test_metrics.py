"""What the metrics promise: they move with the answers, and None where nothing can be measured."""

import pytest

from scripts.utils import metrics


def scores(answers: list[str], references: list[str]) -> dict[str, float | None]:
    found = metrics.score_answers(answers, references, [3] * len(answers), [True] * len(answers))
    return {name: score.value for name, score in found.items()}


def test_perfect_answers_score_full_marks_on_every_metric() -> None:
    rows = ['{"city": "Oslo", "count": 3}', '{"city": "Bern", "count": 1}']
    found = scores(rows, rows)
    assert found["exact_match"] == found["json_valid"] == found["json_exact"] == found["rouge_l"] == 1.0
    assert found["chrf"] == pytest.approx(100.0)


def test_no_metric_is_a_constant() -> None:
    """Good, middling and bad answers give three different values in every graded metric."""
    references = ['{"city": "Oslo", "count": 3}', '{"city": "Bern", "count": 1}']
    good, bad = references, ["I am not sure what you mean by that", "qqq"]
    middling = [references[0], '{"city": "Bern", "count": 2']
    for name in ("exact_match", "json_valid", "json_exact", "rouge_l", "chrf"):
        values = [scores(answers, references)[name] for answers in (good, middling, bad)]
        assert values[0] > values[1] > values[2], (name, values)  # type: ignore[operator]


def test_exact_match_forgives_outer_whitespace_and_nothing_else() -> None:
    assert metrics.exact_match("  Oslo\n", "Oslo")
    assert not metrics.exact_match("Oslo.", "Oslo")
    assert not metrics.exact_match("oslo", "Oslo")
    assert not metrics.exact_match("question? Oslo", "Oslo")


def test_json_metrics_are_missing_not_zero_where_references_are_no_json() -> None:
    found = metrics.score_answers(["Oslo", "{}"], ["Oslo", "42"], [1, 1], [True, True])
    for name in ("json_valid", "json_exact"):
        assert found[name].value is None
        assert "JSON" in found[name].reason
        assert metrics.show(name, found[name]) == "–"


def test_json_is_counted_only_over_rows_whose_reference_is_json() -> None:
    found = scores(["free text", '{"a": 1}', "{oops"], ["free text", '{"a": 1}', '{"a": 2}'])
    assert found["json_valid"] == found["json_exact"] == 0.5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a": 1, "b": [2, 3]}', '{"b": [2, 3], "a": 1}', True),
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": null}', "{}", False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": {"b": false}}', '{"a": {"b": 0}}', False),
    ],
)
def test_json_equality_is_about_values_not_spelling(one: str, other: str, same: bool) -> None:
    assert metrics.same_json(metrics.parse_json(one), metrics.parse_json(other)) is same


@pytest.mark.parametrize(
    "text", ["", "NaN", '{"a": NaN}', '```json\n{"a": 1}\n```', '{"a": 1} done', "[" * 100_000, "1" * 5000, '"x"']
)
def test_what_is_not_one_json_object_or_array_is_no_json(text: str) -> None:
    assert metrics.parse_json(text) is None


def test_empty_answers_score_zero_without_failing() -> None:
    found = scores(["", " "], ['{"a": 1}', "Oslo"])
    assert found["exact_match"] == found["rouge_l"] == found["json_valid"] == 0.0
    assert found["chrf"] == 0.0


def test_no_rows_give_no_scores_instead_of_zeros() -> None:
    assert set(scores([], []).values()) == {None}


def test_rouge_l_measures_any_script() -> None:
    """rouge-score's own tokenizer drops everything but a–z and 0–9 and so gives 0.0 here."""
    for text, close in (
        ("Привет, большой мир", "Привет, мир"),
        ("今天天气很好", "今天天气好"),
        ("Größe über alles", "Größe alles"),
    ):
        assert metrics.rouge_l([text], [text]).value == 1.0
        assert 0.5 < (metrics.rouge_l([close], [text]).value or 0) < 1.0


def test_rouge_l_is_missing_where_no_reference_holds_a_word() -> None:
    assert metrics.rouge_l(["+"], ["=)"]).value is None


def test_lengths_and_the_share_cut_at_the_limit_are_reported() -> None:
    found = metrics.score_answers(["a", "b", "c", "d"], ["a"] * 4, [1, 2, 3, 6], [True, True, True, False])
    assert found["mean_tokens"].value == 3.0
    assert found["hit_limit"].value == 0.25


def test_the_table_shows_change_with_sign_and_a_dash_for_what_is_missing() -> None:
    change = metrics.difference(metrics.Score(0.25), metrics.Score(0.9))
    assert metrics.show("exact_match", change, signed=True) == "+65.0 pp"
    assert metrics.show("loss", metrics.difference(metrics.Score(2.0), metrics.Score(0.5)), signed=True) == "-1.500"
    missing = metrics.difference(metrics.Score(None, "why"), metrics.Score(1.0))
    assert (missing.value, missing.reason) == (None, "why")
