"""infer: chat with a trained model, ask it one thing, or answer a file of prompts.

Answers go to stdout (chat, --prompt) or to a JSON lines file (--input); everything else goes to stderr. Prompts take
the same way to token ids as in training.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import chat_session, command, console, files, prompts, stamp
from scripts.utils.chat import render_prompt
from scripts.utils.config import run_name
from scripts.utils.encoding import encode_prompt
from scripts.utils.errors import UserError
from scripts.utils.trained import Trained, load_base_model, load_trained

if TYPE_CHECKING:
    from scripts.utils.schema import Config, InferSection


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make infer RUN=try1",
        "sft-infer --run try1 --prompt 'Where is my parcel?'",
        "sft-infer --run try1 --prompt - < letter.txt",
        "sft-infer --run try1 --input prompts.jsonl --output answers.jsonl",
        "sft-infer --model embedded/smollm2-135m-instruct --temperature 0.7",
    ]
    parser = command.new_parser("infer", "Chat, one prompt, or a file of prompts.", examples, keys=["run", "raw"])
    parser.add_argument("--which", choices=["tuned", "base", "merged"], help="which model of the run (tuned)")
    parser.add_argument("--model", dest="plain_model", metavar="MODEL", help="a model without a run")
    parser.add_argument("--prompt", metavar="TEXT", help="ask once and print the answer; - reads stdin as one prompt")
    parser.add_argument("--input", metavar="FILE", help=".jsonl (prompt, user or messages a row) or .txt (one a line)")
    parser.add_argument("--output", metavar="FILE", help="answers to --input (outputs/<run>/predictions.jsonl)")
    parser.add_argument("--whole-file", action="store_true", help="take the text file as one prompt")
    # not --limit's usual meaning of eval.limit, so a name of its own inside
    parser.add_argument("--limit", dest="prompts", type=int, metavar="N", help="only the first N prompts of --input")
    parser.add_argument("--system", metavar="TEXT", help="system message ('' for none; default: the one trained with)")
    for name, kind in (("temperature", float), ("top-p", float), ("max-new-tokens", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"instead of infer.{name.replace('-', '_')}")
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    check_choice(arguments)
    settings = settings_of(arguments, config)
    run = "" if arguments.plain_model else run_name(config, arguments.config)
    if arguments.input is not None:
        requests = read_requests(arguments)
        output = output_path(arguments, run)
        trained = load(arguments, run)
        answer_file(
            trained, requests, output, settings, choose_system(arguments, trained), arguments.system is not None
        )
    elif arguments.prompt is not None:
        prompt = read_prompt(arguments.prompt)
        trained = load(arguments, run)
        messages = prompts.with_system([{"role": "user", "content": prompt}], choose_system(arguments, trained))
        chat_session.answer(trained, messages, settings, seed=settings.seed)
    elif sys.stdin.isatty():
        trained = load(arguments, run)
        chat_session.chat(trained, settings, choose_system(arguments, trained))
    else:
        raise UserError(
            "there is no terminal to chat on",
            "ask once with --prompt TEXT (or --prompt - for stdin), or give --input FILE",
        )


def check_choice(arguments: argparse.Namespace) -> None:
    """Raises ``UserError`` where two prompts or two models are asked for.

    MODEL from make is passed over: it names what to train, and must not stand in for the run that was trained on it.
    """
    if arguments.prompt is not None and arguments.input is not None:
        raise UserError("--prompt and --input are both given", "give one of them")
    if arguments.plain_model and (arguments.run or arguments.which):
        raise UserError("--model is a model without a run, but --run or --which is given too", "give one of them")


def settings_of(arguments: argparse.Namespace, config: "Config") -> "InferSection":
    """config.infer with the flags over it, held to the same bounds."""
    from pydantic import ValidationError

    from scripts.utils.schema import InferSection

    names = ("temperature", "top_p", "max_new_tokens", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        return InferSection.model_validate({**config.infer.model_dump(), **given})
    except ValidationError as error:
        lines = [f"--{str(e['loc'][0]).replace('_', '-')} is {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise UserError("\n       ".join(lines), "see configs/base.yaml, section infer") from error


def load(arguments: argparse.Namespace, run: str) -> Trained:
    """The model that was asked for, never another one, and a line that says which it is."""
    if arguments.plain_model:
        trained = load_base_model(arguments.plain_model)
        what = f"{arguments.plain_model}, without a run"
    else:
        trained = load_trained(run, which=arguments.which or "tuned")
        base = trained.stamp["model"]["name"]
        what = {
            "adapter": f"run {run}: {base} with {stamp.adapter_folder(run)}",
            "full": f"run {run}: {stamp.adapter_folder(run)}, fully tuned from {base}",
            "merged": f"run {run}: {stamp.run_folder(run) / 'merged'}",
            "base": f"run {run}: its base model {base}, untuned",
        }[trained.kind]
    console.note("infer", f"{what}; {trained.precision} on {trained.device}")
    return trained


def choose_system(arguments: argparse.Namespace, trained: Trained) -> str | None:
    """--system, else the style's text that the run was trained with; said aloud either way."""
    if arguments.system is not None:
        console.note("infer", "system message: as given" if arguments.system else "no system message")
        return arguments.system or None
    text = (trained.stamp.get("style") or {}).get("text")
    if text:
        console.note("infer", f"system message, as in training: {console_line(text)}")
    return text


