"""The training loop: transformers' Trainer over a schedule that is fixed before the first step."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from scripts.utils import adapters, checkpoints, files, hardware
from scripts.utils.encoding import IGNORE, Encoded, Loss, batch_loss
from scripts.utils.errors import DivergedError, MachineError
from scripts.utils.schedule import Schedule, Steps, row_budget

if TYPE_CHECKING:
    from scripts.utils.schema import Config


@dataclass
class RunState:
    """What the loop counts beside the Trainer's own state."""

    tokens: int = 0
    trained_tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    tokens_since: int = 0
    stop_signal: int | None = None


class SFTTrainer(Trainer):
    """Trainer whose batch is a whole optimizer step, normalised by the trained tokens in it.

    The weight of a token is then the same whatever the packing and accumulation. Validation runs the same packed loss
    as training; checkpoints are sealed and verified (scripts/utils/checkpoints.py).
    """

    def __init__(
        self,
        *,
        config: "Config",
        schedule: Schedule,
        examples: Sequence[Encoded],
        val: Sequence[Encoded],
        row_names: Sequence[str],
        machine: hardware.Hardware,
        pad_id: int,
        loss: Loss,
        metrics_file: Path,
        **options: Any,
    ) -> None:
        self.config, self.schedule, self.examples, self.val = config, schedule, examples, val
        self.row_names, self.machine, self.loss, self.metrics_file = row_names, machine, loss, metrics_file
        self.run_state = RunState()
        self._staging: Path | None = None
        dataset = Steps(schedule, examples, config.train.packing, pad_id)
        super().__init__(train_dataset=dataset, **options)
        self.model_accepts_loss_kwargs = True  # losses are normalised here, not once more by the Trainer

    def get_train_dataloader(self) -> Any:
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: items[0]
        )
        return self.accelerator.prepare(loader)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate wants one dict of tensors, and is shown nowhere

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        count = sum(int((row["shift_labels"] != IGNORE).sum()) for row in inputs)
        total = torch.zeros((), device=self.args.device)
        for row in inputs:
            row = self._prepare_inputs(row)
            with self.compute_loss_context_manager():
                loss = self.loss(model, row) / max(count, 1)
            if not torch.isfinite(loss):
                raise self._diverged(float(loss.detach()))
            self.accelerator.backward(loss)
            total += loss.detach()
            mask = row.get("attention_mask")
            self._count(int(mask.sum()) if mask is not None else row["input_ids"].numel())
        self.run_state.trained_tokens += count
        return total

    def _diverged(self, loss: float) -> DivergedError:
        step = self.state.global_step
        names = [self.row_names[i] for row in self.schedule.steps[step] for i in row]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return DivergedError(
            f"the loss became {loss} at step {step + 1}; rows: {shown}",
            "lower train.learning_rate, or look at these rows; the last good checkpoint is kept",
        )

    def _count(self, tokens: int) -> None:
        self.run_state.tokens += tokens
        self.run_state.tokens_since += tokens

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add what a person wants to see, write metrics.jsonl, and print the step's line."""
        state = self.run_state
        logs.pop("total_flos", None)
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = round(state.tokens_since / max(now - state.since, 1e-9), 1)
            logs["tokens_seen"] = state.tokens
            logs["memory_gib"] = round(hardware.memory_in_use(self.machine) / 2**30, 3)
            state.since, state.tokens_since = now, 0
        epoch = self.state.global_step / max(self.schedule.steps_per_epoch, 1)
        self.state.epoch = epoch
        super().log(logs, *args, **options)
        with files.disk_errors(self.metrics_file), self.metrics_file.open("ab") as file:
            file.write(files.json_line({"step": self.state.global_step, **logs, "epoch": round(epoch, 4)}))

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Loss and perplexity over the trained tokens of the val rows, by the packed path that training takes."""
        with self.compute_loss_context_manager():
            budget = row_budget(self.config)
            total, count = batch_loss(self.model, self.val, budget, packing=self.config.train.packing, loss=self.loss)
        loss = total / max(count, 1)
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
        self.run_state.since, self.run_state.tokens_since = time.monotonic(), 0  # evaluation is not training speed
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: Any = control
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        with checkpoints.landing(folder, self.state.global_step) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
        best = self.state.best_model_checkpoint
        checkpoints.rotate(folder, keep=self.config.train.save_total_limit, best=Path(best) if best else None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # adapters (or the tuned model) only: the stock training_args.bin is a pickle and may hold a hub token
        adapters.save_weights(self.model, Path(output_dir or self.args.output_dir))


def optimizer_name(config: "Config", machine: hardware.Hardware) -> str:
    """TrainingArguments' name for train.optimizer; raises ``MachineError`` for 8-bit states without CUDA."""
    wanted = config.train.optimizer
    if wanted == "auto":
        if machine.device != "cuda":
            return "adamw_torch"
        return "paged_adamw_8bit" if machine.memory < 12 * 2**30 else "adamw_torch_fused"
    if "8bit" in wanted and machine.device != "cuda":
        raise MachineError(
            f"train.optimizer {wanted} needs an NVIDIA card, this is {machine.name}", "use train.optimizer: auto"
        )
    return {"adamw_8bit": "adamw_bnb_8bit"}.get(wanted, wanted)


def trackers(config: "Config") -> list[str] | str:
    """tracking.report_to as the Trainer takes it; raises ``MachineError`` for a tracker that is not installed."""
    for name in config.tracking.report_to:
        if find_spec(name) is None:
            raise MachineError(
                f"tracking.report_to: {name} is not installed", f"make install EXTRAS={name}, or take it out"
            )
    return list(config.tracking.report_to) or "none"


def training_arguments(
    config: "Config", folder: Path, machine: hardware.Hardware, precision: str, steps: int
) -> TrainingArguments:
    """The config as the Trainer wants it. Saving and evaluating are driven by ``Rhythm``."""
    train = config.train
    warmup = train.warmup if train.warmup >= 1 else math.ceil(train.warmup * steps)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=int(warmup),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=optimizer_name(config, machine),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=machine.device == "cpu",
        seed=train.seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to=trackers(config),
        run_name=folder.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=machine.device == "cuda",
        push_to_hub=False,
    )
