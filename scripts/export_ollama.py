"""export-ollama: a Modelfile for the run's model, with its chat template as a Go template, stop tokens and parameters.

Writes outputs/<run>/ollama/Modelfile, which names the run's GGUF file, or its merged folder where there is none. What the
template makes of sample conversations is compared with the run's own; Ollama itself is not needed and not run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, exporting, files, stamp
from scripts.utils.config import run_name
from scripts.utils.errors import UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

NOTE = "sft-ollama.json"


def build_parser() -> argparse.ArgumentParser:
    examples = ["make export-ollama RUN=try1", "make export-ollama RUN=try1 QUANT=q8_0"]
    parser = command.new_parser("export-ollama", "A Modelfile for Ollama.", examples, keys=["run", "raw"])
    parser.add_argument(
        "--quant",
        default=command.from_make("QUANT"),
        metavar="KIND",
        help="the GGUF file to name (default: the newest; the merged folder where there is none)",
    )
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    from scripts.utils import go_template, modelfile

    run = run_name(config, arguments.config)
    stamp.require(run)
    model = find_model(run, arguments.quant)
    whole = exporting.whole_model(run)
    if model is not None:
        exporting.check_gguf(run, model, whole)
    form, notes = go_template.form_of(whole.template, whole.tokenizer)
    target = stamp.run_folder(run) / "ollama"
    source = os.path.relpath(model or whole.folder, target)
    settings = modelfile.Settings(
        temperature=config.infer.temperature,
        top_p=config.infer.top_p,
        context=context(whole),
        stops=[
            text for number in whole.stop_ids if '"' not in (text := whole.tokenizer.decode([number])) and text.strip()
        ],
        system=stamp.system_of(whole.facts),
    )
    comments = [
        f"run {run}: {whole.facts['model']['name']}, tuned with SFT-Play",
        f"cd {target} && ollama create {run} -f Modelfile && ollama run {run}",
        *notes,
    ]
    text = modelfile.text_of(source, form, settings, comments=comments, bos=begin_token(whole))
    modelfile.read(text)
    with files.replaced_folder(target, NOTE) as new:
        files.write_text(new / "Modelfile", text)
        files.write_json(new / NOTE, {"run": run, "model": whole.hash, "from": source, "at": stamp.now()})
    for note in notes:
        console.warn(note)
    report(run, target, source, len(go_template.samples()), whole.template.source)


def find_model(run: str, quant: str | None) -> Path | None:
    """The GGUF file that the run exported; None: the merged folder has to do."""
    folder = stamp.run_folder(run) / "gguf"
    found = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime)
    if quant:
        wanted = folder / f"{run}-{quant.lower()}.gguf"
        if wanted not in found:
            raise UserError(
                f"run {run!r} has no GGUF file of that kind (looked for {wanted.absolute()})",
                f"run: make export-gguf RUN={run} QUANT={quant.lower()}",
            )
        return wanted
    return found[-1] if found else None


def context(whole: exporting.Whole) -> int:
    """As many tokens as a row of training had at most, doubled for the talk that grows, within the model's own limit."""
    limit = files.read_json(whole.folder / "config.json").get("max_position_embeddings") or 1 << 30
    return int(min(limit, max(2048, 2 * whole.facts["render"]["max_length"])))


def begin_token(whole: exporting.Whole) -> str:
    """The begin token where Ollama adds it by itself, as the GGUF file (or the tokenizer of the folder) says."""
    from scripts.utils import gguf_tokenizer

    return whole.tokenizer.bos_token if gguf_tokenizer.adds_bos(whole.tokenizer, whole.template) else ""


def report(run: str, target: Path, source: str, samples: int, template: str) -> None:
    console.facts(
        f"a Modelfile for run {run} is written",
        [
            ("file", str(target / "Modelfile")),
            ("model", source),
            ("template", f"{template}, as a Go template: the same text for all {samples} sample conversations"),
            ("not tried", "Ollama itself was not run"),
            ("next", f"cd {target} && ollama create {run} -f Modelfile"),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
