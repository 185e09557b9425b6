"""train: rendered rows → an adapter (or a fully tuned model), with a stamp that says what really ran.

Reads data/rendered/<name>, writes outputs/<run> (stamp, config, checkpoints, TensorBoard, metrics.jsonl) and, at the
end, adapters/<run>. Stopped at any moment, the same command goes on from the newest whole checkpoint.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import (
    backend_choice,
    backends,
    chat,
    checkpoints,
    command,
    console,
    files,
    hardware,
    hparams,
    initial,
    launching,
    loss_choice,
    model_folder,
    model_store,
    planning,
    ranks,
    rendered,
    resume,
    sharding,
    stamp,
    token_store,
    trackers,
    train_words,
)
from scripts.utils.config import run_name
from scripts.utils.encoding import Encoded
from scripts.utils.errors import DivergedError, Interrupted, RefusedError, UserError
from scripts.utils.loss import Exact, Loss

if TYPE_CHECKING:
    from scripts.utils.schema import Config
    from scripts.utils.training import SFTTrainer


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make train CONFIG=configs/quickstart.yaml",
        'make train RUN=try1 SET="train.epochs=1 train.lr=1e-4"',
        "make train NPROC=2",
        "sft-train --config configs/run_bnb.yaml --run try1 --resume must",
        "sft-train --show-stamp try1",
    ]
    parser = command.new_parser(
        "train", "Fine-tune on the rendered rows.", examples, keys=["run", "raw", "model", "backend"]
    )
    parser.add_argument("--resume", choices=["auto", "never", "must"], default=command.from_make("RESUME") or "auto")
    parser.add_argument("--show-stamp", metavar="RUN", help="print what really ran in RUN, and end")
    return parser


def start(arguments: argparse.Namespace, config: "Config", words: Sequence[str]) -> int:
    """One process trains; or, with NPROC, this one starts and watches several that do."""
    wanted = launching.layout()
    if wanted.world == 1 or ranks.is_rank() or arguments.show_stamp:
        work(arguments, config)
        ranks.leave()
        return 0
    launching.check(wanted, config)
    sharding.require_engine(config)
    rendered.require_current(config)
    return launching.run(wanted, Path(__file__), words)


def work(arguments: argparse.Namespace, config: "Config") -> None:
    if arguments.show_stamp:
        train_words.show_stamp(arguments.show_stamp)
        return
    console.outlast_readers()
    run = run_name(config, arguments.config)
    folder = stamp.run_folder(run)
    trackers.check_installed(config.tracking.report_to)
    want, manifest = rendered.require_current(config)
    if not manifest["splits"]["train"]:
        raise UserError(f"{want.folder}: no rows to train on", "run: make process with more data")
    choice = choose_backend(config, run, folder)  # before anything heavy is imported
    ranks.connect()
    lock = files.file_lock(folder / ".lock", wait_seconds=0, what=f"run {run!r}")
    with lock if ranks.is_first() else contextlib.nullcontext():
        ranks.require_one_disk(folder / ".lock")
        starts_before = len((stamp.read(run) or {}).get("starts", []))
        try:
            if choice.actual == "unsloth":
                backends.import_unsloth(choice.xformers)
            train(run, folder, arguments.resume, config, choice, want, manifest)
        except Exception as problem:
            error = ranks.as_lost(problem)
            if not ranks.is_first():
                raise backends.as_out_of_memory(error) from problem
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            starts = (stamp.read(run) or {}).get("starts", [])
            step = from_step = 0
            if len(starts) > starts_before:
                step, from_step = starts[-1]["step"], starts[-1]["from_step"]
                if not isinstance(error, Interrupted):
                    stamp.end(run, step=step, how=f"failed: {reason}")
            expected = isinstance(error, UserError | RefusedError | Interrupted | DivergedError)
            # what Unsloth has begun, only Unsloth goes on with
            if (
                choice.actual == "unsloth"
                and step == from_step == 0
                and not expected
                and not checkpoints.listed(folder)
            ):
                reason = f"it failed before its first step ended: {reason}"
                backend_choice.restart_with_bitsandbytes(config, choice, reason)
            raise backends.as_out_of_memory(error) from problem


def choose_backend(config: "Config", run: str, folder: Path) -> backend_choice.BackendChoice:
    if config.tuning.backend == "bitsandbytes":
        return backend_choice.BackendChoice("bitsandbytes", "bitsandbytes")
    model = model_store.resolve(config.model.name, config.model.revision, tokenizer_only=True).path
    earlier = (stamp.read(run) or {}).get("backend") if checkpoints.listed(folder) else None
    return backend_choice.choose(config, model, earlier)


def train(
    run: str,
    folder: Path,
    resume_mode: str,
    config: "Config",
    choice: backend_choice.BackendChoice,
    want: rendered.Wanted,
    manifest: dict[str, Any],
) -> None:
    """Choose, load and stamp; then train and hand over."""
    with ranks.first_goes_first():
        machine = hardware.detect()
        model_files = model_store.resolve(config.model.name, config.model.revision)
        model_hash = model_store.content_hash(model_files.path)
    earlier = (stamp.read(run) or {}).get("precision", {}).get("actual")
    precision = hardware.choose_precision(config, machine, earlier)
    sharding.check(config, precision.actual)
    wanted = config
    config = sharding.without_levers(config)
    config, plan, no_plan = planning.resolve(config, model_files.path, machine, precision.actual, choice.actual)
    if (
        config.tuning.mode != "qlora"
        and "8bit" not in hardware.optimizer_name(config, machine)
        and choice.actual == "bitsandbytes"
    ):
        backends.spare_bitsandbytes(model_files.path)
    init = initial.find(config.tuning.init_adapter, config.lora, model_hash) if config.tuning.init_adapter else None
    identity = resume.identity_of(
        config, choice.actual, precision.actual, model_hash, manifest, init.hash if init else None
    )
    ranks.require_same(identity, "rows, model or settings")
    checkpoint, finished = ranks.from_first(lambda: whence(run, folder, resume_mode, identity))
    if finished:
        console.note(
            "train",
            f"run {run} is already finished; nothing was trained. Another: make train RUN={run}-2 (same CONFIG)",
        )
        return
    train_words.say_choices(choice, precision, machine)
    train_words.say_plan(plan, no_plan, wanted)
    train_words.say_ranks(config)

    tokenizer = chat.load_tokenizer(model_files.path)
    template = chat.choose_template(tokenizer, config.render.template)
    tokenizer.chat_template = template.text
    with ranks.first_goes_first():
        examples = {split: token_store.examples(want, manifest, split, tokenizer) for split in ("train", "val")}
    console.note("train", f"{want.folder}: {len(examples['train']):,} train rows, {len(examples['val']):,} val rows")
    if not examples["val"]:
        refuse_without_val(config, want.folder)
        console.note("train", "no val rows: no evaluation while training, no best checkpoint, no early stopping")

    loaded = backends.load_for_training(
        config, model_files.path, choice.actual, precision.actual, machine, choice.xformers
    )
    console.note(
        "train",
        f"{config.model.name}: {config.tuning.mode}, {loaded.trainable:,} of {loaded.total:,} weights train; attention "
        f"{loaded.attention}" + ("; gradient checkpointing" if loaded.checkpointing else ""),
    )
    if init and not checkpoint:
        initial.put(loaded.model, init)
        console.note("train", f"beginning with the adapter in {init.folder}")
    loss, exact = loss_choice.choose_loss(
        config, loaded.model, examples["train"], precision.actual, fused=choice.actual == "unsloth"
    )
    if config.train.packing and not exact.packing:
        config = config.model_copy(update={"train": config.train.model_copy(update={"packing": False})})
    facts = {
        "backend": choice.facts(),
        "precision": asdict(precision),
        "attention": loaded.attention,
        "quantisation": loaded.quantisation,
        "packing": config.train.packing,
        "engine": asdict(exact),
        "parallel": launching.facts(sharding.engine(config)),
        "gradient_checkpointing": loaded.checkpointing,
        "optimizer": hardware.optimizer_name(config, machine),
        "plan": plan.facts() if plan else None,
        "hardware": asdict(machine),
        "versions": stamp.library_versions(*sharding.packages(config)),
        "git": stamp.git_state(files.REPO_ROOT),
        "model": {
            "name": config.model.name,
            "revision": model_files.revision if model_files.kind == "hub" else None,
            "path_hash": model_hash,
        },
        "tuning": {
            "mode": config.tuning.mode,
            "target_modules": loaded.target_modules,
            "lora": identity["lora"],
            "init_adapter": config.tuning.init_adapter,
        },
        "tokenizer_hash": model_folder.tokenizer_hash(model_files.path),
        "render": {"template": template.source, "template_hash": template.hash, "max_length": config.render.max_length},
        "data": {
            "name": want.folder.name,
            "hash": identity["data"],
            "splits": manifest["splits"],
            "tokens": manifest["tokens"],
            "stage": want.source.manifest["step"],
        },
        "style": manifest["settings"]["style"],
        "system": manifest.get("system"),
        "seed": config.train.seed,
        "config_hash": files.sha256_json(config.model_dump()),
        "identity": identity,
    }
    with ranks.first_goes_first():
        if ranks.is_first():
            stamp.begin(run, facts, from_step=checkpoints.step_of(checkpoint) if checkpoint else 0)
            hparams.write_config(folder, config.model_dump())
            resume.cut_metrics(folder / "metrics.jsonl", checkpoints.step_of(checkpoint) if checkpoint else 0)
    names = token_store.RowNames(want.folder, "train", len(examples["train"]))
    trainer = make_trainer(
        folder, config, loaded.model, loss, exact, tokenizer, examples, names, machine, precision.actual, identity
    )
    fit(run, folder, config, trainer, checkpoint)
    hand_over(run, config, trainer, tokenizer, examples["train"])


def whence(run: str, folder: Path, mode: str, identity: dict[str, Any]) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, and whether nothing is left to do."""
    checkpoint = resume.decide_start(run, folder, mode, identity)
    if resume.is_finished(run) and not resume.is_extension(run, identity) and (not checkpoint or handed_over(run)):
        return checkpoint, True
    checkpoints.remove_leftovers(folder)
    return checkpoint, False


