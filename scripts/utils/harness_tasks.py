"""Tasks for lm-evaluation-harness that lie here (configs/harness): which there are, and their rows as a file it reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import files, prompts
from scripts.utils.chat import render_prompt
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from scripts.utils.trained import Trained

FOLDER = files.REPO_ROOT / "configs" / "harness"
OWN_ROWS = "own_rows"
Spec = dict[str, Any]


def names(given: str) -> list[str]:
    """The tasks in ``given``, split at commas and spaces; raises ``UserError`` where there is none."""
    found = [name for name in re.split(r"[\s,]+", given) if name]
    if not found:
        raise UserError(
            "no tasks are named", f"make eval-harness TASKS=…; tasks that need no hub: {', '.join(sorted(local()))}"
        )
    return list(dict.fromkeys(found))


def local() -> dict[str, Path]:
    """Task files by name."""
    return {path.stem: path for path in FOLDER.glob("*.yaml")}


def read(name: str) -> Spec:
    """A task file's content; empty where it holds what only the harness reads (``!function``, ``include``)."""
    import yaml

    path = local()[name]
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}", "mend the file") from error
    if not isinstance(spec, dict) or "include" in spec:
        return {}
    if spec.get("task") != name:
        raise UserError(f"{path}: its task is called {spec.get('task')!r}", f"write `task: {name}`")
    return spec


def wants_rows(spec: Spec) -> bool:
    """Whether a task file leaves its rows to the command."""
    return spec.get("dataset_path") == "json" and not spec.get("dataset_kwargs")


def input_rows(path: Path, spec: Spec) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, each with the columns that the task's prompt and answer are made of.

    Raises ``UserError`` with the line of the first that lacks one.
    """
    from jinja2 import Environment, meta

    if not path.is_file():
        raise UserError(f"there is no file {path.absolute()}", "name a file of JSON lines: INPUT=rows.jsonl")
    # the harness takes a template, or a bare name for a column
    texts = [str(spec.get(key, "")) for key in ("doc_to_text", "doc_to_target")]
    text = "\n".join(f"{{{{{text}}}}}" if text.isidentifier() else text for text in texts)
    columns = sorted(meta.find_undeclared_variables(Environment(autoescape=False).parse(text)))
    rows = []
    try:
        given = list(files.read_jsonl(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path.absolute()}: not UTF-8 ({error})", "convert it first") from error
    for number, row in enumerate(given, 1):
        missing = [column for column in columns if not isinstance(row, dict) or row.get(column) is None]
        if missing:
            raise UserError(
                f"{path}: row {number} has no {', '.join(missing)}", f"task {spec['task']} needs {', '.join(columns)}"
            )
        rows.append({column: row[column] for column in columns})
    if not rows:
        raise UserError(f"{path.absolute()} has no rows", f"one JSON object a line, with {', '.join(columns)}")
    return rows


def own_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompt and reference of each rendered row that asks something."""
    found = [
        {"prompt": row["text"][: row["prompt_end"]], "reference": row["reference"]} for row in rows if row["prompt_end"]
    ]
    if not found:
        raise UserError("the rows are texts, which ask nothing", "task own_rows needs conversations")
    return found


def requested(requests: Sequence[prompts.Request], trained: "Trained", system: str | None) -> list[dict[str, Any]]:
    """Prompt and reference of each conversation, rendered as infer-batch does; each must bring its answer."""
    found = []
    for request in requests:
        if request.reference is None:
            raise UserError(
                f"line {request.line} of the input brings no answer to compare with",
                'task own_rows reads {"messages": […]} that end with the assistant\'s answer',
            )
        chat = prompts.with_system(request.messages, system)
        prompt = render_prompt(trained.template, trained.tokenizer, chat, request.tools).text
        found.append({"prompt": prompt, "reference": request.reference})
    return found
