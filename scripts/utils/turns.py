"""One turn of a conversation as a message: roles, content, tool calls and tools in one form, and their order checked.

The form is OpenAI's: {"role", "content", "tool_calls"?, …}, arguments of a call as an object. What is said is kept
letter by letter; what cannot be used is an ``Unusable`` with the reason. Nothing is repaired by guessing.
"""

import json
from typing import Any

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "call", "tool_call": "call",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
_KEPT_KEYS = ("reasoning_content", "name", "tool_call_id")
_READ_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", "train", "weight", *_KEPT_KEYS}


_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}


class Unusable(Exception):
    """Why a row is rejected. ``reason`` is the same text for all rows with this fault, ``detail`` is this row's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "text", bool: "true or false"}
    return "missing or null" if value is None else names.get(type(value), "a number")


def is_blank(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def as_text(value: Any, what: str) -> str:
    """Text as it is; a number, true or false as JSON writes it; nothing else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise Unusable(f"{what} is {kind_of(value)}")


def filled_text(value: Any, what: str) -> str:
    if is_blank(text := as_text(value, what)):
        raise Unusable(f"{what} is empty")
    return text


def _content(value: Any, what: str) -> str:
    """What a turn says: text, nothing (null), or OpenAI's list of parts, text parts only, joined."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return as_text(value, what)
    texts = [part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) != len(value) or any(part.get("type", "text") != "text" for part in value):
        raise Unusable(f"{what} holds parts that are not text")
    return "".join(texts)


def read_turn(turn: Any, left_out: dict[str, int]) -> dict[str, Any]:
    """One OpenAI or ShareGPT turn as a message."""
    if not isinstance(turn, dict):
        raise Unusable("a turn is not an object", f"it is {kind_of(turn)}")
    spoken = turn.get("role", turn.get("from"))
    role = _ROLES.get(spoken.lower()) if isinstance(spoken, str) else None
    said = turn.get("content", turn.get("value"))
    if len(turn) == 2 and role in ("system", "user", "assistant") and isinstance(said, str) and said.strip():
        return {"role": role, "content": said}  # as nearly every turn is: nothing else to look at
    if role is None:
        raise Unusable("a turn has an unknown role", repr(spoken)[:60])
    if not isinstance(train := turn.get("train"), bool | None):
        raise Unusable('"train" on a turn is not true or false', f"it is {kind_of(train)}")
    if turn.get("weight") not in (None, 1, True):
        raise Unusable('"weight" on a single turn is not supported ("train": false keeps it out of the loss)')
    for name in turn.keys() - _READ_KEYS:
        if not is_blank(turn[name]):
            left_out[f"turn.{name}"] = left_out.get(f"turn.{name}", 0) + 1
    value, calls = said, turn.get("tool_calls") or turn.get("function_call")
    message: dict[str, Any]
    if role == "call":
        message = {"role": "assistant", "content": "", "tool_calls": _calls(_parsed(value, "a tool call"))}
    elif role == "assistant" and calls:
        message = {"role": role, "content": _content(value, "an assistant turn"), "tool_calls": _calls(calls)}
    else:
        what = f"an {role} turn" if role == "assistant" else f"a {role} turn"
        message = {"role": role, "content": _content(value, what)}
        # a tool may return nothing, and an empty system message says that no default one is wanted
        if role in ("user", "assistant") and is_blank(message["content"]):
            raise Unusable(f"{what} is empty")
    kept = {name: turn[name] for name in _KEPT_KEYS if isinstance(turn.get(name), str)}
    return message | kept | ({"train": False} if train is False else {})


def _parsed(value: Any, what: str) -> Any:
    """JSON that may stand as text."""
    if not isinstance(value, str):
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise Unusable("a key stands twice in one object", f"in {what}")
        return found

    try:
        return json.loads(value, object_pairs_hook=once)
    except ValueError as error:
        raise Unusable(f"not valid JSON in {what}", str(error)) from error


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, arguments as an object."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            raise Unusable("a tool call has no name")
        arguments = call.get("arguments", call.get("parameters"))
        arguments = {} if is_blank(arguments) else _parsed(arguments, "the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise Unusable("the arguments of a tool call are not an object", f"they are {kind_of(arguments)}")
        named = {"id": item["id"]} if isinstance(item.get("id"), str) else {}
        calls.append({**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}})
    if not calls:
        raise Unusable("a tool call has no name")
    return calls


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The tools that may be called, each as {"type": "function", "function": {…}}."""
    if is_blank(value):
        return []
    tools = _parsed(value, '"tools"')
    if is_blank(tools):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable('"tools" is not a list of objects')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def check_order(messages: list[dict[str, Any]]) -> None:
    """One system message at most, first; then user and assistant in turn, tool results after tool calls."""
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in _MAY_FOLLOW[role]:
            said = {"start": "nothing", "call": "a tool call"}.get(before, before)
            raise Unusable("roles in a wrong order", f"turn {number}: {role} after {said}")
        before = "call" if message.get("tool_calls") else role
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant turn")
    if all(message.get("train") is False for message in messages if message["role"] == "assistant"):
        raise Unusable('no turn to learn from: every assistant turn says "train": false')
    if before not in ("assistant", "call"):
        raise Unusable("the last turn is not the assistant's", f"it is {before}")