def handed_over(run: str) -> bool:
    """Whether a finished run's adapter is there and whole; else it is exported once more."""
    from scripts.utils import adapters

    try:
        adapters.verify(stamp.adapter_folder(run), stamp.require(run).get("result", {}).get("export"))
    except RefusedError as error:
        console.warn(f"{error.message}; exporting it once more from the run's checkpoints")
        return False
    return True


def refuse_without_val(config: "Config", folder: Path) -> None:
    """A best checkpoint or an early stop that was asked for by name cannot be had without val rows."""
    train = config.train
    if train.load_best_model_at_end is True or train.early_stopping_patience:
        key = "load_best_model_at_end" if train.load_best_model_at_end is True else "early_stopping_patience"
        raise UserError(
            f"{folder}: no val rows, and train.{key} needs them",
            "raise data.val_fraction or add rows; or set load_best_model_at_end: auto and early_stopping_patience: 0",
        )


def make_trainer(
    folder: Path,
    config: "Config",
    model: Any,
    loss: Loss,
    exact: Exact,
    tokenizer: Any,
    examples: dict[str, Sequence[Encoded]],
    row_names: Sequence[str],
    machine: hardware.Hardware,
    precision: str,
    identity: dict[str, Any],
) -> "SFTTrainer":
    from transformers import PrinterCallback

    from scripts.utils.callbacks import Report, Rhythm, Tracked
    from scripts.utils.schedule import make_schedule
    from scripts.utils.trainer_settings import training_arguments
    from scripts.utils.training import SFTTrainer

    schedule = make_schedule(config, examples["train"])
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(config, folder, machine, precision, len(schedule.steps)),
        config=config,
        schedule=schedule,
        examples=examples["train"],
        val=examples["val"],
        row_names=row_names,
        machine=machine,
        pad_id=tokenizer.pad_token_id or 0,
        loss=loss,
        exact=exact,
        metrics_file=folder / "metrics.jsonl",
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Rhythm(lambda: trainer))
    trainer.add_callback(Report(len(schedule.steps)))
    record = trackers.record_of(stamp.require(folder.name), config.model_dump(), config.tracking.project)
    trainer.tracked = Tracked(trackers.names_of(config.tracking.report_to), record)
    trainer.add_callback(trainer.tracked)
    return trainer


