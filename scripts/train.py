"""train: rendered rows → an adapter (or a fully tuned model), with a stamp that says what really ran.

Reads data/rendered/<name>, writes outputs/<run> (stamp, config, checkpoints, TensorBoard, metrics.jsonl) and, at the
end, adapters/<run>. Stopped at any moment, the same command goes on from the newest whole checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import (
    backends,
    chat,
    checkpoints,
    command,
    console,
    files,
    hardware,
    model_store,
    rendered,
    stages,
    stamp,
)
from scripts.utils.config import run_name, to_yaml
from scripts.utils.errors import DivergedError, Interrupted, MachineError, RefusedError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make train CONFIG=configs/quickstart.yaml",
        'make train RUN=try1 SET="train.epochs=1 train.lr=1e-4"',
        "sft-train --config configs/run_bnb.yaml --run try1 --resume must",
        "sft-train --show-stamp try1",
    ]
    parser = command.new_parser(
        "train", "Fine-tune on the rendered rows.", examples, keys=["run", "raw", "model", "backend"]
    )
    parser.add_argument("--resume", choices=["auto", "never", "must"], default=command.from_make("RESUME") or "auto")
    parser.add_argument("--show-stamp", metavar="RUN", help="print what really ran in RUN, and end")
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> None:
    if arguments.show_stamp:
        show_stamp(arguments.show_stamp)
        return
    run = run_name(config, arguments.config)
    folder = stamp.run_folder(run)
    want, manifest = rendered.require_current(config)
    if not manifest["splits"]["train"]:
        raise UserError(f"{want.folder}: no rows to train on", "run: make process with more data")
    choice = backends.choose(config)  # before anything heavy is imported
    if choice.actual == "unsloth":
        backends.import_unsloth()
    with files.file_lock(folder / ".lock", wait_seconds=0, what=f"run {run!r}"):
        starts_before = len((stamp.read(run) or {}).get("starts", []))
        try:
            train(run, folder, arguments.resume, config, choice, want, manifest)
        except Exception as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            starts = (stamp.read(run) or {}).get("starts", [])
            step = from_step = 0
            if len(starts) > starts_before:
                step, from_step = starts[-1]["step"], starts[-1]["from_step"]
                if not isinstance(error, Interrupted):
                    stamp.end(run, step=step, how=f"failed: {reason}")
            expected = isinstance(error, UserError | RefusedError | Interrupted | DivergedError)
            if choice.actual == "unsloth" and step == from_step and not expected:
                if config.tuning.fallback == "never":
                    raise MachineError(f"Unsloth failed: {reason}", "set tuning.fallback: auto") from error
                backends.restart_with_bitsandbytes(f"it failed before its first step ended: {reason}")
            raise backends.as_out_of_memory(error) from error


def train(
    run: str,
    folder: Path,
    resume: str,
    config: "Config",
    choice: backends.BackendChoice,
    want: rendered.Wanted,
    manifest: dict[str, Any],
) -> None:
    machine = hardware.detect()
    precision = hardware.choose_precision(config.train, machine)
    model_files = model_store.resolve(config.model.name, config.model.revision)
    identity = identity_of(config, choice, precision.actual, model_store.content_hash(model_files.path), manifest)
    checkpoint = decide_start(run, folder, resume, identity)
    if checkpoint == "finished":
        return
    say_choices(choice, precision, machine)

    tokenizer = chat.load_tokenizer(model_files.path)
    template = chat.choose_template(tokenizer, config.render.template)
    tokenizer.chat_template = template.text
    rows = {split: list(rendered.read_rows(want.folder, split)) for split in ("train", "val")}
    examples = {split: rendered.to_examples(tokenizer, rows[split]) for split in rows}
    if not examples["val"]:
        console.note("train", "no val rows: no evaluation while training, no best checkpoint, no early stopping")
    console.note("train", f"{want.folder}: {len(rows['train']):,} train rows, {len(rows['val']):,} val rows")

    loaded = backends.load_for_training(config, model_files.path, choice.actual, precision.actual, machine)
    console.note(
        "train",
        f"{config.model.name}: {config.tuning.mode}, {loaded.trainable:,} of {loaded.total:,} weights train; attention "
        f"{loaded.attention}" + ("; gradient checkpointing" if loaded.checkpointing else ""),
    )
    from_step = checkpoints.step_of(Path(checkpoint)) if checkpoint else 0
    stamp.begin(
        run,
        {
            "backend": {"requested": choice.requested, "actual": choice.actual, "fallback_reason": choice.reason},
            "precision": asdict(precision),
            "attention": loaded.attention,
            "quantisation": loaded.quantisation,
            "gradient_checkpointing": loaded.checkpointing,
            "hardware": {
                "device": machine.device,
                "name": machine.name,
                "memory": machine.memory,
                "cuda": machine.driver,
            },
            "versions": stamp.library_versions(),
            "git": stamp.git_state(files.REPO_ROOT),
            "model": {
                "name": config.model.name,
                "revision": model_files.revision,
                "path_hash": identity["model"],
            },
            "tuning": {
                "mode": config.tuning.mode,
                "target_modules": loaded.target_modules,
                **config.lora.model_dump(include={"r", "alpha", "dropout"}),
            },
            "render": {
                "template": template.source,
                "template_hash": template.hash,
                "max_length": config.render.max_length,
            },
            "data": {
                "name": want.folder.name,
                "hash": stages.data_hash(manifest),
                "splits": manifest["splits"],
                "tokens": manifest["tokens"],
                "stage": want.source.manifest["step"],
            },
            "style": manifest["settings"]["style"],
            "seed": config.train.seed,
            "identity": identity,
        },
        from_step=from_step,
    )
    files.write_text(folder / "config.yaml", to_yaml(config))
    fit(run, folder, config, loaded, tokenizer, examples, rows, machine, precision.actual, choice, checkpoint)


def fit(
    run: str,
    folder: Path,
    config: "Config",
    loaded: backends.TrainingModel,
    tokenizer: Any,
    examples: dict[str, list[Any]],
    rows: dict[str, list[dict[str, Any]]],
    machine: hardware.Hardware,
    precision: str,
    choice: backends.BackendChoice,
    checkpoint: str | None,
) -> None:
    """The loop itself, then the export of the best (or last) weights and the summary."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    from transformers import PrinterCallback

    from scripts.utils import adapters
    from scripts.utils.callbacks import Report, Rhythm
    from scripts.utils.schedule import make_schedule
    from scripts.utils.training import SFTTrainer, training_arguments

    schedule = make_schedule(config, examples["train"])
    trainer = SFTTrainer(
        model=loaded.model,
        args=training_arguments(config, folder, machine, precision, len(schedule.steps)),
        config=config,
        schedule=schedule,
        examples=examples["train"],
        val=examples["val"],
        row_names=[f"{row['source']['file']}:{row['source']['line']}" for row in rows["train"]],
        machine=machine,
        pad_id=tokenizer.pad_token_id or 0,
        unsloth=choice.actual == "unsloth",
        metrics_file=folder / "metrics.jsonl",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Rhythm(lambda: trainer))
    trainer.add_callback(Report(len(schedule.steps)))
    console.note(
        "train",
        f"run {run}: {len(schedule.steps):,} steps, {schedule.steps_per_epoch:,} an epoch; TensorBoard files in {folder / 'tensorboard'}",
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        step = trainer.state.global_step
        progress = stamp.require(run)
        progress["starts"][-1]["step"] = step
        stamp.write(run, progress)
    if trainer.run_state.stop_signal is not None and step < len(schedule.steps):
        stamp.end(run, step=step, how="interrupted")
        code = 128 + trainer.run_state.stop_signal
        saved = checkpoints.listed(folder)
        where = f"saved in {saved[0]}" if saved else "nothing was saved"
        raise Interrupted(
            f"stopped at step {step}/{len(schedule.steps)}, {where}", "type the same command to go on", exit_code=code
        )
    best = adapters.take_best(trainer)
    adapters.export(run, loaded.model, tokenizer, config, examples["train"], trainer.state)
    stamp.end(run, step=step, how="finished", result=adapters.result_of(trainer, best))
    summarise(run, trainer, best)


def identity_of(
    config: "Config", choice: backends.BackendChoice, precision: str, model_hash: str, manifest: dict[str, Any]
) -> dict[str, Any]:
    """What decides the loss curve: a resumed run must have all of it in common with its start."""
    train = config.train
    shape = None if config.tuning.mode == "full" else config.lora.model_dump()
    return {
        "backend": choice.actual,
        "model": model_hash,
        "mode": config.tuning.mode,
        "lora": shape,
        "precision": precision,
        "data": stages.data_hash(manifest),
        "template": manifest["template"]["sha256"],
        "max_length": config.render.max_length,
        **{
            key: getattr(train, key)
            for key in (
                "seed batch_size gradient_accumulation packing optimizer learning_rate scheduler warmup weight_decay "
                "max_grad_norm epochs max_steps"
            ).split()
        },
    }


def decide_start(run: str, folder: Path, resume: str, identity: dict[str, Any]) -> str | None:
    """None: start from the beginning; a path: resume from it; 'finished': nothing is left to do.

    Raises ``RefusedError`` when the run's earlier start does not match what is asked for now.
    """
    known = stamp.read(run)
    if known is None:
        if resume == "must":
            raise RefusedError(
                f"run {run!r} has nothing to resume (no {stamp.path_of(run)})", "leave RESUME out to start it"
            )
        return None
    if resume == "never":
        raise RefusedError(
            f"run {run!r} exists already ({folder.absolute()})", "choose another name with RUN=…, or leave RESUME out"
        )
    if changed := stamp.changed_identity(known, identity):
        lines = "\n".join(f"         {key}: then {then}, now {now}" for key, then, now in changed)
        raise RefusedError(
            f"run {run!r} was started with other settings:\n{lines}",
            "start another run with RUN=…, or restore the old values",
        )
    if known["status"] == "finished":
        console.note(
            "train",
            f"run {run} is already finished; nothing was trained. To train again: make train RUN={run}-2 (same CONFIG)",
        )
        return "finished"
    checkpoint, passed_over = checkpoints.newest_whole(folder)
    for line in passed_over:
        console.warn(f"passed over {line}")
    if checkpoint is None:
        if resume == "must":
            raise RefusedError(
                f"run {run!r} has no whole checkpoint to resume from", "leave RESUME out to start it again"
            )
        console.note("train", f"run {run} was started before but has no whole checkpoint: starting again")
        return None
    console.note("train", f"run {run}: going on from {checkpoint}")
    return str(checkpoint)


def say_choices(
    choice: backends.BackendChoice, precision: hardware.PrecisionChoice, machine: hardware.Hardware
) -> None:
    if choice.reason:
        console.warn(
            f"Unsloth was asked for, but {choice.reason}. This run uses bitsandbytes instead, slower and otherwise the "
            "same; the stamp says so. tuning.fallback: never refuses instead."
        )
    elif choice.actual == "unsloth" and machine.device == "cpu":
        console.note("train", "Unsloth is no faster on a CPU; bitsandbytes is the usual choice here")
    if precision.changed:
        console.warn(f"precision {precision.requested} was asked for; training in {precision.actual}: {precision.why}")
    console.note("train", f"{choice.actual} on {machine.name} in {precision.actual} ({precision.why})")


def summarise(run: str, trainer: Any, best: str | None) -> None:
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    console.facts(
        f"run {run} is trained",
        [
            ("steps", f"{trainer.state.global_step:,} ({trainer.run_state.tokens:,} tokens)"),
            ("train loss", f"{losses[0]['loss']:.4f} → {losses[-1]['loss']:.4f}" if losses else "–"),
            ("val loss", f"{evals[0]:.4f} → {evals[-1]:.4f}, best {min(evals):.4f}" if evals else "– (no val rows)"),
            ("kept", f"the best checkpoint ({best})" if best else "the last step"),
            ("adapter", f"{stamp.adapter_folder(run)}"),
            ("next", f"make eval RUN={run}   make infer RUN={run}   make merge RUN={run}"),
        ],
    )


def show_stamp(run: str) -> None:
    import yaml

    console.result(yaml.safe_dump(stamp.require(run), sort_keys=False, allow_unicode=True).rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
