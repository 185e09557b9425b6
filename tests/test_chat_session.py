"""What a chat promises: what is remembered and what is left out is said, nothing typed is lost, Ctrl-C stops an answer only."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import infer, process
from scripts.utils import chat_input, chat_session, conversation, files, speaking, streaming, trained
from scripts.utils.conversation import Exchange
from scripts.utils.errors import MachineError, UserError
from scripts.utils.schema import InferSection
from tests.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, LEFT, TAB, UP, Terminal, pasted
from tests.tiny_models import CHATS, RUN, enter_run

REPO = Path(__file__).resolve().parents[1]
QUESTION, ANSWER = CHATS[2]  # a question of two lines
THANKS, WELCOME = CHATS[4]
HELLO = CHATS[3][0]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_run(tmp_path, monkeypatch)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """The conversations that are shown to the model, in their order; those that did not fit are among them."""
    shown: list[list[dict[str, Any]]] = []
    real = speaking.render_prompt
    monkeypatch.setattr(
        speaking, "render_prompt", lambda t, k, messages: shown.append(messages) or real(t, k, messages)
    )
    return shown


def converse(monkeypatch: pytest.MonkeyPatch, lines: list[Any], **settings: Any) -> None:
    """Type ``lines`` into a chat; an exception among them is raised at the prompt."""

    def type_line(_: str) -> str:
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    left = list(lines)
    monkeypatch.setattr("builtins.input", type_line)
    chat_session.chat(trained.load_trained(RUN), InferSection(**{"max_new_tokens": 24, **settings}), None)
    assert not left, f"the chat ended before {left}"


# --- commands


def test_chat_answers_commands_and_ends_at_eof(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = ["/undo", "/retry", "/compare", "/save", "/save a.jsonl"]
    converse(monkeypatch, ["", "/help", "/frobnicate now", "/system", "/system Be kind.", "/reset", *empty])
    captured = capsys.readouterr()
    for name in ("/system", "/reset", "/undo", "/retry", "/save", "/compare", "/help", "/exit"):
        assert name in captured.out
    assert "unknown command /frobnicate" in captured.out
    assert "(no system message)" in captured.out and "(system message: Be kind.)" in captured.out
    assert "conversation forgotten" in captured.out
    for said in (
        "nothing to take back",
        "nothing to answer again",
        "nothing to compare",
        "where to?",
        "nothing to save",
    ):
        assert said in captured.out
    assert not Path("a.jsonl").exists()


def test_chat_remembers_until_reset(
    run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, [THANKS, HELLO, "/reset", "//etc", "/exit"])
    assert [[m["role"] for m in messages] for messages in seen] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert seen[1][1]["content"] == WELCOME
    assert seen[2][0]["content"] == "/etc"
    assert f"model> {WELCOME}\n" in capsys.readouterr().out


def test_undo_takes_back_a_message_with_its_answer(run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    converse(monkeypatch, [THANKS, HELLO, "/undo", QUESTION])
    assert [message["content"] for message in seen[-1]] == [THANKS, WELCOME, QUESTION]


def test_retry_answers_the_same_message_again_with_other_draws(
    run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, [THANKS, "/retry", "/retry", HELLO], temperature=5.0)
    assert seen[0] == seen[1] == seen[2]
    answers = [line.removeprefix("model> ") for line in capsys.readouterr().out.splitlines() if "model> " in line]
    assert len(set(answers[:3])) > 1
    assert len(seen[3]) == 3, "the second and third answers take the first one's place"


def test_retry_at_temperature_zero_says_that_nothing_will_change(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, [THANKS, "/retry"])
    captured = capsys.readouterr()
    assert "the same each time" in captured.err and captured.out.count(WELCOME) == 2


def test_compare_answers_with_base_and_tuned_and_keeps_neither(
    run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as its own command answers: base alone and tuned alone."""
    expected = {}
    for which in ("base", "tuned"):
        assert infer.main(["--config", "c.yaml", "--which", which, "--prompt", QUESTION]) == 0
        expected[which] = capsys.readouterr().out.strip()
    seen.clear()
    converse(monkeypatch, [f'"""{QUESTION}"""', "/compare", f"/compare {THANKS}", HELLO])
    out = capsys.readouterr().out
    assert f"base> {expected['base']}\ntuned> {expected['tuned']}\n" in out
    assert expected["tuned"] == ANSWER != expected["base"]
    assert seen[1] == seen[2] == seen[0]
    assert [m["content"] for m in seen[3]] == [m["content"] for m in seen[4]] == [QUESTION, ANSWER, THANKS]
    assert [m["content"] for m in seen[5]] == [QUESTION, ANSWER, HELLO]


