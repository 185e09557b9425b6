"""What answering a file promises: every row once, in order, the same text whatever happened on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import infer
from scripts.utils import answering, files, generation, unfinished
from scripts.utils.errors import RefusedError
from tests.commands import ROOT, environment
from tests.tiny_models import CHATS, RUN, enter_run

pytestmark = pytest.mark.slow  # each test runs a whole step of its own

SAMPLED = ("--temperature", "1.5", "--seed", "7")
OUTPUT = f"outputs/{RUN}/predictions.jsonl"
UNFINISHED = Path(f"outputs/{RUN}/.predictions.jsonl.unfinished")
# lengths differ, so that batches are of rows from all over the file; some prompts stand twice
PROMPTS = [f"Parcel {n % 9} to {'Oslo ' * (n % 5)}is late" for n in range(24)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = enter_run(tmp_path, monkeypatch)
    write_prompts(PROMPTS)
    return folder


def write_prompts(prompts: list[str]) -> None:
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def ask(*flags: str, batch: int = 4) -> int:
    return infer.main(["--config", "c.yaml", "--input", "p.jsonl", "--set", f"infer.batch_size={batch}", *flags])


def rows(path: str = OUTPUT) -> list[dict[str, Any]]:
    return list(files.read_jsonl(Path(path)))


def texts(path: str = OUTPUT) -> list[str]:
    return [row["answer"] for row in rows(path)]


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours catches it."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Counts prompts that are answered; ``stop_at`` ends the process before the batch with that number."""
    state: dict[str, Any] = {"answered": 0, "batches": 0, "stop_at": None}
    real = generation.generate

    def generate(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        if state["batches"] == state["stop_at"]:
            raise Killed
        state["batches"] += 1
        state["answered"] += len(prompts)
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generation, "generate", generate)
    yield state


# --- samples and seeds


def test_samples_of_a_prompt_stand_together_and_differ(run: Path) -> None:
    assert ask("--num-samples", "3", *SAMPLED) == 0
    found = rows()
    assert [(row["id"], row["sample"]) for row in found] == [(n + 1, s) for n in range(24) for s in range(3)]
    assert len({row["answer"] for row in found[:9]}) > 3


def test_the_same_seed_gives_the_same_text_and_another_one_another(run: Path) -> None:
    assert ask(*SAMPLED, "--output", "a.jsonl") == ask(*SAMPLED, "--output", "b.jsonl") == 0
    assert ask("--temperature", "1.5", "--seed", "8", "--output", "c.jsonl") == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    assert texts("a.jsonl") != texts("c.jsonl")


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_what_is_drawn_does_not_depend_on_the_batch_size(run: Path, batch: int) -> None:
    assert ask(*SAMPLED, "--output", "a.jsonl") == ask(*SAMPLED, "--output", "b.jsonl", batch=batch) == 0
    assert texts("a.jsonl") == texts("b.jsonl")


def test_what_a_row_draws_does_not_depend_on_where_it_stands(run: Path) -> None:
    assert ask(*SAMPLED) == 0
    before = sorted((row["messages"][0]["content"], row["answer"]) for row in rows())
    write_prompts(PROMPTS[::-1])
    assert ask(*SAMPLED) == 0
    assert sorted((row["messages"][0]["content"], row["answer"]) for row in rows()) == before
    same = [answer for text, answer in before if text == PROMPTS[0]]
    write_prompts([PROMPTS[0]] * 6)
    assert ask(*SAMPLED) == 0
    assert texts()[0] in same and len(set(texts())) > 1, "a prompt that stands twice is drawn for twice"


# --- going on after the end of the process


@pytest.mark.parametrize("stop_at", [0, 1, 4, 5])
def test_a_killed_start_goes_on_with_the_rows_that_are_left(
    run: Path, counted: dict[str, Any], capsys: pytest.CaptureFixture[str], stop_at: int
) -> None:
    assert ask(*SAMPLED, "--output", "whole.jsonl") == 0
    Path(OUTPUT).write_text('{"an earlier": "result"}\n')
    counted.update(answered=0, batches=0, stop_at=stop_at)
    with pytest.raises(Killed):
        ask(*SAMPLED)
    assert rows() == [{"an earlier": "result"}], "the output is whole or the old one"
    capsys.readouterr()
    counted["stop_at"] = None
    assert ask(*SAMPLED) == 0
    assert Path(OUTPUT).read_bytes() == Path("whole.jsonl").read_bytes()
    assert counted["answered"] == len(PROMPTS), "no row was answered twice"
    assert not UNFINISHED.exists()
    assert (f"{4 * stop_at} of 24 answers are there" in capsys.readouterr().err) == (stop_at > 0)


