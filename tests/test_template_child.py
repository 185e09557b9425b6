"""Templates from outside: no payload writes a file, hangs or eats the memory; good ones give the very same text."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.utils import template_child, template_guard
from scripts.utils.chat import choose_template, render_conversation
from scripts.utils.errors import MachineError, RefusedError, UserError
from tests.commands import ROOT
from tests.test_chat import LLAMA_STYLE, REASONING_STYLE, STRICT_STYLE, chat, template
from tests.tiny_models import smollm2_tokenizer

SECONDS = 2.0
GOOD = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

# PATH is the canary that none of them may write; OPEN looks for a way to it among what a name leads to
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__()[100]('PATH', 'w') }}",
    "classes of a list": "{{ [].__class__.__base__.__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "attr filter, name in parts": "{{ '' | attr('__cl' ~ 'ass__') }}",
    "attr filter, name in hex": r"{{ '' | attr('\x5f\x5fclass\x5f\x5f') }}",
    "subscript": "{{ ''['__class__']['__mro__'] }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch PATH').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch PATH') }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system('touch PATH') }}",
    "namespace filled with dunders": "{% set n = namespace(__class__=1) %}{{ n.__class__.__mro__ }}{{ n.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch PATH') }}",
    "lipsum by attr": "{{ lipsum | attr('__globals__') | attr('get')('os') | attr('system')('touch PATH') }}",
    "dict": "{{ dict.__base__.__subclasses__() }}",
    "range": "{{ range.__class__.__base__ }}",
    "undefined": "{{ nothing.__init__.__globals__.__builtins__.open('PATH', 'w') }}",
    "undefined by attr": "{{ nothing | attr('__init__') | attr('__globals__') }}",
    "self": "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('touch PATH') }}",
    "self's init": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch PATH') }}",
    "raise_exception's globals": "{{ raise_exception.__globals__['json'].__builtins__.open('PATH', 'w') }}",
    "strftime_now's closure": "{{ strftime_now.__closure__ }}{{ strftime_now.__code__ }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m._environment.from_string('x') }}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{{ caller._func.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}{{ (messages | select).gi_code }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format of a function": "{{ '{0.__globals__[os].environ}'.format(lipsum) }}",
    "format_map": "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': cycler}) }}",
    "format, kept for later": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "format through map": "{{ ['{0.__class__.__mro__}'] | map('format', '') | list }}{{ '%s' | format(lipsum.__globals__) }}",
    "format through attr": "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "str.format of the type": "{{ ''.__class__.format('{0.__class__}', '') }}",
    "map with attribute": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "sort and group by attribute": "{{ [lipsum, cycler] | groupby('__globals__.os') | list }}{{ [''] | sort(attribute='__class__') }}",
    "sum of attributes": "{{ [cycler] | sum(attribute='__init__.__globals__', start='') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch PATH') }}",
    "from import": "{% from '/etc/passwd' import x %}{{ x }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "__import__": "{{ __import__('os').system('touch PATH') }}{{ __builtins__ }}",
    "do": "{% do messages.append(lipsum.__globals__) %}",
    "changing what it was given": "{{ messages.append(1) }}{{ messages[0].update({'role': 'x'}) }}{{ messages.clear() }}",
    "xmlattr": "{{ {'a\\x0c onload=x': 1, 'x': lipsum.__globals__} | xmlattr }}",
    "tojson of a function": "{{ lipsum | tojson }}{{ cycler | tojson(default=lipsum) }}",
    "pprint": "{{ lipsum.__globals__ | pprint }}",
    "filter by name": "{{ messages | map('attr', '__class__') | list }}{{ messages | map('__import__') | list }}",
    "code of an error": "{{ messages.__getitem__.__self__.__class__ }}{{ messages.nothing.__class__ }}",
    "bytes and codecs": "{{ 'b3BlbigpCg=='.encode('base64') }}{{ ''.encode().__class__.fromhex('00').decode('zlib') }}",
}
BOMBS = {
    "long range": "{% for n in range(10**9) %}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "loops in a filter": "{% for a in range(99999) %}{% set x = range(99999) | map('string') | join | length %}{% endfor %}",
    "recursive macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "long text": "{{ 'a' * 10**10 }}",
    "text that just fits the memory": "{{ 'a' * 7 * 10**8 }}",
    "long list": "{{ [0] * 10**10 }}",
    "list of lists": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "join": "{{ range(99999) | map('string') | join('a' * 10**6) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}",
    "format width": "{{ '%1000000000s' | format('x') }}{{ '{:>9999999999}'.format('x') }}",
    "center": "{{ 'x' | center(10**10) }}{{ 'x'.ljust(10**10) }}",
    "indent": "{{ ('a\n' * 10**6) | indent(10**5) }}",
    "long lipsum": "{{ lipsum(n=10**8) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}{{ [1] | slice(10**9) | list }}",
    "tojson": "{{ messages | tojson(indent=10**10) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power into digits": "{{ 10 ** 10 ** 7 }}",
    "constant folded while it compiles": "{{ ('a' * 10**9) ~ ('b' * 10**9) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 80 + "]" * 80 + " | tojson }}",
    "deep blocks": "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "long sum": "{{ " + "1+" * 20000 + "1 }}",
    "many nots": "{{ " + "not " * 20000 + "1 }}",
    "slow urlize": "{{ ('a.' * 10**6) | urlize }}",
    "slow striptags": "{{ ('<!--' * 10**6) | striptags }}",
    "slow wordwrap": "{{ ('a ' * 10**6) | wordwrap(1) | length }}",
    "long error": "{{ raise_exception('x' * 10**8) }}",
}


def call(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"messages": messages, "tools": None, "generation_prompt": False, "special": {"eos_token": "</s>"}, **more}


@pytest.fixture(autouse=True, scope="module")
def _no_child_stays() -> Any:
    yield
    template_guard._end_all()


def attack(text: str) -> str:
    """What came of it: text, or the refusal. In time, without filling this process, which then still renders."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        got, _ = template_guard.render_outside(text, "evil.jinja", call(chat("a", "b")), seconds=SECONDS)
    except (ValueError, RefusedError) as refused:
        got = str(refused)
    assert time.monotonic() - start < SECONDS + 15, "the start of a child is part of it, on a busy machine"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * (1024 if sys.platform == "linux" else 1024**2)
    assert template_guard.render_outside(GOOD, "good", call(chat("a", "b")))[0] == "ab"
    return got


