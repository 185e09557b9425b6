"""What the metrics promise: they move with the answers, and None where nothing can be measured."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import comparison, metrics, overlap, scoring
from scripts.utils.evaluation import Answer, Answers


def side(
    answers: Sequence[str], references: Sequence[str], tokens: Sequence[int] | None = None, cut: Sequence[int] = ()
) -> comparison.SideScores:
    rows = [{"id": str(n), "prompt_end": 1, "reference": text} for n, text in enumerate(references)]
    counts = tokens or [3] * len(answers)
    ended = [Answer(text, counts[n], n not in cut, 0.5) for n, text in enumerate(answers)]
    return comparison.score_side(rows, Answers([2.0] * len(rows), [4] * len(rows), ended))


def scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    return {name: score.value for name, score in side(answers, references).scores.items()}


def test_perfect_answers_score_full_marks_on_every_metric() -> None:
    rows = ['{"city": "Oslo", "count": 3}', '{"city": "Bern", "count": 1}']
    found = scores(rows, rows)
    for name in ("exact_match", "normalised_match", "f1", "json_valid", "json_exact", "json_keys", "rouge_l"):
        assert found[name] == 1.0, name
    assert (found["chrf"], found["bleu"]) == pytest.approx((100.0, 100.0))
    assert found["repetition"] == 0.0


def test_no_metric_is_a_constant() -> None:
    """Good, middling and bad answers give three different values in every graded metric."""
    references = ['{"city": "Oslo", "count": 3}', '{"city": "Bern", "count": 1}']
    good, bad = references, ["I am not sure what you mean by that", "qqq"]
    middling = [references[0], '{"city": "Bern", "count": 2']
    graded = "exact_match normalised_match f1 json_valid json_exact json_keys rouge_l bleu chrf".split()
    for name in graded:
        values = [scores(answers, references)[name] for answers in (good, middling, bad)]
        assert values[0] > values[1] > values[2], (name, values)  # type: ignore[operator]


def test_exact_match_forgives_outer_whitespace_and_nothing_else() -> None:
    assert scoring.exact_match("  Oslo\n", "Oslo")
    assert not scoring.exact_match("Oslo.", "Oslo")
    assert not scoring.exact_match("oslo", "Oslo")
    assert not scoring.exact_match("question? Oslo", "Oslo")


def test_json_metrics_are_missing_not_zero_where_references_are_no_json() -> None:
    found = side(["Oslo", "{}"], ["Oslo", "42"]).scores
    for name in ("json_valid", "json_exact", "json_keys"):
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
    assert scoring.same_json(scoring.parse_json(one), scoring.parse_json(other)) is same


@pytest.mark.parametrize(
    "text", ["", "NaN", '{"a": NaN}', '```json\n{"a": 1}\n```', '{"a": 1} done', "[" * 100_000, "1" * 5000, '"x"']
)
def test_what_is_not_one_json_object_or_array_is_no_json(text: str) -> None:
    assert scoring.parse_json(text) is None


def test_empty_answers_score_zero_without_failing() -> None:
    found = scores(["", " "], ['{"a": 1}', "Oslo"])
    for name in ("exact_match", "normalised_match", "f1", "rouge_l", "json_valid", "json_keys", "chrf", "bleu"):
        assert found[name] == 0.0, name


def test_no_answers_give_no_scores_instead_of_zeros() -> None:
    rows = [{"id": "0", "prompt_end": 1, "reference": "Oslo"}]
    found = comparison.score_side(rows, Answers([2.0], [4], []), "eval.generate is false")
    assert found.scores["loss"].value == 0.5
    for name in metrics.METRICS:
        if name not in metrics.OF_LOSS:
            assert found.scores[name] == metrics.Score(None, "eval.generate is false")


def test_rouge_l_measures_any_script() -> None:
    """rouge-score's own tokenizer drops everything but a–z and 0–9 and so gives 0.0 here."""
    for text, close in (
        ("Привет, большой мир", "Привет, мир"),
        ("今天天气很好", "今天天气好"),
        ("Größe über alles", "Größe alles"),
    ):
        for name in ("rouge_l", "f1"):
            assert scores([text], [text])[name] == 1.0
            assert 0.5 < (scores([close], [text])[name] or 0) < 1.0


