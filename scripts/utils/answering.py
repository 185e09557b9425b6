"""A file of prompts, answered in batches: one JSON line an answer, in the order of the input.

A killed start goes on where it was. Which rows share a batch depends on the whole file, and what a row draws on the
row alone, so that the answers are the same as without the kill.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, prompts, stamp, unfinished
from scripts.utils.chat import render_prompt
from scripts.utils.encoding import encode_prompt
from scripts.utils.errors import UserError
from scripts.utils.trained import Trained

if TYPE_CHECKING:
    from scripts.utils.json_schema import Schema
    from scripts.utils.schema import InferSection


@dataclass(frozen=True)
class Task:
    """One answer to give: ``ids`` are the prompt's tokens, ``key`` stands for all that decides the answer."""

    request: prompts.Request
    messages: list[prompts.Message]
    sample: int
    ids: list[int]
    key: str
    seed: int


def check_samples(settings: "InferSection") -> None:
    if settings.num_samples > 1 and settings.temperature == 0:
        raise UserError(
            f"{settings.num_samples} samples of each prompt at temperature 0 would all be the same",
            "set --temperature above 0, or leave --num-samples out",
        )


def output_path(wanted: str | None, run: str, source: Path) -> Path:
    """Where the answers to ``source`` go; raises ``UserError`` before any work where that cannot be."""
    if not wanted and not run:
        raise UserError("without a run there is no folder for the answers", "say where: --output FILE")
    path = Path(wanted) if wanted else stamp.run_folder(run) / "predictions.jsonl"
    if path.is_dir():
        raise UserError(f"{path.absolute()} is a folder", "give a file with --output")
    if path.exists() and path.samefile(source):
        raise UserError(f"{path.absolute()} is the input file itself", "give another --output")
    if wanted:
        with files.disk_errors(path), contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path.parent.absolute()}: not a folder that can be written to", "give another --output")
    return path


def deciding(settings: "InferSection", model: dict[str, Any], schema: "Schema | None") -> dict[str, Any]:
    """All that decides an answer besides its prompt. The batch size is not in it: a start may go on with a smaller one."""
    wanted = {"max_new_tokens", "temperature", "stop"} | ({"top_p", "seed"} if settings.temperature > 0 else set())
    return {**model, **settings.model_dump(include=wanted), "json_schema": schema.text if schema else None}


def tasks_of(
    trained: Trained,
    requests: Sequence[prompts.Request],
    settings: "InferSection",
    decided: dict[str, Any],
    system: str | None,
    replace_system: bool,
) -> list[Task]:
    """The answers to give, ``num_samples`` a request; raises ``UserError`` for a prompt that is too long."""
    from scripts.utils.generation import check_lengths

    tasks: list[Task] = []
    seen: Counter[str] = Counter()
    for request in requests:
        messages = prompts.with_system(request.messages, system, replace=replace_system)
        text = render_prompt(trained.template, trained.tokenizer, messages, request.tools)
        ids = encode_prompt(trained.tokenizer, text)
        prompt = files.sha256_json(ids)
        for sample in range(settings.num_samples):
            # a prompt that stands twice in the file is drawn for twice; where it stands does not matter
            which = [prompt, seen[prompt], sample]
            seed = int(files.sha256_json([settings.seed, *which])[:15], 16)
            tasks.append(Task(request, messages, sample, ids, files.sha256_json([decided, *which]), seed))
        seen[prompt] += 1
    names = [f"prompt {task.request.id} (line {task.request.line})" for task in tasks]
    check_lengths(trained.model, [task.ids for task in tasks], names)
    return tasks


def answer_all(
    trained: Trained,
    tasks: Sequence[Task],
    output: Path,
    settings: "InferSection",
    decided: dict[str, Any],
    schema: "Schema | None",
) -> None:
    """Answer every task that has no answer yet, and write them all to ``output``."""
    with unfinished.beside(output) as kept:
        _say_what_is_there(kept, tasks, output, decided)
        kept.begin(decided)
        _answer(trained, tasks, kept, settings, schema)
        files.write_jsonl(output, (_row(task, kept.answers[task.key], settings.num_samples) for task in tasks))
    cut = sum(not kept.answers[task.key]["finished"] for task in tasks)
    if cut:
        what = " and are no whole JSON" if schema else ""
        console.warn(
            f"{cut:,} of {len(tasks):,} answers were cut at {settings.max_new_tokens} tokens (--max-new-tokens){what}"
        )
    console.result(f"{len(tasks):,} answers: {output}")


def _answer(
    trained: Trained,
    tasks: Sequence[Task],
    kept: unfinished.Unfinished,
    settings: "InferSection",
    schema: "Schema | None",
) -> None:
    from scripts.utils.generation import batches, context_limit, generate

    done = sum(task.key in kept.answers for task in tasks)
    progress = console.Progress("infer", "answers", len(tasks) - done)
    limit = context_limit(trained.model)
    for batch in batches([task.ids for task in tasks], settings.batch_size, settings.max_new_tokens, limit):
        rest = [tasks[number] for number in batch if tasks[number].key not in kept.answers]
        if not rest:
            continue
        found = generate(
            trained.model,
            trained.tokenizer,
            [task.ids for task in rest],
            stop_ids=trained.stop_ids,
            seeds=[task.seed for task in rest],
            schema=schema,
            **{**settings.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed", "stop"})},
            batch_size=len(rest),
        )
        kept.add(
            {
                task.key: {"answer": answer.text, "finished": answer.finished, "tokens": len(answer.ids)}
                for task, answer in zip(rest, found, strict=True)
            }
        )
        progress.advance(len(rest))
    progress.close()


def _say_what_is_there(
    kept: unfinished.Unfinished, tasks: Sequence[Task], output: Path, decided: dict[str, Any]
) -> None:
    if not kept.answers:
        return
    fitting = sum(task.key in kept.answers for task in tasks)
    if fitting:
        console.note("infer", f"{fitting:,} of {len(tasks):,} answers are there from an earlier start; going on")
    if before := kept.settings:
        names = [name for name in decided if decided[name] != before.get(name)]
        changed = ", ".join(f"{name} {_short(before.get(name))} -> {_short(decided[name])}" for name in names)
        if changed:
            console.warn(f"the earlier start of {output} had other settings: {changed}; its answers are not used")
            return
    if other := len(kept.answers) - fitting:
        console.warn(f"{other:,} answers of the earlier start belong to other prompts than those of the input now")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:19]}…"


def _row(task: Task, answer: dict[str, Any], samples: int) -> dict[str, Any]:
    row = {"id": task.request.id, "line": task.request.line, "messages": task.messages}
    row |= {"sample": task.sample} if samples > 1 else {}
    row |= answer
    return row | ({"reference": task.request.reference} if task.request.reference is not None else {})