@pytest.mark.parametrize("name", ESCAPES)
def test_no_payload_gets_out_of_the_sandbox(name: str, tmp_path: Path) -> None:
    got = attack(ESCAPES[name].replace("PATH", str(tmp_path / "canary")))
    assert list(tmp_path.iterdir()) == []
    for leaked in ("root:", "__builtins__': ", "<class '", "<module", "<function", "environ("):
        assert leaked not in got


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_no_payload_hangs_or_fills_the_memory(name: str) -> None:
    assert len(attack(BOMBS[name])) <= template_guard.OUTPUT


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (BOMBS["nested loops"], "longer than 1 s"),
        (BOMBS["doubling"], "1,024 MiB of memory"),
        ("{{ 'x' * 20 * 2**20 }}", "wrote more than 16 MiB"),
    ],
    ids=["time", "memory", "output"],
)
def test_a_limit_is_named_with_the_template_and_the_way_out(text: str, limit: str) -> None:
    with pytest.raises(RefusedError) as refused:
        seconds = 1.0 if "1 s" in limit else 30.0
        template_guard.render_outside(text, "evil.jinja", call(chat("a", "b")), seconds=seconds)
    assert "the chat template (evil.jinja) was stopped" in refused.value.message and limit in refused.value.message
    assert "render.template" in refused.value.hint


def test_a_child_that_was_killed_is_refused_once_and_started_anew() -> None:
    template_guard.render_outside(GOOD, "good", call(chat("a", "b")))
    template_guard._children[(os.getpid(), GOOD)].process.kill()
    with pytest.raises(RefusedError, match="SIGKILL"):
        template_guard.render_outside(GOOD, "good", call(chat("a", "b")))
    assert template_guard.render_outside(GOOD, "good", call(chat("a", "b")))[0] == "ab"


def test_a_child_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match=r"exit code 1"):
        template_guard.render_outside("{{ 'never started' }}", "x", call([]))


def test_only_templates_from_outside_go_to_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RefusedError("went to the child")

    monkeypatch.setattr(template_guard, "render_outside", refuse)
    tokenizer = smollm2_tokenizer()
    for setting in ("auto", "chatml", "plain"):
        render_conversation(choose_template(tokenizer, setting), tokenizer, chat("a", "b"))
    with pytest.raises(RefusedError, match="went to the child"):
        render_conversation(template(LLAMA_STYLE), tokenizer, chat("a", "b"))


def test_a_loop_in_a_users_template_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_guard.render_outside, "__defaults__", (1.0,))
    with pytest.raises(RefusedError, match=r"\(test\) was stopped: it took longer than 1 s"):
        render_conversation(template(BOMBS["nested loops"]), smollm2_tokenizer(), chat("a", "b"))


