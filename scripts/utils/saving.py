"""The Trainer's checkpoints: sealed, without pickles, written by one process for all, and read back to the last digit."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerState

from scripts.utils import adapters, checkpoints, files, hardware, ranks, sharding, stamp, training_state
from scripts.utils.encoding import Encoded
from scripts.utils.errors import MachineError, RefusedError
from scripts.utils.schedule import Schedule

if TYPE_CHECKING:
    from scripts.utils.schema import Config

_COUNTERS = ("divisor", "skipped", "steps_since", "skipped_since", "skipped_total")


@dataclass
class RunState:
    """What the loop counts beside the Trainer's own state."""

    tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    tokens_since: int = 0
    stop_signal: int | None = None
    asked_signal: int | None = None  # what this process was sent; with several ranks they agree on stop_signal first
    divisor: int = 1  # micro batches are cut into this many parts since one did not fit into memory
    skipped: int = 0  # steps in a row that were passed over for a loss that was not finite
    steps_since: int = 0  # steps since the last line of the log, and how many of them were passed over
    skipped_since: int = 0
    skipped_total: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    overdue: bool = False  # it is time for a checkpoint in between: with several ranks by the first one's clock


class SavingTrainer(Trainer):
    """Trainer that saves and resumes as scripts/utils/checkpoints.py says. ``identity`` goes into every seal."""

    def __init__(
        self,
        *,
        config: "Config",
        schedule: Schedule,
        examples: Sequence[Encoded],
        machine: hardware.Hardware,
        identity: dict[str, Any],
        **options: Any,
    ) -> None:
        self.config, self.schedule, self.examples = config, schedule, examples
        self.machine, self.identity = machine, identity
        self.run_state = RunState()
        self.sharded = False  # each pass is one of all ranks (FSDP, ZeRO), so all must do as many
        self.checkpoint_bytes = 0
        self._staging: Path | None = None
        self._restored: dict[str, Any] = {}
        self._collected: dict[str, Any] = {}  # what all ranks put together for the first one to save
        super().__init__(**options)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if ranks.world_size() > 1:
            self._collected = self._collect()
            if ranks.is_first():
                self._save_alone(model, trial)
            self._collected = {}
            ranks.barrier()  # what rank 0 could not save, no rank goes on from
        else:
            self._save_alone(model, trial)
        self.run_state.saved_at = time.monotonic()

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is planned after this step, from 1."""
        train, last = self.config.train, step >= len(self.schedule.steps)
        return last or self.schedule.is_due(step, train.save_strategy, train.save_steps)

    def is_overdue(self) -> bool:
        """Whether the last checkpoint is so long ago that one is made in between those that are planned."""
        train = self.config.train
        if not train.save_minutes or train.save_strategy == "no":
            return False
        return time.monotonic() - self.run_state.saved_at >= train.save_minutes * 60

    def _collect(self) -> dict[str, Any]:
        """What lies on more than one rank: shards of weights and of optimizer states, random numbers."""
        whole = {}
        if self.sharded:
            whole = {"weights": self.whole_weights(), "optimizer": sharding.whole(self.optimizer.state_dict())}
        return {**whole, "random": ranks.gather_objects(training_state.random_state())}

    def whole_weights(self) -> dict[str, Any] | None:
        """The trained weights put together, where they are in shards; all ranks must ask for them."""
        return sharding.whole(adapters.trained_state(self.model)) if self.sharded else None

    def _save_alone(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with checkpoints.landing(folder, self.state.global_step, self.identity, self.checkpoint_bytes) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
        chosen = self.state.best_model_checkpoint
        best = folder / Path(chosen).name if chosen else folder / name
        checkpoints.point(folder, "last", folder / name)
        checkpoints.point(folder, "best", best)
        keep = self.config.train.save_total_limit
        checkpoints.rotate(folder, keep=keep, best=best, in_between=lambda step: not self.saves_at(step))
        stamp.reached(folder.name, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # adapters (or the tuned model) only: the stock training_args.bin is a pickle and may hold a hub token
        adapters.save_weights(self.model, Path(output_dir or self.args.output_dir), self._collected.get("weights"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)  # the Trainer's own would gather the frozen weights too

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        tree = {
            "optimizer": self._collected.get("optimizer") or self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": training_state.random_state(),
            # the loss since the last line of the log: the next line is a mean over all its steps, also after a resume
            "loss_since": (float(self._tr_loss), self._globalstep_last_logged),
            "counters": {name: getattr(self.run_state, name) for name in _COUNTERS},
        }
        if others := self._collected.get("random", [])[1:]:
            tree["random_of_other_ranks"] = others
        training_state.save(Path(output_dir), tree)

    def _save_scaler(self, output_dir: str) -> None:
        """In the training state."""

    def _save_rng_state(self, output_dir: str) -> None:
        """In the training state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapters.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._restored = training_state.load(Path(checkpoint))
        try:
            optimizer = self._restored["optimizer"]
            if self.is_fsdp_enabled:
                optimizer = sharding.optimizer_as_in(optimizer, self.optimizer)
            self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(self._restored["scheduler"])
            if self._restored["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
                self.accelerator.scaler.load_state_dict(self._restored["scaler"])
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(
                f"{checkpoint}: its optimizer state is of another model: {error}", "move this checkpoint away"
            ) from error

    def _load_scaler(self, checkpoint: str | None) -> None:
        """With the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self._restored:
            return
        saved = [self._restored["random"], *self._restored.get("random_of_other_ranks", [])]
        if ranks.is_first() or len(saved) == ranks.world_size():
            training_state.set_random_state(saved[ranks.rank()])
        else:  # another number of processes than it was saved with
            training_state.seed_anew(self.args.seed, ranks.rank(), self.state.global_step)

    def restore_counters(self) -> None:
        """Put back what the Trainer resets at its start. Call when training begins."""
        seen = self.schedule.steps[: self.state.global_step]
        self.run_state.tokens = sum(len(self.examples[i].ids) for step in seen for row in step for i in row)
        if self._restored:
            loss, since = self._restored["loss_since"]
            self._tr_loss = torch.tensor(loss, device=self.args.device)
            self._globalstep_last_logged = since
            for name in _COUNTERS:
                setattr(self.run_state, name, self._restored["counters"][name])

    def load_ended(self, checkpoint: Path) -> None:
        """Take weights and state from a checkpoint whose training was over, so that it can be handed over."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.restore_counters()

    def try_save(self) -> None:
        """Save and read back the weights once, before the first step; know from then on what a checkpoint takes.

        Raises ``MachineError`` when the folder cannot be written or is too small for what the run will save.
        """
        folder = Path(self.args.output_dir)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Adam keeps two numbers a weight
        states = sum(p.numel() for p in trained) * (
            2 if "8bit" in hardware.optimizer_name(self.config, self.machine) else 8
        )
        weights = sum(value.nbytes for value in adapters.trained_state(self.model).values())
        need = self.checkpoint_bytes = weights + states
        whole = self.whole_weights()
        if not ranks.is_first():
            return
        # those that rotation keeps, the best one, one in the making, and the export
        total = (self.config.train.save_total_limit + 2) * need + weights + 2**24
        free = shutil.disk_usage(folder).free
        if free < total:
            raise MachineError(
                f"{folder.absolute()}: this run will need about {total:,} bytes, {free:,} are free",
                "free some space, lower train.save_total_limit, or move outputs/ to a larger disk (a link will do)",
            )
        with files.disk_errors(folder / "checkpoint-0", need):
            staging = Path(tempfile.mkdtemp(prefix=".checkpoint-0.", suffix=".saving", dir=folder))
        try:
            with files.disk_errors(folder / "checkpoint-0", need):
                adapters.save_weights(self.model, staging, whole)
                checkpoints.hashes(staging)
                adapters.load_weights(self.model, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
