"""YAML whose scalars stay text, so that the schema's type decides what a value is.

YAML 1.1 reads ``1e-4`` as text, a bare ``no`` as False and ``1:30`` as 90. Here every plain scalar but null stays
the text that was typed, and pydantic turns it into the number, switch or text that the key wants.
Duplicate keys are refused (one of them would be ignored in silence), and so are aliases (a few lines can expand
to hundreds of megabytes).
"""

from pathlib import Path
from typing import Any

import yaml

from scripts.utils.errors import UserError

Lines = dict[tuple[str, ...], int]


class _TextLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed in a config", problem_mark=mark)
        return super().compose_node(parent, index)


def _value(node: yaml.Node, path: tuple[str, ...], lines: Lines) -> Any:
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in found:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands here twice", problem_mark=key_node.start_mark
                )
            lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = _value(value_node, (*path, key), lines)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, str(number)), lines) for number, item in enumerate(node.value)]
    # tag and style tell a plain null from the quoted word "null"
    if node.tag == "tag:yaml.org,2002:null":
        return None
    return node.value


def parse(text: str, where: str) -> tuple[Any, Lines]:
    """Return the value and the line of each key (as a path of names); syntax errors are ``UserError``."""
    loader = _TextLoader(text)
    lines: Lines = {}
    try:
        node = loader.get_single_node()
        return (None if node is None else _value(node, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{where}:{line}: not valid YAML: {error.problem}", "mend that line") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}", "mend the file") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply to be a config", "mend the file") from error
    finally:
        loader.dispose()


def load(path: Path) -> tuple[dict[str, Any], Lines]:
    """Read a YAML file that holds a mapping; raises ``UserError`` for a missing, unreadable or odd file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folders = dict.fromkeys((path.parent, Path("configs")))
        nearby = [str(p) for f in folders for p in sorted(f.glob("*.yaml")) if not p.name.startswith(".")]
        hint = f"there is: {', '.join(nearby)}" if nearby else "check the path; it is relative to the current folder"
        raise UserError(f"config {path} not found (looked for {path.absolute()})", hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path.absolute()}: cannot be read ({error})", "give a UTF-8 YAML file") from error
    value, lines = parse(text, str(path))
    if value is None:
        return {}, lines
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: a config is a mapping of sections, this is a {type(value).__name__}", "see configs/base.yaml"
        )
    return value, lines
