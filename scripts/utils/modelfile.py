"""A Modelfile for Ollama: where the model lies, the template, the system message, stop tokens and sampling settings.

Format: docs/modelfile.mdx in ollama/ollama. It has not been run by Ollama itself; the template is compared by its parts
(``go_template``) and the file is read back by a reader of our own.
"""

import re
from dataclasses import dataclass
from typing import Any

from scripts.utils.errors import UserError
from scripts.utils.go_template import Form, go_text


@dataclass(frozen=True)
class Settings:
    """``context`` in tokens; ``stops`` are texts."""

    temperature: float
    top_p: float
    context: int
    stops: list[str]
    system: str | None


def text_of(source: str, form: Form, settings: Settings, *, comments: list[str], bos: str) -> str:
    """The whole file; ``source`` is a path relative to it. Raises ``UserError`` for a text that the format cannot hold."""
    template = go_text(form, bos)
    for what, text in (("the template", template), ("the system message", settings.system or "")):
        if '"""' in text or text.endswith('"'):
            raise UserError(
                f'{what} holds """ or ends with ", which a Modelfile cannot hold', "change it, or write it by hand"
            )
    lines = [*(f"# {comment}" for comment in comments), f"FROM {source}", f'TEMPLATE """{template}"""']
    if settings.system:
        lines.append(f'SYSTEM """{settings.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in settings.stops]
    lines += [
        f"PARAMETER temperature {settings.temperature:g}",
        f"PARAMETER top_p {settings.top_p:g}",
        f"PARAMETER num_ctx {settings.context}",
    ]
    return "\n".join(lines) + "\n"


def read(text: str) -> list[tuple[str, Any]]:
    """The commands of a Modelfile in order, as (name, value); PARAMETER's value is (name, value).

    Raises ``ValueError`` for a line that is none.
    """
    found: list[tuple[str, Any]] = []
    rest = text
    while rest:
        match = re.match(r'(FROM|TEMPLATE|SYSTEM|PARAMETER)[ \t]+(?:"""(.*?)"""|([^\n]*))(?:\n|$)', rest, re.DOTALL)
        comment = re.match(r"(?:#[^\n]*)?(?:\n|$)", rest)
        if match:
            name, block, line = match.groups()
            value: Any = block if block is not None else line
            if name == "PARAMETER":
                key, _, value = line.partition(" ")
                value = (key, value[1:-1] if value[:1] == '"' == value[-1:] else float(value))
            found.append((name, value))
            rest = rest[match.end() :]
        elif comment and comment.end():
            rest = rest[comment.end() :]
        else:
            raise ValueError(f"not a line of a Modelfile: {rest.splitlines()[0]!r}")
    return found
