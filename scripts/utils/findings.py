"""What the doctor found: one line of ``make check``, with the command that mends it.

A name is for machines and stays as it is once published: docs/check.md lists them all, and a test holds that.
"""

from dataclasses import dataclass
from typing import Any, Literal

from scripts.utils.errors import SFTError

MACHINE, USER = 4, 2  # exit codes: what this machine lacks, what the config or the data does


@dataclass(frozen=True)
class Finding:
    """``code`` is 0, or the exit code that this fault means; a warning stops nothing. No text holds a row or a secret."""

    topic: str
    text: str
    name: str = "ok"
    code: int = 0
    hint: str = ""

    @property
    def state(self) -> Literal["ok", "warning", "error"]:
        return "error" if self.code else "ok" if self.name == "ok" else "warning"

    def as_json(self) -> dict[str, Any]:
        return {
            "topic": self.topic,
            "name": self.name,
            "state": self.state,
            "code": self.code,
            "text": self.text,
            "hint": self.hint,
        }


def ok(topic: str, text: str) -> Finding:
    return Finding(topic, text)


def warning(topic: str, name: str, text: str, hint: str) -> Finding:
    return Finding(topic, text, name, hint=hint)


def fault(topic: str, name: str, text: str, hint: str, code: int = MACHINE) -> Finding:
    return Finding(topic, text, name, code, hint)


def from_problem(topic: str, name: str, problem: SFTError) -> Finding:
    """An error that a step would end with; refusals (exit 3) are the user's to mend, as all that is no machine's."""
    code = MACHINE if problem.exit_code == MACHINE else USER
    return Finding(topic, problem.message, name, code, problem.hint)


def from_json(entry: dict[str, Any]) -> Finding:
    return Finding(entry["topic"], entry["text"], entry["name"], entry["code"], entry["hint"])