def test_a_smaller_batch_may_finish_what_a_larger_one_began(run: Path, counted: dict[str, Any]) -> None:
    assert ask(*SAMPLED, "--output", "whole.jsonl") == 0
    counted.update(answered=0, batches=0, stop_at=3)
    with pytest.raises(Killed):
        ask(*SAMPLED)
    counted["stop_at"] = None
    assert ask(*SAMPLED, batch=3) == 0
    assert texts() == texts("whole.jsonl") and counted["answered"] == len(PROMPTS)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--temperature", "1.4", "--seed", "7"), "temperature 1.5 -> 1.4"),
        (("--temperature", "1.5", "--seed", "8"), "seed 7 -> 8"),
        ((*SAMPLED, "--max-new-tokens", "23"), "max_new_tokens 24 -> 23"),
        ((*SAMPLED, "--stop", "x"), "stop [] -> ['x']"),
        ((*SAMPLED, "--which", "base"), "weights"),
    ],
)
def test_a_changed_setting_is_noticed_and_nothing_old_is_taken(
    run: Path, counted: dict[str, Any], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], name: str
) -> None:
    assert ask(*flags, "--output", "expected.jsonl") == 0
    counted.update(answered=0, batches=0, stop_at=2)
    with pytest.raises(Killed):
        ask(*SAMPLED)
    counted.update(answered=0, stop_at=None)
    capsys.readouterr()
    assert ask(*flags) == 0
    error = capsys.readouterr().err
    assert "had other settings" in error and name in error
    assert counted["answered"] == len(PROMPTS) and texts() == texts("expected.jsonl")