TOOLS = [{"type": "function", "function": {"name": "wetter", "parameters": {"größe": [1, 2.5, None, True]}}}]
TOOL_STYLE = (
    "{{ strftime_now('%Y') }}{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% generation %}{{ m | tojson }}{{ (m.content ~ '&amp;<b>') | striptags | wordwrap(9) | pprint }}{% endgeneration %}"
    "{{ m.content.split() | unique | sort | join('\\u00e9\\n') }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "smollm2": lambda: choose_template(smollm2_tokenizer(), "auto").text,
    "chatml": lambda: choose_template(smollm2_tokenizer(), "chatml").text,
    "plain": lambda: choose_template(smollm2_tokenizer(), "plain").text,
    "llama": lambda: LLAMA_STYLE,
    "reasoning": lambda: REASONING_STYLE,
    "strict": lambda: STRICT_STYLE,
    "tools": lambda: TOOL_STYLE,
    "broken": lambda: "{% for m in messages %}",
    "missing key": lambda: "{{ messages[9]['content'] }}",
    "wrong type": lambda: "{{ messages[0].content + 1 }}",
}
CONVERSATIONS = {
    "plain": chat("Hello?", "Yes."),
    "system": chat("Hello?", "Yes.", system="Be kind."),
    "many turns": chat(*(f" turn {n}\n" for n in range(20))),
    "unicode": chat("Grüße 你好 🎉 \u2028", "e\u0301 \ud800 \x00 <b>&amp;</b> {{ 1 }}"),
    "empty": chat("", ""),
    "tool call": [
        *chat("Regen?", ""),
        {
            "role": "tool",
            "content": "7",
            "tool_calls": [{"function": {"name": "wetter", "arguments": {"b": 1, "a": 2}}}],
        },
    ],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_child_gives_the_same_text_spans_and_errors_as_this_process(name: str) -> None:
    text = TEMPLATES[name]()
    for messages in CONVERSATIONS.values():
        for tools in (None, TOOLS):
            for prompt in (False, True):
                question = call(messages, tools=tools, generation_prompt=prompt)
                try:
                    expected: Any = template_child.render(text, question)
                except Exception as error:
                    expected = str(error)
                try:
                    got: Any = template_guard.render_outside(text, "test", question)
                except ValueError as error:
                    got = str(error)
                assert got == expected


def test_a_conversation_longer_than_a_pipe_holds_passes_through() -> None:
    messages = chat("a" * 3_000_000, "é" * 500_000)
    assert template_guard.render_outside(GOOD, "good", call(messages))[0] == "".join(m["content"] for m in messages)


def test_what_is_not_json_is_the_users_error() -> None:
    with pytest.raises(UserError, match="refuses this conversation"):
        render_conversation(
            template(LLAMA_STYLE), smollm2_tokenizer(), [*chat("a", "b"), {"role": "user", "content": {1}}]
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_finds_no_secret_and_holds_no_file_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "ANYTHING_ELSE"):
        monkeypatch.setenv(name, "hunter2")
    text = GOOD + "{# no secrets #}"
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        template_guard.render_outside(text, "test", call(chat("a", "b")))
    child = template_guard._children[(os.getpid(), text)].process.pid
    assert b"hunter2" not in Path(f"/proc/{child}/environ").read_bytes()
    open_files = [os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()]
    assert len(open_files) == 3 and not any("open" in name for name in open_files)
    assert os.getsid(child) == child and os.readlink(f"/proc/{child}/cwd") == "/"


def test_were_the_sandbox_to_leak_the_child_could_still_open_and_start_nothing(tmp_path: Path) -> None:
    code = f"""
import os, socket, sys
from scripts.utils import template_child
sys.stdin.close(); os.open(os.devnull, os.O_RDONLY)
template_child._import_renderer()
assert not {{"torch", "numpy"}} & set(sys.modules)
template_child._set_limits()
for what in (lambda: open({str(tmp_path / "canary")!r}, "w"), lambda: open("/etc/passwd"), socket.socket, os.pipe):
    try:
        what()
    except OSError:
        continue
    print("opened", what)
try:
    os.system("touch {tmp_path / "canary"}")
except OSError:
    pass
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "end\n", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [GOOD, BOMBS["nested loops"]], ids=["waiting", "looping"])
def test_the_child_ends_when_its_parent_is_killed(text: str) -> None:
    code = f"""
import os, signal, threading, time
from scripts.utils import template_guard
def end():
    while not template_guard._children:
        time.sleep(0.05)
    time.sleep(0.5)
    print(next(iter(template_guard._children.values())).process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=end).start()
template_guard.render_outside({text!r}, "x", {call(chat("a", "b"))!r}, seconds=2)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    gone = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(done.stdout))
        while child.status() != psutil.STATUS_ZOMBIE:  # where no one waits for orphans
            assert time.monotonic() < gone, "the child outlives its parent"
            time.sleep(0.1)
