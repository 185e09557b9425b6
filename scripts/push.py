"""push: the run's adapter, merged model or GGUF files to the hub, with a model card made from its stamp.

Only files on an allow-list go, never data, samples, logs or secrets; the repository is private unless PUBLIC=1. --dry-run
shows every file and sends nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import adapters, command, console, exporting, hub_push, model_card, stamp
from scripts.utils.config import run_name
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

KINDS = ("adapter", "merged", "gguf")


def build_parser() -> argparse.ArgumentParser:
    examples = ["make push RUN=try1 REPO=ada/try1 DRY_RUN=1", "make push RUN=try1 REPO=ada/try1 WHICH=merged"]
    parser = command.new_parser("push", "A run's model to the hub.", examples, keys=["run", "raw"], of_run=True)
    parser.add_argument(
        "--repo", default=command.from_make("REPO"), help="owner/name on the hub, made where it is missing"
    )
    which = command.from_make("WHICH") or "adapter"
    parser.add_argument(
        "--which", default=which, help=f"adapter (or the fully tuned model), merged or gguf (now {which})"
    )
    for flag, text in (("dry-run", "show every file, send nothing"), ("public", "for everybody to see")):
        variable = flag.replace("-", "_").upper()
        parser.add_argument(
            f"--{flag}", action="store_true", default=command.truthy(command.from_make(variable)), help=text
        )
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    run = run_name(config, arguments.config)
    facts = stamp.require(run)
    if arguments.which not in KINDS:
        raise UserError(f"WHICH={arguments.which} cannot be pushed", f"known are: {', '.join(KINDS)}")
    if not arguments.repo:
        raise UserError("no repository is named", "REPO=owner/name")
    hub_push.check_repo(arguments.repo)
    what, folder = source(run, facts, arguments.which)
    card = model_card.card(run, facts, what=what, evaluation=model_card.evaluation_of(run), where=arguments.repo)
    hub_push.check_text(card, "the model card")
    files = [hub_push.File("README.md", card.encode()), *hub_push.chosen(folder, what)]
    files = [for_everybody(file, facts) for file in files]
    show(arguments.repo, files, what, public=arguments.public)
    if what == "adapter" and facts["model"]["name"].startswith(("/", "~", ".")):
        console.warn(
            f"the base is a folder of this machine ({facts['model']['name']}): nobody else can load the adapter; WHICH=merged can"
        )
    if arguments.dry_run:
        console.result("dry run: nothing was sent; the card is\n")
        console.result(card)
        return
    url = hub_push.push(arguments.repo, files, public=arguments.public, message=f"{run}, trained with SFT-Play")
    console.facts(
        f"run {run} is on the hub",
        [("address", url), ("files", len(files)), ("seen by", "everybody" if arguments.public else "you (private)")],
    )


def source(run: str, facts: dict[str, Any], which: str) -> tuple[model_card.What, Path]:
    """What is pushed and the folder that it lies in, proven to be this run's."""
    if which == "adapter":
        folder = stamp.adapter_folder(run)
        full = facts["tuning"]["mode"] == "full"
        needed = folder / ("config.json" if full else "adapter_config.json")
        if not needed.is_file():
            raise UserError(
                f"run {run!r} has no adapter (looked for {needed.absolute()})", f"finish it: make train RUN={run}"
            )
        adapters.verify(folder, facts.get("result", {}).get("export"))
        return ("full" if full else "adapter"), folder
    whole = exporting.whole_model(run)
    if which == "merged":
        return "merged", whole.folder
    folder = stamp.run_folder(run) / "gguf"
    found = list(folder.glob("*.gguf"))
    if not found:
        raise UserError(
            f"run {run!r} has no GGUF file (looked in {folder.absolute()})", f"run: make export-gguf RUN={run}"
        )
    for path in found:
        exporting.check_gguf(run, path, whole)
    return "gguf", folder


def for_everybody(file: hub_push.File, facts: dict[str, Any]) -> hub_push.File:
    """The adapter's settings with the base by its name on the hub, where it has one, instead of its place in a clone."""
    published = model_card.PUBLISHED.get(facts["model"]["name"])
    if file.name != "adapter_config.json" or not published or isinstance(file.content, bytes):
        return file
    settings = {**json.loads(file.content.read_text(encoding="utf-8")), "base_model_name_or_path": published}
    return hub_push.File(file.name, (json.dumps(settings, indent=2) + "\n").encode())


def show(repo: str, files: list[hub_push.File], what: str, *, public: bool) -> None:
    console.table(
        f"{what} to {repo}, {'PUBLIC' if public else 'private'}",
        ("file", "size"),
        [
            *((file.name, console.size(file.size)) for file in files),
            ("together", console.size(sum(f.size for f in files))),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