def test_a_changed_input_is_noticed_and_its_unchanged_rows_are_taken(
    run: Path, counted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    counted["stop_at"] = 3
    with pytest.raises(Killed):
        ask(*SAMPLED)
    assert counted["answered"] == 12
    done = set(unfinished.Unfinished(UNFINISHED).answers)
    changed = [text + " today" if n % 2 else text for n, text in enumerate(PROMPTS)]
    write_prompts(changed)
    counted.update(answered=0, stop_at=None)
    capsys.readouterr()
    assert ask(*SAMPLED) == 0
    said = capsys.readouterr().err
    assert "belong to other prompts" in said
    assert 0 < 24 - counted["answered"] < len(done)
    write_prompts(changed)
    assert ask(*SAMPLED, "--output", "fresh.jsonl") == 0
    assert texts() == texts("fresh.jsonl")


def test_a_changed_system_message_is_another_prompt(run: Path, counted: dict[str, Any]) -> None:
    counted["stop_at"] = 5
    with pytest.raises(Killed):
        ask()
    counted.update(answered=0, stop_at=None)
    assert ask("--system", "Be kind.") == 0
    assert counted["answered"] == len(PROMPTS)


def test_two_processes_never_write_one_output(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with unfinished.beside(Path(OUTPUT)):
        assert ask() == RefusedError.exit_code
    assert "in use by another process" in capsys.readouterr().err


def test_random_kills_lose_no_row_and_repeat_none(run: Path) -> None:
    """The program itself, killed with SIGKILL at random moments until it comes to its end."""
    write_prompts(PROMPTS * 12)
    words = [sys.executable, str(ROOT / "scripts/infer.py"), "--config", "c.yaml", "--run", RUN, "--input", "p.jsonl"]
    words += ["--set", "infer.batch_size=4", *SAMPLED]
    assert subprocess.run([*words, "--output", "whole.jsonl"], env=environment(), capture_output=True).returncode == 0
    chance, kills = random.Random(0), 0
    for _ in range(12):
        size = UNFINISHED.stat().st_size if UNFINISHED.exists() else 0
        program = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while kills < 4 and program.poll() is None:
            if UNFINISHED.exists() and UNFINISHED.stat().st_size > size:
                time.sleep(chance.random() * 0.4)
                program.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        if program.wait() == 0:
            break
        assert program.returncode == -signal.SIGKILL
        kills += 1
        assert not Path(OUTPUT).exists()
    assert kills >= 3
    assert Path(OUTPUT).read_bytes() == Path("whole.jsonl").read_bytes()
    assert not UNFINISHED.exists()


# --- the unfinished file

LINES = [
    {"settings": {"seed": 1}},
    {"answers": {"a": {"answer": "é\u2028"}, "b": {"answer": "2"}}},
    {"settings": {"seed": 2}},
    {"answers": {"c": {"answer": "3"}}},
]
WHOLE = b"".join(map(files.json_line, LINES))


@given(st.integers(0, len(WHOLE)), st.binary(max_size=8))
def test_wherever_a_write_was_cut_off_whole_batches_are_read_and_new_ones_fit(cut: int, noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "u"
        path.write_bytes(WHOLE[:cut] + noise.replace(b"\n", b""))
        found = unfinished.Unfinished(path)
        whole = [json.loads(line) for line in WHOLE[:cut].splitlines(keepends=True) if line.endswith(b"\n")]
        expected = {key: value for line in whole for key, value in line.get("answers", {}).items()}
        assert found.answers == expected
        found.add({"new": {"answer": "4"}})
        assert unfinished.Unfinished(path).answers == {**expected, "new": {"answer": "4"}}


def test_a_full_disk_ends_with_4_leaves_the_earlier_result_and_goes_on_with_room(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_train import mounted

    assert ask(*SAMPLED, "--output", "whole.jsonl") == 0
    if not mounted(run / "small", "64k"):
        pytest.skip("a small file system cannot be mounted here")
    try:
        output = Path("small/out.jsonl")
        output.write_text('{"an earlier": "result"}\n')
        for room in (0, 4096, 8192):
            filler = Path("small/filler")
            filler.write_bytes(b"0" * (shutil.disk_usage("small").free - room))
            assert ask(*SAMPLED, "--output", str(output)) == 4, room
            error = capsys.readouterr().err
            assert "the disk is full" in error and "small" in error
            assert rows(str(output)) == [{"an earlier": "result"}]
            filler.unlink()
        assert ask(*SAMPLED, "--output", str(output)) == 0
        assert output.read_bytes() == Path("whole.jsonl").read_bytes()
        assert sorted(os.listdir("small")) == ["out.jsonl"]
    finally:
        subprocess.run(["umount", "-l", str(run / "small")])


# --- stops and JSON


def test_stop_texts_end_answers_and_other_rows_go_on(run: Path) -> None:
    write_prompts([question for question, _ in CHATS])
    assert ask("--stop", '", "par', "--stop", "how can", batch=8) == 0
    expected = [answer.partition('", "par')[0].partition("how can")[0] for _, answer in CHATS]
    assert texts() == expected and all(row["finished"] for row in rows())


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "parcel": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "parcel"],
    "additionalProperties": False,
}


def test_every_finished_answer_is_json_of_the_schema(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn at a temperature at which the model writes nothing but noise by itself."""
    import jsonschema

    Path("s.json").write_text(json.dumps(SCHEMA))
    flags = ("--json-schema", "s.json", "--temperature", "20", "--max-new-tokens", "40")
    assert ask(*flags) == 0
    found = rows()
    assert sum(row["finished"] for row in found) == len(found)
    for row in found:
        jsonschema.validate(json.loads(row["answer"]), SCHEMA)
    assert len(set(texts())) > 10
    before = Path(OUTPUT).read_bytes()
    assert ask(*flags, batch=24) == 0
    assert Path(OUTPUT).read_bytes() == before


def test_an_answer_in_the_trained_form_is_left_as_it_is(run: Path) -> None:
    Path("s.json").write_text(
        json.dumps({**SCHEMA, "properties": {"city": {"type": "string"}, "parcel": {"type": "integer"}}})
    )
    write_prompts([question for question, _ in CHATS[:3]])
    assert ask("--json-schema", "s.json") == 0
    assert texts() == [answer for _, answer in CHATS[:3]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{broken", "not valid JSON"),
        ("[]", "a JSON schema is an object, this is list"),
        ("true", "this is bool"),
        ('{"type": "objekt"}', "Invalid type: objekt"),
        ('{"type": "string", "pattern": "(unclosed"}', "unclosed group"),
        ('{"$ref": "#/nowhere"}', "nowhere"),
        ('{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ('{"allOf": ' * 5000, "not valid JSON"),
    ],
)
def test_a_broken_schema_is_said_before_the_model_loads(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    monkeypatch.setattr(infer, "load_trained", lambda *_, **__: pytest.fail("the model was loaded"))
    Path("s.json").write_text(text)
    assert ask("--json-schema", "s.json") == 2
    error = capsys.readouterr().err
    assert said in error and "s.json" in error and "Traceback" not in error


def test_without_its_package_the_way_to_it_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert ask("--json-schema", "s.json") == 4
    assert "EXTRAS=json" in capsys.readouterr().err


def test_what_decides_an_answer_is_all_in_its_key() -> None:
    """A new setting has to be put into one of the two."""
    from scripts.utils.schema import InferSection

    decided = answering.deciding(InferSection(temperature=1.0), {"weights": "x"}, None)
    beside = {"batch_size", "num_samples"}  # neither changes an answer
    assert set(InferSection.model_fields) - set(decided) == beside