def console_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}…"


def read_prompt(given: str) -> str:
    """The one prompt, line breaks and all; raises ``UserError`` when it is empty or not UTF-8."""
    text = given
    if given == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8 ({error})", "convert it first") from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            "the prompt is not valid UTF-8", "check the terminal's encoding, or use --input FILE"
        ) from error
    if not text.strip():
        raise UserError("the prompt is empty", "write something to answer")
    return text


def read_requests(arguments: argparse.Namespace) -> list[prompts.Request]:
    if not arguments.input:
        raise UserError("no input file is named", "make infer-batch INPUT=prompts.jsonl, or sft-infer --input FILE")
    if arguments.prompts is not None and arguments.prompts < 1:
        raise UserError(f"--limit is {arguments.prompts}", "give a number of at least 1")
    requests = prompts.read(Path(arguments.input), limit=arguments.prompts, whole_file=arguments.whole_file)
    if answered := sum(request.reference is not None for request in requests):
        console.note(
            "infer", f"{answered:,} rows end with an answer: it is kept as reference, and not shown to the model"
        )
    return requests


def output_path(arguments: argparse.Namespace, run: str) -> Path:
    """Where the answers go; raises ``UserError`` before any work where that cannot be."""
    if not arguments.output and not run:
        raise UserError("without a run there is no folder for the answers", "say where: --output FILE")
    path = Path(arguments.output) if arguments.output else stamp.run_folder(run) / "predictions.jsonl"
    if path.is_dir():
        raise UserError(f"{path.absolute()} is a folder", "give a file with --output")
    if path.exists() and path.samefile(arguments.input):
        raise UserError(f"{path.absolute()} is the input file itself", "give another --output")
    if arguments.output:
        with files.disk_errors(path), contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path.parent.absolute()}: not a folder that can be written to", "give another --output")
    return path


def answer_file(
    trained: Trained,
    requests: list[prompts.Request],
    output: Path,
    settings: "InferSection",
    system: str | None,
    replace_system: bool,
) -> None:
    """Answer every request and write them in the order of the input, one JSON line each."""
    from scripts.utils.generation import check_lengths, generate

    ids: list[list[int]] = []
    chats: list[list[prompts.Message]] = []
    for request in requests:
        chats.append(prompts.with_system(request.messages, system, replace=replace_system))
        ids.append(
            encode_prompt(
                trained.tokenizer, render_prompt(trained.template, trained.tokenizer, chats[-1], request.tools)
            )
        )
    check_lengths(trained.model, ids, [f"prompt {request.id} (line {request.line})" for request in requests])
    progress = console.Progress("infer", "prompts", len(requests))
    options: dict[str, Any] = settings.model_dump(
        include={"max_new_tokens", "temperature", "top_p", "seed", "batch_size"}
    )
    found = generate(
        trained.model, trained.tokenizer, ids, stop_ids=trained.stop_ids, on_done=progress.advance, **options
    )
    progress.close()
    files.write_jsonl(
        output,
        (
            {
                "id": request.id,
                "line": request.line,
                "messages": chat,
                "answer": answer.text,
                "finished": answer.finished,
                "tokens": len(answer.ids),
            }
            | ({"reference": request.reference} if request.reference is not None else {})
            for request, chat, answer in zip(requests, chats, found, strict=True)
        ),
    )
    if cut := sum(not answer.finished for answer in found):
        console.warn(
            f"{cut:,} of {len(found):,} answers were cut at {settings.max_new_tokens} tokens (--max-new-tokens)"
        )
    console.result(f"{len(found):,} answers: {output}")


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
