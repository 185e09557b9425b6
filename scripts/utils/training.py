"""The training loop: transformers' Trainer over a schedule that is fixed before the first step."""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from scripts.utils import console, files, hardware, ranks, sharding, training_state
from scripts.utils.attention import by_segment
from scripts.utils.encoding import Encoded
from scripts.utils.errors import DivergedError, MachineError
from scripts.utils.lean_lora import lean
from scripts.utils.loss import Exact, Loss, batch_loss
from scripts.utils.offload import activations_on_host
from scripts.utils.packing import Row, rows_in_order, split_indices, to_padded, to_row
from scripts.utils.saving import SavingTrainer
from scripts.utils.schedule import Schedule, Step, Steps, row_budget

if TYPE_CHECKING:
    from scripts.utils.schema import Config


class SFTTrainer(SavingTrainer):
    """Trainer whose batch is a whole optimizer step, normalised by the trained tokens in it.

    The weight of a token is then the same whatever the packing and accumulation. Validation runs the same packed loss
    as training; checkpoints are sealed and verified (scripts/utils/checkpoints.py).
    """

    def __init__(
        self,
        *,
        config: "Config",
        schedule: Schedule,
        machine: hardware.Hardware,
        val: Sequence[Encoded],
        row_names: Sequence[str],
        pad_id: int,
        loss: Loss,
        exact: Exact,
        metrics_file: Path,
        **options: Any,
    ) -> None:
        self.val, self.row_names, self.pad_id = val, row_names, pad_id
        self.loss, self.exact, self.metrics_file = loss, exact, metrics_file
        self.chooses_best = bool(val) and config.train.chooses_best
        self._offloads = config.train.activation_offload and machine.device == "cuda"
        self.tracked: Any = None  # the callback that tells the trackers
        self.zero: Any = None  # DeepSpeed's engine, behind what the Trainer takes for its optimizer
        super().__init__(config=config, schedule=schedule, machine=machine, train_dataset=Steps(schedule), **options)
        if sharding.engine(config) == "ddp":
            sharding.leave_frozen_alone(self.model)
        self.model_accepts_loss_kwargs = True  # losses are normalised here, not once more by the Trainer

    def get_train_dataloader(self) -> Any:
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: items[0]
        )
        # every rank sees each step whole, and takes its share of the rows (_share)
        return loader if ranks.world_size() > 1 else self.accelerator.prepare(loader)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if sharding.let_accelerate_shard_on_cpu(self.accelerator, getattr(self.args, "fsdp_plugin_args", None)):
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: Any = None) -> Any:
        made = super().create_optimizer(model)
        if sharding.engine(self.config) == "deepspeed":
            from scripts.utils.zero import ZeroOptimizer

            how = {"stage": sharding.zero_stage(), "clip": self.args.max_grad_norm, "device": self.args.device.type}
            made = self.zero = self.optimizer = ZeroOptimizer(made, self._loss_of_row, **how)
        return made

    def _wrap_model(self, model: Any, *args: Any, **options: Any) -> Any:
        # what is wrapped already, Accelerate does not give to DDP
        return self.zero.engine if self.zero else super()._wrap_model(model, *args, **options)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate wants one dict of tensors, and is shown nowhere

    def store_flos(self) -> None:
        """Nothing: the Trainer's own asks all ranks, also where one saves alone."""

    def training_step(self, model: Any, inputs: Step, num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step's forward and backward passes; the whole step again in halves when memory runs out."""
        model = self.model  # DDP's wrapper has its turn when the gradients are there
        model.train()
        draws = training_state.random_state() if self.config.lora.dropout else None
        while True:
            try:
                with by_segment(model, self.exact.segments, self.exact.kernel), lean(model, self.exact.lean):
                    total, tokens = self._accumulate(inputs)
                break
            except Exception as error:
                if not is_out_of_memory(error) or self.sharded:  # shards: the others have gone on with this pass
                    raise
                self._halve(error)
            # outside the except block, which would keep the failed pass's tensors alive
            model.zero_grad()
            if draws is not None:
                training_state.set_random_state(draws)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._count(tokens)
        self.run_state.steps_since += 1
        self.run_state.overdue = self.is_overdue()
        if ranks.world_size() > 1 and not self.sharded:
            sharding.reduce_gradients(self.model_wrapped)
        finite = all_finite([total, *self._gradients()])  # the step's one wait for the device
        if ranks.world_size() > 1:
            total, finite = self._agree(total, finite)
        reason = None
        if not finite:
            finite = bool(torch.isfinite(total))
            reason = "a gradient became NaN or infinite" if finite else f"the loss became {float(total)}"
        if reason is None:
            self.run_state.skipped = 0
            return total
        return self._pass_over(reason)

    def _accumulate(self, inputs: Step) -> tuple[torch.Tensor, int]:
        """Gradients and loss of this rank's share, over the trained tokens of the whole step; and the step's tokens."""
        count = sum(self.examples[i].trained_tokens for row in inputs for i in row)
        total = torch.zeros((), device=self.args.device)
        share = self._share(inputs)
        for number, (indices, times) in enumerate(share):
            row = self._prepare_inputs(self._to_row(indices))
            last = number == len(share) - 1
            loss = self.zero.loss_of_row(row, last) if self.zero else self._loss_of_row(row)
            loss = loss / max(count, 1) * times
            total += loss.detach()
            # each engine takes the mean over the ranks; wanted is the sum
            (self.zero or self.accelerator).backward(loss * ranks.world_size())
        return total, sum(len(self.examples[i].ids) for row in inputs for i in row)

    def _gradients(self) -> list[torch.Tensor]:
        """Those that must be finite, this rank's part of them where they are in parts."""
        if self.zero:
            return self.zero.gradients()
        if self.args.fp16:
            return []  # its scaler expects that they overflow now and then, and passes over them itself
        return [sharding.local(p.grad) for p in self.model.parameters() if p.grad is not None]

    def _loss_of_row(self, row: Row) -> torch.Tensor:
        with self.compute_loss_context_manager(), activations_on_host(self.model, self._offloads):
            return self.loss(self.model, row)

    def _share(self, inputs: Step) -> list[tuple[list[int], int]]:
        """This rank's micro batches of a step, and how often each counts: 0 where a rank must keep in step with others."""
        count, parts = ranks.world_size(), self.run_state.divisor
        shares = [
            [part for row in self._rows(inputs[number::count]) for part in self._parts(row, parts)]
            for number in range(count)
        ]
        mine = shares[ranks.rank()]
        idle = max(map(len, shares)) - len(mine) if self.sharded else 0
        return [(part, 1) for part in mine] + [(self._parts(inputs[0], parts)[0], 0)] * idle

    def _agree(self, total: torch.Tensor, finite: bool) -> tuple[torch.Tensor, bool]:
        """The step's loss over all ranks, and whether all is finite on all; they settle what all of them do alike."""
        state = self.run_state
        found = ranks.gather([float(total), finite, state.divisor, state.asked_signal or 0, state.overdue])
        losses, finites, divisors, signals, overdue = zip(*found, strict=True)
        state.overdue = bool(overdue[0])
        if max(divisors) > state.divisor:
            state.divisor = int(max(divisors))
            console.warn(
                f"another process ran out of memory at step {self.state.global_step + 1}: every micro batch is cut into "
                f"{state.divisor} parts from here on. The step's batch, and so the result, stays the same"
            )
        if any(signals) and state.stop_signal is None:
            state.stop_signal = int(next(filter(None, signals)))
            console.note("train", "all processes stop after this step and save")
        return torch.tensor(sum(losses), device=total.device, dtype=total.dtype), all(finites)

    def _rows(self, inputs: Step) -> Step:
        """A step's micro batches; in fewer rows where a beginning that they share counts once: the same step, computed faster."""
        if not self.exact.shared or not inputs:
            return inputs
        return rows_in_order(self.examples, [i for row in inputs for i in row], row_budget(self.config), shared=True)

    def _to_row(self, indices: list[int]) -> Row:
        examples = [self.examples[i] for i in indices]
        return to_row(examples, self.exact.shared) if self.exact.packing else to_padded(examples, self.pad_id)

    def _parts(self, row: list[int], parts: int) -> list[list[int]]:
        return split_indices(row, parts, [len(self.examples[i].ids) for i in row])

    def _halve(self, error: Exception) -> None:
        """Cut micro batches into twice as many parts; raise when each is a single example already."""
        if self.run_state.divisor >= max(len(row) for row in self._rows(self.schedule.steps[self.state.global_step])):
            length = self.config.render.max_length
            raise MachineError(
                f"out of memory on a single example of up to {length:,} tokens: {str(error).splitlines()[0]}",
                f"set render.max_length to {length // 2}, or train.gradient_checkpointing: true, or take a smaller model; "
                "earlier checkpoints are kept",
            ) from error
        self.run_state.divisor *= 2
        console.warn(
            f"out of memory at step {self.state.global_step + 1}: every micro batch is cut into {self.run_state.divisor} "
            "parts from here on. The step's batch, and so the result, stays the same; it is slower. To avoid it: "
            + (
                f"train.pack_length: {row_budget(self.config) // self.run_state.divisor}"
                if self.config.train.packing
                else f"train.batch_size: {max(1, self.config.train.micro_batch // self.run_state.divisor)}"
            )
        )

    def _pass_over(self, reason: str) -> torch.Tensor:
        """Stop, or leave the step's gradients out, as train.non_finite says."""
        step = self.state.global_step
        indices = [i for row in self.schedule.steps[step] for i in row]
        shown = ", ".join(self.row_names[i] for i in indices[:5])  # a name is read from the file of rows
        shown += f" and {len(indices) - 5} more" if len(indices) > 5 else ""
        self.run_state.skipped += 1
        if self.config.train.non_finite == "stop" or self.run_state.skipped >= MOST_SKIPPED:
            again = f", {self.run_state.skipped} steps in a row" if self.run_state.skipped > 1 else ""
            raise DivergedError(
                f"{reason} at step {step + 1}{again}; rows: {shown}",
                "lower train.learning_rate, or look at these rows (train.non_finite: skip passes over such a step); "
                "the last good checkpoint is kept",
            )
        console.warn(f"{reason} at step {step + 1}: the step is passed over; rows: {shown}")
        self.run_state.skipped_since += 1
        self.run_state.skipped_total += 1
        for parameter in (p for p in self.model.parameters() if p.requires_grad):
            # an optimizer leaves alone what has no gradient; the scaler of fp16 wants to see one to pass over
            parameter.grad = torch.full_like(parameter, torch.inf) if self.args.fp16 else None
        if self.zero:
            self.zero.leave_out()
        return torch.zeros((), device=self.args.device)

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.zero.norm() if self.zero else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.zero and grad_norm is None:
            return self.zero.norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def refuse_broken_weights(self) -> None:
        """After an optimizer step: raise ``DivergedError`` when a trained weight is no longer a number: such a step must never be saved."""
        if not all_finite([sharding.local(p.detach()) for p in self.model.parameters() if p.requires_grad]):
            raise DivergedError(
                f"a trained weight became NaN or infinite at step {self.state.global_step + 1}",
                "lower train.learning_rate; the last good checkpoint is kept",
            )

    def _count(self, tokens: int) -> None:
        self.run_state.tokens += tokens
        self.run_state.tokens_since += tokens

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add what a person wants to see, write metrics.jsonl, and print the step's line."""
        state = self.run_state
        logs.pop("total_flos", None)
        if "loss" in logs:
            if state.skipped_since:  # the mean is over the steps that were made
                made = state.steps_since - state.skipped_since
                logs["skipped_steps"] = state.skipped_since
                loss = logs.pop("loss")
                if made:
                    logs["loss"] = loss * state.steps_since / made
            state.steps_since = state.skipped_since = 0
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = round(state.tokens_since / max(now - state.since, 1e-9), 1)
            logs["tokens_seen"] = state.tokens
            logs["memory_gib"] = round(hardware.memory_in_use(self.machine) / 2**30, 3)
            state.since, state.tokens_since = now, 0
        epoch = self.state.global_step / max(self.schedule.steps_per_epoch, 1)
        self.state.epoch = epoch
        super().log(logs, *args, **options)
        if not ranks.is_first():
            return
        with files.disk_errors(self.metrics_file), self.metrics_file.open("ab") as file:
            file.write(files.json_line({"step": self.state.global_step, **logs, "epoch": round(epoch, 4)}))

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Loss and perplexity over the trained tokens of the val rows, by the packed path that training takes."""
        with self.compute_loss_context_manager():
            budget = row_budget(self.config) // self.run_state.divisor
            deal = partial(ranks.deal, even=self.sharded) if ranks.world_size() > 1 else None
            part, count = batch_loss(self.model, self.val, budget, loss=self.loss, exact=self.exact, deal=deal)
        loss = sum(values[0] for values in ranks.gather([part])) / max(count, 1)
        if not math.isfinite(loss):  # before it is logged: no NaN reaches the disk
            raise DivergedError(
                f"the validation loss became {loss} at step {self.state.global_step}",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
        self.run_state.since, self.run_state.tokens_since = time.monotonic(), 0  # evaluation is not training speed
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: Any = control
        return metrics

    def begin_sharing(self) -> None:
        """What several ranks do differently from one, once the engine has taken the model. Call when training begins."""
        if ranks.world_size() < 2:
            return
        in_shards = sharding.is_sharded(self.model)
        self.sharded = in_shards or self.zero is not None
        if in_shards and self.exact.chunked:  # the other way calls the model itself
            self.loss = sharding.through_root(self.model, self.loss)
        if ranks.rank() and not self._restored:
            training_state.seed_anew(self.args.seed, ranks.rank(), self.state.global_step)


MOST_SKIPPED = 5  # so many steps in a row without a finite loss are no accident


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every number in every tensor is finite, with one look at the device."""
    return not tensors or bool(torch.isfinite(torch.stack(torch._foreach_norm(list(tensors)))).all())


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
