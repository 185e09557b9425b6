"""The cache of an evaluation: whole batches come back, torn lines and others' batches do not."""

import json
from pathlib import Path

import pytest

from scripts.utils.answer_cache import AnswerCache, unit_keys
from scripts.utils.errors import MachineError


def test_a_batch_comes_back_whole_and_in_order(tmp_path: Path) -> None:
    keys = unit_keys("model", "greedy", [[1, 2], [3]])
    with AnswerCache(tmp_path / "eval" / "a.jsonl") as cache:
        assert cache.unit(keys) is None
        cache.add(keys, [{"text": "Größe\n🙂", "n": 0.1 + 0.2}, {"text": "\ud800"}])
        assert cache.unit(keys) == cache.unit(keys)
    with AnswerCache(tmp_path / "eval" / "a.jsonl") as cache:
        found = cache.unit(keys)
    assert found is not None
    assert [entry["text"] for entry in found] == ["Größe\n🙂", "\ud800"]
    assert found[0]["n"] == 0.1 + 0.2


def test_keys_differ_by_model_settings_and_the_rows_beside() -> None:
    one = unit_keys("model", "greedy", [[1, 2], [3]])
    assert (
        len({*one, *unit_keys("other", "greedy", [[1, 2], [3]]), *unit_keys("model", "greedy 2", [[1, 2], [3]])}) == 6
    )
    assert not {*one} & {*unit_keys("model", "greedy", [[1, 2], [4]])}
    assert not {*one} & {*unit_keys("model", "greedy", [[3], [1, 2]])}


@pytest.mark.parametrize("cut", range(1, 90, 7))
def test_a_line_torn_by_a_kill_is_cut_off_and_its_batch_done_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    first, second = unit_keys("m", "g", [[1]]), unit_keys("m", "g", [[2], [3]])
    with AnswerCache(path) as cache:
        cache.add(first, [{"text": "one"}])
        cache.add(second, [{"text": "two"}, {"text": "three"}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with AnswerCache(path) as cache:
        assert cache.unit(first) is not None
        assert cache.unit(second) is None
        cache.add(second, [{"text": "two"}, {"text": "three"}])
    with AnswerCache(path) as cache:
        assert cache.unit(second) is not None
    for line in path.read_text().splitlines():
        json.loads(line)


def test_lines_that_are_none_of_ours_are_passed_over(tmp_path: Path) -> None:
    path, keys = tmp_path / "a.jsonl", unit_keys("m", "g", [[1]])
    with AnswerCache(path) as cache:
        cache.add(keys, [{"text": "one"}])
    path.write_bytes(b'not json\n[1]\n"x"\n{"text": 1}\n\xff\n' + path.read_bytes())
    with AnswerCache(path) as cache:
        assert cache.unit(keys) is not None
    with AnswerCache(path, fresh=True) as cache:
        assert cache.unit(keys) is None
    assert path.read_bytes() == b""


def test_a_full_disk_is_said_and_what_was_there_stays() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    cache = AnswerCache.__new__(AnswerCache)
    cache.path, cache.known, cache._file = full, {}, full.open("ab", buffering=0)
    with pytest.raises(MachineError, match="disk is full"):
        cache.add(["k"], [{"text": "one"}])
    assert cache.known == {}
