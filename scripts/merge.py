"""merge: the run's adapter into its base model's weights, as one model folder, and the proof that it answers alike.

Writes outputs/<run>/merged. The merged model is loaded afresh from disk and its log-probabilities on real rows are
compared with those of base plus adapter; beyond merge.tolerance nothing lands and the exit code is 3. A model that
does not fit into the memory is merged tensor by tensor, and each tensor is read back and compared.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files, merge_layers, merge_proof, merging, stamp
from scripts.utils.config import run_name
from scripts.utils.errors import RefusedError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

NOTE = "sft-merge.json"


def build_parser() -> argparse.ArgumentParser:
    examples = ["make merge RUN=try1", 'make merge RUN=try1 SET="merge.dtype=fp16"', "sft-merge --run try1 --force"]
    parser = command.new_parser(
        "merge", "Adapter and base as one model, proven.", examples, keys=["run", "raw"], of_run=True
    )
    parser.add_argument(
        "--if-adapter", action="store_true", help="end well where the run is fully tuned and there is nothing to merge"
    )
    command.add_force(parser)
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    run = run_name(config, arguments.config)
    facts = stamp.require(run)
    adapter = stamp.adapter_folder(run)
    if facts["tuning"]["mode"] == "full":
        if arguments.if_adapter:
            return
        raise UserError(
            f"run {run!r} was fully tuned: there is no adapter to merge",
            f"the whole model lies in {adapter.absolute()}",
        )
    merging.check_shard_size(config.merge.shard_size)
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"run {run!r} has no adapter (looked for {weights.absolute()})", f"finish it: make train RUN={run}"
        )
    target = stamp.run_folder(run) / "merged"
    wanted = {
        "adapter_sha256": files.sha256_file(weights),
        "base": {name: facts["model"].get(name) for name in ("name", "revision", "path_hash")},
        "dtype": config.merge.dtype,
        "shard_size": config.merge.shard_size,
    }
    if not arguments.force and (known := up_to_date(target, wanted, config.merge.tolerance)):
        console.note("merge", f"up to date ({target}; FORCE=1 runs it again)")
        report(run, target, known)
        return
    with files.file_lock(stamp.run_folder(run) / ".merge.lock", wait_seconds=0, what=f"merging run {run!r}"):
        report(run, target, merge(run, facts, target, wanted, config))


def up_to_date(target: Path, wanted: dict[str, Any], tolerance: float) -> dict[str, Any] | None:
    """The note of an earlier merge of the same adapter and settings, within today's tolerance, with all its files."""
    if not (target / NOTE).is_file():
        return None
    known = files.read_json(target / NOTE)
    whole = all(
        (target / name).is_file() and (target / name).stat().st_size == size for name, size in known["files"].items()
    )
    within = known["proof"].get("mean_difference", 0.0) <= tolerance  # tensors that were compared are equal
    return known if known["wanted"] == wanted and whole and within else None


def merge(run: str, facts: dict[str, Any], target: Path, wanted: dict[str, Any], config: "Config") -> dict[str, Any]:
    """Merge, save, load again, compare, and only then let the folder land."""
    source = merging.prepare(run, facts, config.merge.dtype, config.merge.by_layer)
    console.note(
        "merge",
        f"{facts['model']['name']} with {stamp.adapter_folder(run)}; saved in {source.dtype} ({source.dtype_why})",
    )
    if source.quantised:
        console.note("merge", "QLoRA: the adapter was trained on NF4 weights, so it is merged into those, dequantised")
    how = f"one tensor at a time ({source.by_layer_why})" if source.by_layer else "with the whole model in memory"
    console.note("merge", f"computing in {source.compute} on {source.device}, {how}")
    texts = merge_proof.rows("merge", facts, source.tokenizer, source.template) if source.proof else []
    merging.check_space(target, source)
    with files.replaced_folder(target, NOTE) as new:
        proof = by_layer(source, new, texts, config) if source.by_layer else in_memory(source, new, texts, config)
        if source.proof:
            judge(proof, config.merge.tolerance)
        note = {
            "wanted": wanted,
            "saved_dtype": source.dtype,
            "quantised_base": source.quantised,
            "computed_in": source.compute,
            "by_layer": source.by_layer,
            "rows": len(texts),
            "proof": proof,
            "tolerance": config.merge.tolerance,
            "at": stamp.now(),
            "files": {path.name: path.stat().st_size for path in sorted(new.iterdir())},
        }
        files.write_json(new / NOTE, note)
    return note