def fit(run: str, folder: Path, config: "Config", trainer: "SFTTrainer", checkpoint: Path | None) -> None:
    """The loop itself, from the checkpoint on; raises ``Interrupted`` where a signal ended it."""
    steps = len(trainer.schedule.steps)
    if checkpoint and resume.has_ended(checkpoint, steps, config.train.early_stopping_patience):
        console.note("train", f"run {run}: all steps are done, {checkpoint} is handed over")
        trainer.load_ended(checkpoint)
        return
    console.note(
        "train",
        f"run {run}: {steps:,} steps, {trainer.schedule.steps_per_epoch:,} an epoch; TensorBoard files in {folder / 'tensorboard'}",
    )
    try:
        with files.disk_errors(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.tracked.close()
        step = trainer.state.global_step
        if ranks.is_first():
            stamp.reached(run, step)
    if trainer.run_state.stop_signal is not None and step < steps:
        if ranks.is_first():
            stamp.end(run, step=step, how="interrupted")
        saved = checkpoints.listed(folder)
        where = f"saved in {saved[0]}" if saved else "nothing was saved"
        raise Interrupted(
            f"stopped at step {step}/{steps}, {where}",
            "type the same command to go on",
            exit_code=128 + trainer.run_state.stop_signal,
        )


def hand_over(run: str, config: "Config", trainer: "SFTTrainer", tokenizer: Any, examples: Sequence[Encoded]) -> None:
    """Export the best (or last) weights, prove that they load, and sum up."""
    from scripts.utils import adapters, self_test

    best = adapters.take_best(trainer)
    check = self_test.prepare(run, trainer, examples) if config.train.self_test else None
    whole = trainer.whole_weights()
    ranks.leave()
    if not ranks.is_first():
        return
    export = adapters.export(run, trainer.model, tokenizer, config, examples, trainer.state, check, whole)
    result = {**adapters.result_of(trainer, best), "export": export}
    stamp.end(run, step=trainer.state.global_step, how="finished", result=result)
    hparams.fill(run)
    train_words.summarise(run, trainer, best)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return command.run(build_parser(), lambda arguments, config: start(arguments, config, words), argv)


if __name__ == "__main__":
    raise SystemExit(main())