def test_scores_of_words_are_missing_where_no_reference_holds_a_word() -> None:
    found = side(["+"], ["=)"]).scores
    for name in ("rouge_l", "f1", "normalised_match"):
        assert found[name] == metrics.Score(None, "no reference holds a word")
    assert side(["x"], [" "]).scores["chrf"] == metrics.Score(None, "all references are empty")


def test_lengths_and_the_share_cut_at_the_limit_are_reported() -> None:
    found = side(["a", "b", "c", "d"], ["a"] * 4, tokens=[1, 2, 3, 6], cut=[3]).scores
    assert found["mean_tokens"].value == 3.0
    assert found["hit_limit"].value == 0.25


def test_each_row_has_a_score_of_its_own_whose_mean_is_the_metric() -> None:
    found = side(["Oslo", "the Oslo!", "1 2 3"], ["Oslo", "Oslo", "so 3"])
    assert [row["exact_match"] for row in found.rows] == [1.0, 0.0, 0.0]
    assert [row["normalised_match"] for row in found.rows] == [1.0, 1.0, 0.0]
    assert [row["number_match"] for row in found.rows] == [None, None, 1.0]
    assert [row["loss"] for row in found.rows] == [0.5, 0.5, 0.5]
    assert set(found.rows[0]) == {*map(metrics.row_name, metrics.METRICS)} - {"perplexity"}
    for name in ("exact_match", "normalised_match", "f1", "rouge_l", "repetition"):
        assert found.scores[name].value == pytest.approx(sum(row[name] or 0.0 for row in found.rows) / 3)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Oslo.", "oslo", True),
        ("An  apple,\na day", "apple day", True),
        ("3.14", "314", False),
        ("-5", "5", False),
        ("−5", "-5", True),
        ("1,234", "1234", True),
        ("«Größe»!", "größe", True),
        ("今天。", "今天", True),
        ("Oslo Bern", "Bern Oslo", False),
    ],
)
def test_normalised_match_forgives_case_articles_and_punctuation_but_no_number(
    one: str, other: str, same: bool
) -> None:
    assert (scoring.normalised(one) == scoring.normalised(other)) is same


def test_token_f1_counts_common_words_as_often_as_both_have_them() -> None:
    assert scoring.token_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(4 / 6)
    assert scoring.token_f1(["a"], ["b"]) == scoring.token_f1([], ["b"]) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 16 - 3 - 4 = 9 duck eggs\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### 12 apples, and 5 left", "12"),
        ("It costs $2,125.50.", "2125.50"),
        ("minus: -7", "-7"),
        ("16-3=13", "13"),
        ("16-3", "3"),
        ("-$5", "-5"),
        ("1 234 567 people", "567"),
        ("1\u202f234\u202f567 people", "1234567"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("50%", "50"),
        ("2e3", "2000"),
        ("3.50", "3.5"),
        ("no number ####", None),
        ("9 ####", "9"),
        ("#### 5\n#### 6", "6"),
    ],
)
def test_the_last_number_is_read_as_gsm8k_does(text: str, number: str | None) -> None:
    assert scoring.last_number(text) == (None if number is None else Decimal(number))


def test_number_match_needs_a_reference_that_ends_in_a_number() -> None:
    assert scoring.number_match("thus 18.0", "9 * 2 = 18\n#### 18") is True
    assert scoring.number_match("18 or 19", "#### 18") is False
    assert scoring.number_match("none", "#### 18") is False
    assert scoring.number_match("18", "The answer is **18**.") is True
    assert scoring.number_match("18", "Room 18 is free") is None
    assert scoring.number_match("18", '{"room": 18}') is None