def in_memory(source: "merging.Source", new: Path, texts: list[list[int]], config: "Config") -> dict[str, float]:
    """Merge and save the whole model, load it again and compare."""
    model = merging.load_adapter_model(source)
    reference = merge_proof.reference(model, texts)
    model = merging.merged(source, model)
    merging.save(model, source, new, config.merge.shard_size)
    del model
    return compare(source, new, reference)


def by_layer(source: "merging.Source", new: Path, texts: list[list[int]], config: "Config") -> dict[str, float]:
    """Merge tensor by tensor; compared by logits where the model fits into the memory at all, else by tensors."""
    plan = merge_layers.plan(source)
    reference = merge_proof.reference(merging.load_adapter_model(source), texts) if source.proof else []
    gc.collect()
    merge_layers.write(source, plan, new, config.merge.shard_size)
    if source.proof:
        return compare(source, new, reference)
    console.note("merge", "too large to be run here: every tensor is read back and compared instead of the logits")
    return merge_layers.verify(source, plan, new)


def compare(source: "merging.Source", new: Path, reference: "list[merge_proof.Reference]") -> dict[str, float]:
    gc.collect()
    console.note("merge", f"comparing the saved model with the adapter model on {len(reference)} rows")
    return merge_proof.compare(merging.load_merged(new, source), reference)


def judge(proof: dict[str, float], tolerance: float) -> None:
    """Raises ``RefusedError`` where merged and adapter model differ beyond the tolerance."""
    if not proof["mean_difference"] <= tolerance:  # a NaN is no proof either
        raise RefusedError(
            f"the merged model is not the adapter model: log-probabilities differ by {proof['mean_difference']:.4f} on average "
            f"(at most {proof['max_difference']:.4f}), merge.tolerance is {tolerance:g}; nothing was written",
            "try merge.dtype: fp32, which rounds nothing away; if that differs too, report it as a bug",
        )
    if proof["mean_difference"] > proof["adapter_effect"] / 2:
        console.warn(
            f"the adapter changes the model's log-probabilities by {proof['adapter_effect']:.4f} on average, and rounding to the "
            f"saved precision by {proof['mean_difference']:.4f}: much of what was trained is lost; merge.dtype: fp32 keeps it"
        )


def report(run: str, target: Path, note: dict[str, Any]) -> None:
    proof = note["proof"]
    size = sum(size for name, size in note["files"].items() if name.endswith(".safetensors"))
    lines = [
        ("weights", f"{note['saved_dtype']}, {console.size(size)}"),
        ("model", str(target)),
        (
            "next",
            f"make infer RUN={run} WHICH=merged, make export-gguf RUN={run}, or load the folder with transformers",
        ),
    ]
    if "tensors" in proof:
        console.facts(
            f"run {run} is merged; its tensors were compared, its answers were not",
            [
                (
                    "tensors",
                    f"all {proof['tensors']:,} read back equal base and adapter to the bit; the adapter changed {proof['changed']:,}",
                ),
                ("logits", "not compared: the model does not fit into this machine's memory"),
                *lines,
            ],
        )
        return
    console.facts(
        f"run {run} is merged, and answers as its adapter does",
        [
            (
                "difference",
                f"{proof['mean_difference']:.5f} on average, {proof['max_difference']:.5f} at most (log-probabilities of likely tokens)",
            ),
            (
                "tolerance",
                f"{note['tolerance']:g} on average; the adapter itself changes them by {proof['adapter_effect']:.5f}",
            ),
            (
                "likeliest token",
                f"the same at {proof['greedy_agreement']:.2%} of {proof['positions']:,} positions in {note['rows']} rows",
            ),
            *lines,
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
