"""export-gguf: the run's whole model as one GGUF file, for llama.cpp and what is built on it, proven by its logits.

Writes outputs/<run>/gguf/<run>-<quant>.gguf with the tokenizer and the chat template in it. Every tensor is read back and
compared; the model made of them answers on real rows beside the original; and where xllamacpp is installed, the file runs
in that runtime and its log-probabilities, token ids and chat text are compared too.
"""

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, exporting, files, gguf_export, gguf_model, gguf_proof, stamp
from scripts.utils.config import run_name
from scripts.utils.errors import RefusedError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make export-gguf RUN=try1",
        "make export-gguf RUN=try1 QUANT=q8_0",
        "make export-gguf RUN=try1 CONVERTER=~/llama.cpp/convert_hf_to_gguf.py",
    ]
    parser = command.new_parser(
        "export-gguf", "The run's model as one GGUF file.", examples, keys=["run", "raw"], of_run=True
    )
    quant = command.from_make("QUANT") or "f16"
    parser.add_argument("--quant", default=quant, metavar="KIND", help=f"{', '.join(gguf_export.KINDS)} (now {quant})")
    parser.add_argument(
        "--converter",
        default=command.from_make("CONVERTER"),
        metavar="FILE",
        help="llama.cpp's own convert_hf_to_gguf.py on this disk, to write the file in our place",
    )
    command.add_force(parser)
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    run, quant = run_name(config, arguments.config), arguments.quant.lower()
    stamp.require(run)
    converter = Path(arguments.converter).expanduser() if arguments.converter else None
    if converter is None:
        gguf_export.check_kind(quant)
    elif not converter.is_file():
        raise UserError(f"CONVERTER: there is no file {converter.absolute()}", "name llama.cpp's convert_hf_to_gguf.py")
    gguf_model.package()
    whole = exporting.whole_model(run)
    folder = stamp.run_folder(run) / "gguf"
    target = folder / f"{run}-{files.check_name(quant, 'QUANT')}.gguf"
    note_path = target.with_suffix(".json")
    wanted = {"model": whole.hash, "quant": quant, "converter": converter and files.sha256_file(converter)}
    if not arguments.force and (known := up_to_date(target, note_path, wanted, config.merge.tolerance)):
        console.note("export-gguf", f"up to date ({target}; FORCE=1 runs it again)")
        report(target, known)
        return
    if target.exists() and not note_path.is_file():
        raise RefusedError(
            f"{target.absolute()} was not written by this step, and it is not replaced",
            "move it away, then run it again",
        )
    with files.file_lock(folder / ".lock", wait_seconds=0, what=f"exporting run {run!r}"):
        report(target, export(whole, target, note_path, wanted, converter, config))


def up_to_date(target: Path, note_path: Path, wanted: dict[str, Any], tolerance: float) -> dict[str, Any] | None:
    if not target.is_file() or not note_path.is_file():
        return None
    note: dict[str, Any] = files.read_json(note_path)
    proofs = [note["proof"][name] for name in ("logits", "runtime") if name in note["proof"]]
    whole = note["wanted"] == wanted and note["size"] == target.stat().st_size
    return note if whole and all(proof["mean_difference"] <= tolerance for proof in proofs) else None


def export(
    whole: exporting.Whole,
    target: Path,
    note_path: Path,
    wanted: dict[str, Any],
    converter: Path | None,
    config: "Config",
) -> dict[str, Any]:
    """Write beside the target, prove, and only then let the file take its place."""
    quant = wanted["quant"]
    plan: gguf_export.Plan | None
    try:
        plan = gguf_export.plan(whole.folder, whole.tokenizer, whole.template, whole.stop_ids, whole.run)
    except UserError:
        if converter is None:
            raise
        plan = None  # a kind of model that only the converter knows
    weights = sum(path.stat().st_size for path in whole.folder.glob("*.safetensors"))
    gguf_proof.check_space(target, weights, quant)
    console.note("export-gguf", f"{whole.folder} as {quant}, by {converter or 'our own writer on the gguf package'}")
    for left in target.parent.glob(".new-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with files.disk_errors(target), tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as temporary:
        new = Path(temporary) / target.name
        with files.disk_errors(
            target
        ):  # once more in here: whether the disk is full shows while the unfinished file is there
            if converter:
                convert(converter, whole.folder, new, quant)
            else:
                assert plan is not None
                gguf_export.write(plan, new, quant)
            proof = gguf_proof.prove(whole, new, plan, quant, config.merge.tolerance)
            gc.collect()
            files.usual_mode(new)
            note = {
                "wanted": wanted,
                "size": new.stat().st_size,
                "proof": proof,
                "tolerance": config.merge.tolerance,
                "at": stamp.now(),
            }
            files.write_json(
                note_path, {**note, "wanted": None}
            )  # the file is ours from now on, and not up to date yet
            new.replace(target)
            files.sync_folder(target.parent)
    files.write_json(note_path, note)
    return note


def convert(converter: Path, folder: Path, target: Path, quant: str) -> None:
    """Run the user's converter with this Python; raises ``UserError`` with its last words where it fails."""
    words = [sys.executable, str(converter.absolute()), str(folder.absolute()), "--outfile", str(target.absolute())]
    done = subprocess.run([*words, "--outtype", quant], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode or not target.is_file():
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}, and no file"]
        raise UserError(
            f"{converter}: the converter failed: {said[-1][:300]}",
            "run it by hand to see all it says, or leave CONVERTER out for our own writer",
        )


def report(target: Path, note: dict[str, Any]) -> None:
    proof = note["proof"]
    lines: list[tuple[str, object]] = [("file", f"{target}, {console.size(note['size'])}")]
    lines += [(name, gguf_proof.sentence(name, proof.get(name))) for name in ("tensors", "logits", "runtime")]
    lines.append(("next", f"llama-server -m {target}, or make export-ollama RUN={target.parent.parent.name}"))
    console.facts(f"{target.name} is written", lines)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