@given(st.text())
def test_no_text_breaks_a_scorer(text: str) -> None:
    scoring.last_number(text)
    assert 0.0 <= scoring.repetition(text) < 1.0
    assert scoring.normalised(text) == scoring.normalised(text.strip())
    assert scoring.number_match(text, "12") in (True, False)


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "It is {}.", "so 3 + 4 …\n#### {}", "= **{}**"]))
def test_any_whole_number_is_found_with_and_without_separators(number: int, around: str) -> None:
    for written in (str(number), f"{number:,}"):
        assert scoring.last_number(around.format(written)) == number


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_json_keys_is_one_for_the_same_object_and_less_for_any_other(one: Any, other: Any) -> None:
    import json

    a, b = json.dumps(one), json.dumps(other)
    assert scoring.json_keys(a, a) == 1.0
    shared = scoring.json_keys(a, b)
    assert shared is not None and 0.0 <= shared <= 1.0
    assert shared == scoring.json_keys(b, a)


def test_json_keys_counts_each_right_key_and_a_key_too_many_as_wrong() -> None:
    wanted = '{"a": 1, "b": {"c": 2, "d": [1, 2]}}'
    assert scoring.json_keys('{"a": 1, "b": {"c": 2, "d": [1, 2]}}', wanted) == 1.0
    assert scoring.json_keys('{"a": 1, "b": {"c": 0, "d": [2, 1]}}', wanted) == pytest.approx(1 / 3)
    assert scoring.json_keys('{"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": 0}', wanted) == 0.75
    assert scoring.json_keys('{"a": true}', '{"a": 1}') == 0.0
    assert scoring.json_keys("no", wanted) == 0.0
    assert scoring.json_keys("{}", "{}") == 1.0
    assert scoring.json_keys('{"a":' * 900 + "1" + "}" * 900, wanted) == 0.0
    assert scoring.right_keys('{"a": 1, "b": 0}', wanted) == {"a": True, "b": False}
    assert scoring.right_keys("[1]", "[1]") is None


def test_repetition_is_the_share_of_pieces_of_four_words_that_came_before() -> None:
    assert scoring.repetition("one two three four five") == 0.0
    assert scoring.repetition("a b c d " * 5) == pytest.approx(13 / 17)
    assert scoring.repetition("a a a") == 0.0
    assert scoring.repetition("今天很好" * 4) == pytest.approx(9 / 13)


def test_corpus_scores_are_those_of_sacrebleu() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    answers = ["the cat sat on a mat", "hello there ,", "", "all of the same words here"]
    references = ["the cat sat on the mat", "hello, world", "nothing", "all of the same words here"]
    found = side(answers, references)
    assert found.scores["bleu"].value == pytest.approx(BLEU(force=True).corpus_score(answers, [references]).score)
    assert found.scores["chrf"].value == pytest.approx(CHRF().corpus_score(answers, [references]).score)
    single = BLEU(effective_order=True, force=True)
    assert [row["bleu"] for row in found.rows] == pytest.approx(
        [single.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)]
    )
    assert found.rows[3]["chrf"] == pytest.approx(100.0)
    assert len(overlap.scorers()) == 2


@pytest.mark.parametrize(
    ("references", "answers", "name"),
    [
        (["#### 3", "#### 4"], ["5", "5"], "number_match"),
        (['{"a": 1}', "text"], ["", ""], "json_keys"),
        (["Oslo", "Bern"], ["Oslo", "x"], "exact_match"),
        (["Oslo", "Bern", "#### 3"], ["Oslo", "x", "y"], "exact_match"),
        (["Oslo", "Bern"], ["x", "y"], "chrf"),
    ],
)
def test_rows_are_ranked_by_what_the_references_are(references: list[str], answers: list[str], name: str) -> None:
    assert metrics.headline(side(answers, references).rows) == name
    assert metrics.headline([{"loss": 1.0}]) == "loss"


def test_the_table_shows_change_with_sign_and_a_dash_for_what_is_missing() -> None:
    change = metrics.difference(metrics.Score(0.25), metrics.Score(0.9))
    assert metrics.show("exact_match", change, signed=True) == "+65.0 pp"
    assert metrics.show("loss", metrics.difference(metrics.Score(2.0), metrics.Score(0.5)), signed=True) == "-1.500"
    missing = metrics.difference(metrics.Score(None, "why"), metrics.Score(1.0))
    assert (missing.value, missing.reason) == (None, "why")