def test_compare_needs_an_adapter(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([THANKS, "/compare", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat_session.chat(trained.load_trained(RUN, which="base"), InferSection(max_new_tokens=8), None)
    assert "no adapter to switch off" in capsys.readouterr().out


# --- the context limit


def test_what_no_longer_fits_is_left_out_whole_and_said_every_time(
    run: Path, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model sees 256 tokens, of which a question of 80 words takes about 90."""
    session = chat_session.Session(trained.load_trained(RUN), InferSection(max_new_tokens=24), None, None)
    session.exchanges = [Exchange(f"{name} " + "word " * 80, "yes") for name in ("first", "second", "third")]
    for kept, said in ((["secon", "third"], "the first 1 exchange "), (["third"], "the first 2 exchanges ")):
        capsys.readouterr()
        session.ask(THANKS + " so much" * (0 if len(kept) == 2 else 30))
        error = capsys.readouterr().err
        assert [m["content"][:5] for m in seen[-1]][: 2 * len(kept) : 2] == kept
        assert said in error and "256 tokens" in error and "“first word" in error
        del session.exchanges[3:]
    capsys.readouterr()
    session.ask(THANKS + " so much" * 80)
    assert "all that was said before" in capsys.readouterr().err and len(seen[-1]) == 1
    session.reset()
    session.ask(THANKS)
    assert "cannot be shown" not in capsys.readouterr().err


@pytest.mark.parametrize("new", [1, 24, 200, 10_000])
def test_the_window_always_leaves_room_for_an_answer(run: Path, new: int) -> None:
    model = trained.load_trained(RUN)
    for count in range(0, 40, 3):
        exchanges = [Exchange(f"question {n}", f"answer {n}") for n in range(count)]
        found = conversation.window(model, "Be kind.", exchanges, "and now?", new)
        assert len(found.ids) + min(new, 64) <= 256
        fuller = conversation.messages("Be kind.", exchanges[max(found.left_out - 1, 0) :], "and now?")
        if found.left_out:
            assert len(speaking.ids_of(model, fuller)) + min(new, 64) > 256, "no more is left out than has to be"


def test_chat_survives_a_message_beyond_the_context(
    run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, ["word " * 300, THANKS])
    captured = capsys.readouterr()
    assert "limit is 256" in captured.err and "left out of the conversation" in captured.err
    assert WELCOME in captured.out and len(seen[-1]) == 1


def test_an_answer_cut_by_the_context_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, ["word " * 200], max_new_tokens=100, temperature=50.0)
    assert "the model's 256 tokens are full" in capsys.readouterr().err


# --- Ctrl-C


def test_ctrl_c_at_the_prompt_hints_first_and_leaves_the_second_time(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, [KeyboardInterrupt(), "/help", KeyboardInterrupt(), KeyboardInterrupt()])
    assert capsys.readouterr().err.count("once more leaves") == 2


def interrupt_at(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """A Ctrl-C after this piece of the first answer (0: before the first)."""
    whole, calls = streaming.stream, [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > 1:
            yield from whole(*arguments, **options)
            return
        if piece == 0:
            os.kill(os.getpid(), signal.SIGINT)
        for number, text in enumerate(whole(*arguments, **options), 1):
            yield text
            if number == piece:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(streaming, "stream", interrupted)


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal sent while the model writes; the chat goes on."""
    interrupt_at(monkeypatch, 2)
    converse(monkeypatch, [f'"""{QUESTION}"""', THANKS])
    assert "stopped" in capsys.readouterr().err
    partial = seen[1][1]["content"]
    assert ANSWER.startswith(partial) and len(partial) > 0


def test_ctrl_c_before_the_first_word_never_ends_the_program(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 0)
    converse(monkeypatch, [HELLO, THANKS])
    captured = capsys.readouterr()
    assert captured.out.count("model> ") == 2 and "stopped" in captured.err


def test_ctrl_c_in_a_comparison_stops_all_of_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 1)
    converse(monkeypatch, [f"/compare {HELLO}", THANKS])
    out = capsys.readouterr().out
    assert "base> " in out and "tuned> " not in out and WELCOME in out


# --- saved chats


def test_a_saved_chat_is_a_training_row_that_process_reads(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/system Answer as the parcel desk.", f'"""{QUESTION}"""', THANKS, "/save data/raw/chats.jsonl"]
    converse(monkeypatch, [*lines, "/reset", HELLO, "/save data/raw/chats.jsonl"])
    out = capsys.readouterr().out
    assert "row 1 of data/raw/chats.jsonl: 2 exchanges" in out and "row 2 of data/raw/chats.jsonl: 1 exchange" in out
    assert (
        process.main(
            ["--config", "c.yaml", "--raw", "data/raw/chats.jsonl", "--set", "data.val_fraction=0 data.test_fraction=0"]
        )
        == 0
    )
    rows = [row for path in Path("data/processed").glob("*/train.jsonl") for row in files.read_jsonl(path)]
    said = sorted([[(m["role"], m["content"]) for m in row["messages"]] for row in rows], key=len)
    system = ("system", "Answer as the parcel desk.")
    assert [len(turns) for turns in said] == [3, 5] and said[1][:2] == [system, ("user", QUESTION)]
    assert said[0][:2] == [system, ("user", HELLO)]


def test_an_answer_that_was_stopped_or_cut_carries_no_loss(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, [f'"""{QUESTION}"""', "/save c.jsonl"], max_new_tokens=4)
    (row,) = files.read_jsonl(Path("c.jsonl"))
    assert row["messages"][1]["train"] is False
    assert "not whole" in capsys.readouterr().out


def test_two_saves_of_one_conversation_share_its_id_and_a_new_one_has_another(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(monkeypatch, [THANKS, "/save c.jsonl", HELLO, "/save c.jsonl", "/reset", THANKS, "/save c.jsonl"])
    ids = [row["conversation_id"] for row in files.read_jsonl(Path("c.jsonl"))]
    assert ids[0] == ids[1] != ids[2]


ROW = conversation.row(None, [Exchange("a", "b")], "x")


def test_a_row_is_added_to_a_file_without_a_last_line_break(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}')
    assert conversation.save(path, ROW) == 2
    assert [len(row) for row in files.read_jsonl(path)] == [2, 2]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    conversation.save(tmp_path / "link.jsonl", ROW)
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("content", [b"not json\n", b"\xff\xfe\n", b'{"a": 1}\n{"torn'])
def test_a_file_that_is_no_json_lines_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.jsonl"):
        conversation.save(path, ROW)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize("name", ["c.csv", "folder.jsonl", "c"])
def test_only_json_lines_are_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError):
        conversation.save(tmp_path / name, ROW)


def test_a_save_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    conversation.save(path, ROW)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        conversation.save(path, ROW)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_chat_goes_on_after_a_save_that_failed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, [THANKS, "/save c.csv", "/save no/where/c.jsonl", HELLO])
    captured = capsys.readouterr()
    assert "JSON lines" in captured.err and Path("no/where/c.jsonl").exists()


# --- messages of several lines


@pytest.mark.parametrize(
    ("lines", "message", "fenced"),
    [
        (["  hello "], "hello", False),
        (['"""one', "  two", 'three"""'], "one\n  two\nthree", True),
        (['"""', "/not a command", '"""'], "/not a command", True),
        (['"""at once"""'], "at once", True),
        (['"""', "", "a", "", '"""  '], "a", True),
        (['say """ within'], 'say """ within', False),
    ],
)
def test_lines_between_three_quotes_are_one_message(lines: list[str], message: str, fenced: bool) -> None:
    left = list(lines)
    assert chat_input.message(lambda prompt: left.pop(0), "you> ") == (message, fenced)
    assert not left


# --- on a real terminal


@pytest.fixture
def terminal(run: Path) -> Callable[..., Terminal]:
    return lambda *flags, **extra: Terminal(
        [sys.executable, REPO / "scripts/infer.py", "--config", "c.yaml", *flags], run, **extra
    )


@pytest.mark.slow
def test_chat_on_a_real_terminal(terminal: Callable[..., Terminal], run: Path) -> None:
    """Typed as a person types: corrected, taken from the history, on several lines, pasted, completed, left."""
    with terminal("--run", RUN) as chat:
        chat.wait_for_prompt()
        assert WELCOME in chat.ask("thank" + LEFT * 5 + "\x1b[F" + "s")  # End, then the missing letter
        chat.ask("/reset")
        chat.type(UP + UP)
        assert WELCOME in chat.ask("")
        chat.ask("/reset")
        first, second = QUESTION.split("\n")
        chat.type(first + ALT_ENTER + second)
        assert ANSWER in chat.ask("")
        chat.ask("/reset")
        chat.type(pasted(QUESTION))
        assert ANSWER in chat.ask("")
        chat.type("/und" + TAB)
        chat.wait_for("/undo")
        assert "taken back" in chat.ask("")
        chat.type('"""' + first + ENTER)
        chat.wait_for_prompt()
        assert ANSWER in chat.ask(second + '"""')
        assert "tuned>" in chat.ask("/compare")
        assert "row 1 of" in chat.ask("/save saved.jsonl")
        chat.type(CTRL_C)
        chat.wait_for("once more leaves")
        chat.wait_for_prompt()
        chat.type("/exit" + ENTER)
        assert chat.ended() == 0
    (row,) = files.read_jsonl(run / "saved.jsonl")
    assert row["messages"] == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


@pytest.mark.slow
def test_ctrl_c_on_a_real_terminal_stops_a_long_answer_of_a_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("infer: {max_new_tokens: 1500}\n")
    words = [sys.executable, REPO / "scripts/infer.py", "--config", "c.yaml"]
    with Terminal([*words, "--model", "embedded/smollm2-135m-instruct"], tmp_path) as chat:
        chat.wait_for_prompt()
        chat.type("Write a very long story about a lighthouse." + ENTER)
        chat.wait_for("model> ")
        chat.wait_for(" ")
        chat.type(CTRL_C)
        chat.wait_for("stopped", 30)
        chat.wait_for_prompt()
        chat.type("Say hello." + ENTER)
        chat.wait_for("model> ")
        chat.type(CTRL_C)
        chat.wait_for_prompt()
        chat.type(CTRL_D)
        assert chat.ended() == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dumb terminal", "piped"])
def test_the_plain_fallback_reads_a_message_a_line(terminal: Callable[..., Terminal], run: Path, how: str) -> None:
    if how == "piped":
        import subprocess

        from tests.commands import environment

        done = subprocess.run(
            [sys.executable, REPO / "scripts/infer.py", "--config", "c.yaml", "--run", RUN, "--chat"],
            cwd=run, env=environment(), input=f"{THANKS}\n/undo\n/exit\n", capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and f"model> {WELCOME}\n" in done.stdout and "taken back" in done.stdout
        return
    with terminal("--run", RUN, TERM="dumb") as chat:
        chat.wait_for_prompt()
        assert WELCOME in chat.ask(THANKS)
        chat.type(CTRL_D)
        assert chat.ended() == 0


def test_without_the_library_a_plain_prompt_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: f"{prompt}typed")
    assert chat_input.reader(["/help"])("you> ") == "you> typed"


def test_every_command_in_the_help_is_known(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {word for line in chat_session.HELP.splitlines() for word in line.split()[:1] if word[0] == "/" != word[1]}
    converse(monkeypatch, [*sorted(names - {"/exit"}), "/exit"])
    assert "unknown command" not in capsys.readouterr().out
    assert json.dumps(sorted(names)).count("/") == 8
