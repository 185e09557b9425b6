"""The child process that renders chat templates from outside: transformers' sandbox, with limits set around it.

The sandbox keeps a template from Python, but not from looping for ever or from filling the memory: the limits do.
Should the sandbox leak, the process can open no file and no socket, start no program, and finds no token in its
environment. ``template_guard`` is the parent's side: it starts the child and holds the clock.
"""

import contextlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes beyond what Python itself needs


def render(template: str, call: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Text and the spans of the template's generation markers, in this process; raises what Jinja raises.

    ``call`` holds messages, tools, generation_prompt, and special (names of special tokens and their text).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = "endgeneration" in template and not call["generation_prompt"]
    texts, indices = render_jinja_template(
        conversations=[call["messages"]],
        tools=call["tools"] or None,
        chat_template=template,
        add_generation_prompt=call["generation_prompt"],
        return_assistant_tokens_mask=marked,
        **call["special"],
    )
    return texts[0], [tuple(span) for span in indices[0]] if marked else []


def _serve() -> None:
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    template = json.loads(lines.readline())
    _import_renderer()
    _set_limits()
    out.write(b"{}\n")
    out.flush()
    for line in lines:  # ends with the parent, whose end of the pipe closes
        out.write(_answer(template, line))
        out.flush()


def _answer(template: str, line: bytes) -> bytes:
    try:
        seconds, call = json.loads(line)
        _allow_cpu(seconds)
        text, spans = render(template, call)
        return json.dumps({"text": text, "spans": spans}).encode() + b"\n"
    except MemoryError:
        return json.dumps({"limit": f"it needed more than {MEMORY >> 20:,} MiB of memory"}).encode() + b"\n"
    except Exception as error:
        return json.dumps({"error": (str(error) or type(error).__name__)[:10_000]}).encode() + b"\n"


def _import_renderer() -> None:
    """Load transformers' renderer without the rest of the library, which takes 2 s."""
    found = importlib.util.find_spec("transformers")
    assert found and found.origin
    folder = Path(found.origin).parent
    for name, path in (("transformers", folder), ("transformers.utils", folder / "utils")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    # Jinja imports more when it first needs it, which the limits would forbid: escapes, filters, the way of an error
    call: dict[str, Any] = {"messages": [], "tools": None, "generation_prompt": False, "special": {}}
    needs = r"{{ 'a\n&lt;' | striptags | wordwrap | pprint }}{{ lipsum(1) }}{{ strftime_now('%Z') }}{{ 1 // 0 }}"
    with contextlib.suppress(ZeroDivisionError):
        render(needs, call)


def _set_limits() -> None:
    if importlib.util.find_spec("resource") is None:
        return  # Windows: the parent's clock remains, and its limit on the output
    import resource

    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 3}
    with contextlib.suppress(OSError):  # macOS has no /proc, and keeps no limit on the address space either
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits["RLIMIT_AS"] = pages * resource.getpagesize() + MEMORY
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def _allow_cpu(seconds: float) -> None:
    """Processor time for this call: it ends a loop whose parent has died without stopping it."""
    if importlib.util.find_spec("resource") is None:
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    with contextlib.suppress(ValueError, OSError):
        most = int(used.ru_utime + used.ru_stime + seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    _serve()
