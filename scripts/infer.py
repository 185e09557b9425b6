"""infer: chat with a trained model, ask it one thing, or answer a file of prompts.

Answers go to stdout (chat, --prompt) or to a JSON lines file (--input); everything else goes to stderr. Prompts take
the same way to token ids as in training.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import answering, chat_session, command, console, json_schema, prompts, speaking, stamp
from scripts.utils.config import run_name
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
        "sft-infer --run try1 --input prompts.jsonl --num-samples 4 --temperature 0.8 --seed 1",
        "sft-infer --run try1 --prompt 'Where is my parcel?' --json-schema answer.schema.json",
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
    parser.add_argument("--chat", action="store_true", help="chat although stdin is no terminal: a message a line")
    numbers = {"temperature": float, "top-p": float, "max-new-tokens": int, "seed": int, "num-samples": int}
    for name, kind in numbers.items():
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"instead of infer.{name.replace('-', '_')}")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="text that ends an answer; may be given again")
    parser.add_argument("--json-schema", metavar="FILE", help="every answer is JSON of this shape (EXTRAS=json)")
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    check_choice(arguments)
    settings = settings_of(arguments, config)
    run = "" if arguments.plain_model else run_name(config, arguments.config)
    schema = json_schema.read(Path(settings.json_schema)) if settings.json_schema else None
    if arguments.input is not None:
        answering.check_samples(settings)
        requests = read_requests(arguments)
        output = answering.output_path(arguments.output, run, Path(arguments.input))
    elif arguments.prompt is not None:
        prompt = prompts.read_one(arguments.prompt)
    elif not arguments.chat and not sys.stdin.isatty():
        raise UserError(
            "there is no terminal to chat on",
            "ask once with --prompt TEXT (or --prompt - for stdin), give --input FILE, or chat all the same: --chat",
        )
    trained = load(arguments, run, settings.stop)
    system = choose_system(arguments, trained)
    schema = schema.ready(trained.tokenizer, trained.stop_ids) if schema else None
    if arguments.input is not None:
        decided = answering.deciding(settings, trained.identity, schema)
        tasks = answering.tasks_of(trained, requests, settings, decided, system, arguments.system is not None)
        answering.answer_all(trained, tasks, output, settings, decided, schema)
    elif arguments.prompt is not None:
        messages = prompts.with_system([{"role": "user", "content": prompt}], system)
        speaking.answer(trained, speaking.ids_of(trained, messages), settings, seed=settings.seed, schema=schema)
    else:
        chat_session.chat(trained, settings, system, schema)


def check_choice(arguments: argparse.Namespace) -> None:
    """Raises ``UserError`` where flags contradict one another, or one is given that would do nothing.

    MODEL from make is passed over: it names what to train, and must not stand in for the run that was trained on it.
    """
    ways = [f"--{name}" for name in ("prompt", "input") if getattr(arguments, name) is not None]
    if len(ways := ways + ["--chat"] * arguments.chat) > 1:
        raise UserError(f"{' and '.join(ways)} are both given", "give one of them")
    if arguments.plain_model and (arguments.run or arguments.which):
        raise UserError("--model is a model without a run, but --run or --which is given too", "give one of them")
    for_files = {
        "--output": arguments.output,
        "--whole-file": arguments.whole_file,
        "--limit": arguments.prompts,
        "--num-samples": arguments.num_samples,
    }
    given = [name for name, value in for_files.items() if value not in (None, False)]
    if arguments.input is None and given:
        raise UserError(f"{' and '.join(given)} would do nothing without --input", "give --input FILE, or leave it out")


def settings_of(arguments: argparse.Namespace, config: "Config") -> "InferSection":
    """config.infer with the flags over it, held to the same bounds."""
    from pydantic import ValidationError

    from scripts.utils.schema import InferSection

    names = ("temperature", "top_p", "max_new_tokens", "seed", "num_samples", "stop", "json_schema")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        return InferSection.model_validate({**config.infer.model_dump(), **given})
    except ValidationError as error:
        lines = [f"--{str(e['loc'][0]).replace('_', '-')} is {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise UserError("\n       ".join(lines), "see configs/base.yaml, section infer") from error


def load(arguments: argparse.Namespace, run: str, stop: Sequence[str]) -> Trained:
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
    # a control token is never a part of an answer's text, so it has to be stopped at by its id
    tokens = trained.tokenizer.get_added_vocab()
    return replace(trained, stop_ids=sorted({*trained.stop_ids, *(tokens[text] for text in stop if text in tokens)}))


def choose_system(arguments: argparse.Namespace, trained: Trained) -> str | None:
    """--system, else the one that the run was trained with; said aloud either way."""
    if arguments.system is not None:
        console.note("infer", "system message: as given" if arguments.system else "no system message")
        return arguments.system or None
    text = stamp.system_of(trained.stamp)
    if text:
        console.note("infer", f"system message, as in training: {console_line(text)}")
    return text


def console_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}…"


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


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
