"""The part of Go's text/template that our Modelfiles use, as its documentation describes it: enough to check them."""

import json
import re
from typing import Any

_STRING = r'"(?:[^"\\]|\\.)*"'
_TAG = re.compile(rf"{{{{(-\s)?\s*((?:{_STRING}|[^\"}}])*?)\s*(\s-)?}}}}", re.DOTALL)


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What the template writes for Ollama's data: .System is the text of all system messages, .Messages are all of them."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    state: dict[str, Any] = {"$": {"System": system, "Messages": messages}}
    tokens, at = [], 0
    trim_next = False
    for tag in _TAG.finditer(template):
        text = template[at : tag.start()]
        text = text.lstrip() if trim_next else text
        tokens.append(("text", text.rstrip() if tag.group(1) else text))
        tokens.append(("tag", tag.group(2)))
        trim_next, at = bool(tag.group(3)), tag.end()
    tokens.append(("text", template[at:].lstrip() if trim_next else template[at:]))
    assert not any("{{" in text or "}}" in text for kind, text in tokens if kind == "text"), "a tag that is not closed"
    tree, end = _block(tokens, 0)
    assert end == len(tokens), "an end too many"
    return _write(tree, state, state["$"])


def _block(tokens: list[tuple[str, str]], at: int) -> tuple[list[Any], int]:
    """Nodes up to the end, or else, that closes them: text, value, set, if with its branches, range."""
    nodes: list[Any] = []
    while at < len(tokens):
        kind, word = tokens[at]
        if kind == "text":
            nodes.append(("text", word))
        elif word.startswith("range "):
            body, at = _block(tokens, at + 1)
            assert tokens[at][1] == "end"
            nodes.append(("range", word.removeprefix("range "), body))
        elif word.startswith("if "):
            branches = []
            condition = word.removeprefix("if ")
            while True:
                body, at = _block(tokens, at + 1)
                branches.append((condition, body))
                if tokens[at][1] == "end":
                    break
                condition = tokens[at][1].removeprefix("else").strip().removeprefix("if ") or "true"
            nodes.append(("if", branches))
        elif word == "end" or word.startswith("else"):
            return nodes, at
        elif ":=" in word or re.match(r"\$\w+ = ", word):
            name, _, value = word.replace(":=", "=").partition("=")
            nodes.append(("set", name.strip(), value.strip()))
        else:
            nodes.append(("value", word))
        at += 1
    return nodes, at


def _value(word: str, state: dict[str, Any], dot: Any) -> Any:
    if word.startswith("not "):
        return not _value(word.removeprefix("not "), state, dot)
    if word.startswith("eq "):
        first, second = word.removeprefix("eq ").split(" ", 1)
        return _value(first, state, dot) == _value(second, state, dot)
    if word.startswith('"'):
        return json.loads(word)
    if word in ("true", "false"):
        return word == "true"
    if word.startswith("$"):
        return state[word]
    assert word.startswith("."), word
    return dot[word[1:]] if word[1:] in dot else dot[word[1:].lower()]


def _write(nodes: list[Any], state: dict[str, Any], dot: Any) -> str:
    text = ""
    for kind, *rest in nodes:
        if kind == "text":
            text += rest[0]
        elif kind == "value":
            text += str(_value(rest[0], state, dot))
        elif kind == "set":
            state[rest[0]] = _value(rest[1], state, dot)
        elif kind == "range":
            for item in _value(rest[0], state, dot):
                text += _write(rest[1], state, item)
        else:
            text += next((_write(body, state, dot) for test, body in rest[0] if _value(test, state, dot)), "")
    return text
