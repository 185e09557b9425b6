"""What a run will take, decided before its model loads: micro batch, checkpointing, where the embeddings lie, and does it fit.

``resolve`` turns every ``auto`` that memory decides into a value; ``make plan`` and the first lines of train show the same plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import architecture, memory, ranks
from scripts.utils.architecture import Architecture
from scripts.utils.console import size
from scripts.utils.errors import UserError
from scripts.utils.hardware import Hardware, Precision, optimizer_name

if TYPE_CHECKING:
    from scripts.utils.schema import Config

# the share of the device that a run may fill: allocators leave gaps, and a CPU's memory belongs to the others too (assumed)
USABLE = {"cuda": 0.95, "mps": 0.75, "cpu": 0.8}
_LARGEST_BATCH = 16
_WORTHWHILE = 0.99  # a change that leaves more than this share of the peak is not proposed


@dataclass(frozen=True)
class Plan:
    """``config`` has no ``auto`` left that memory decides. ``usable``: bytes that the run may take."""

    config: "Config"
    shape: Architecture
    run: memory.Setting
    memory: memory.Memory
    machine: Hardware
    backend: str

    @property
    def usable(self) -> int:
        sharers = self.run.processes if self.machine.device == "cpu" else 1  # a card is one process's own
        return round(self.machine.memory * USABLE[self.machine.device] / sharers)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable

    def verdict(self) -> str:
        said = f"predicted peak {size(self.memory.peak)} of {size(self.usable)} usable on {self.machine.name}"
        left = self.usable - self.memory.peak
        return f"fits: {said}, {size(left)} left" if self.fits else f"does not fit: {said}, {size(-left)} too much"

    def choices(self) -> str:
        train = self.config.train
        words = [f"{self.run.tokens:,} tokens a micro batch", f"{train.gradient_accumulation} a step"]
        words += ["gradient checkpointing" if self.run.checkpointing else "no gradient checkpointing"]
        words += ["input embeddings in host memory"] if self.run.host_embeddings else []
        words += ["activations in host memory"] if self.run.offload else []
        words += ["weights loaded in host memory"] if self.run.load_on_host else []
        return ", ".join(words)

    def facts(self) -> dict[str, Any]:
        """For the stamp; sizes in bytes."""
        return {
            "predicted_peak": self.memory.peak,
            "usable": self.usable,
            "fits": self.fits,
            "tokens": self.run.tokens,
            "batch_size": self.config.train.micro_batch,
            "gradient_accumulation": self.config.train.gradient_accumulation,
            "gradient_checkpointing": self.run.checkpointing,
            "embeddings": "host" if self.run.host_embeddings else "device",
            "activation_offload": self.run.offload,
            "parts": {**self.memory.always, self.memory.largest_turn: max(self.memory.turns.values())},
        }


def make(
    config: "Config", shape: Architecture, machine: Hardware, precision: Precision, backend: str, processes: int = 0
) -> Plan:
    """The cheapest settings that fit; where none does, those that take least. ``processes``: 0 for as many as run now."""
    possible = [
        plan_as_set(c, shape, machine, precision, backend, processes)
        for c in _levers(config, shape, machine, backend, processes)
    ]
    plan = next((plan for plan in possible if plan.fits), possible[-1])
    if config.train.batch_size != "auto" or config.train.pack_length:
        return plan
    for batch in range(2, _LARGEST_BATCH + 1):
        # the step stays as large as it was meant to be, so that what is learnt is the same on every card
        parts, rest = divmod(config.train.gradient_accumulation, batch)
        if rest or parts < plan.run.processes:  # each process wants a micro batch
            continue
        larger = _with(plan.config, train={"batch_size": batch, "gradient_accumulation": parts})
        plan_larger = plan_as_set(larger, shape, machine, precision, backend, processes)
        plan = plan_larger if plan_larger.fits else plan
    return plan


def _levers(
    config: "Config", shape: Architecture, machine: Hardware, backend: str, processes: int = 0
) -> Iterator["Config"]:
    """The config with every ``auto`` resolved, cheapest first: a look-up in host memory costs less than checkpointing."""
    wanted = config.model.embeddings if can_use_host(config, shape, machine, backend, processes) else "device"
    checkpointing = config.train.gradient_checkpointing
    # without checkpointing every activation would go to the host, ten times as much
    either = [True] if config.train.activation_offload and machine.device == "cuda" else [False, True]
    for recompute in either if checkpointing == "auto" else [checkpointing]:
        for where in ["device", "host"] if wanted == "auto" else [wanted]:
            batch = config.train.micro_batch
            yield _with(
                config, model={"embeddings": where}, train={"gradient_checkpointing": recompute, "batch_size": batch}
            )


def can_use_host(config: "Config", shape: Architecture, machine: Hardware, backend: str, processes: int = 0) -> bool:
    """Only a table of its own that is not trained can lie elsewhere than the head, and only a card has a memory of its own."""
    frozen = not shape.tied and config.tuning.mode != "full" and not is_sharded(config, processes)
    return frozen and machine.device == "cuda" and backend == "bitsandbytes"


def _optimizer(config: "Config", machine: Hardware, processes: int) -> str:
    several = (processes or ranks.world_size()) > 1 and config.train.parallel != "ddp"
    if several and machine.device == "cuda" and config.train.optimizer == "auto":
        return "adamw_torch_fused"  # 8-bit states have no shards
    return optimizer_name(config, machine)


def is_sharded(config: "Config", processes: int = 0) -> bool:
    return (processes or ranks.world_size()) > 1 and config.train.parallel == "fsdp"


def plan_as_set(
    config: "Config", shape: Architecture, machine: Hardware, precision: Precision, backend: str, processes: int = 0
) -> Plan:
    """The plan for a config without ``auto``."""
    train, tuning = config.train, config.tuning
    longest = config.render.max_length
    budget = train.pack_length or longest * train.micro_batch
    run = memory.Setting(
        device=machine.device,
        mode=tuning.mode,
        precision=precision,
        tokens=max(longest, budget)
        if train.packing
        else longest * train.micro_batch,  # a row holds its longest example
        longest=longest,
        rank=config.lora.r,
        targets=None if config.lora.target_modules == "auto" else config.lora.target_modules,
        dropout=config.lora.dropout > 0 and tuning.mode != "full",
        optimizer=_optimizer(config, machine, processes),
        checkpointing=train.gradient_checkpointing is True,
        host_embeddings=config.model.embeddings == "host" and can_use_host(config, shape, machine, backend, processes),
        offload=train.activation_offload and machine.device == "cuda",
        chunked=backend == "bitsandbytes",
        scores_kept=config.model.attention == "eager",
        processes=processes or ranks.world_size(),
        sharded=is_sharded(config, processes),
    )
    plan = Plan(config, shape, run, memory.predict(shape, run), machine, backend)
    if plan.fits or not run.sharded or machine.device != "cuda":
        return plan
    # several copies of the model in host memory, and the slower way to load it: only where it has to be
    run = replace(run, load_on_host=True)
    other = Plan(config, shape, run, memory.predict(shape, run), machine, backend)
    return other if other.memory.peak < plan.memory.peak else plan


def resolve(
    config: "Config", path: Path, machine: Hardware, precision: Precision, backend: str
) -> tuple["Config", Plan | None, str]:
    """The config without ``auto``, its plan, and why there is none: a kind of model that cannot be planned.

    Done twice it changes nothing more.
    """
    try:
        plan = make(config, architecture.read(path), machine, precision, backend)
        return plan.config, plan, ""
    except UserError as error:
        recompute = config.train.gradient_checkpointing is not False and machine.device == "cuda"
        train = {"batch_size": config.train.micro_batch, "gradient_checkpointing": recompute}
        return _with(config, model={"embeddings": "device"}, train=train), None, error.message


def remedies(plan: Plan) -> list[tuple[str, str, Plan]]:
    """Settings to change until it fits, in order of cost, each on top of those before: (SET words, price, plan)."""
    found: list[tuple[str, str, Plan]] = []
    now = plan
    for changes, price in _cheapest_first(plan):
        if now.fits:
            break
        if changes.get("train", {}).get("gradient_accumulation") and now.config.train.micro_batch == 1:
            continue
        new = plan_as_set(
            _with(now.config, **changes), plan.shape, plan.machine, plan.run.precision, plan.backend, plan.run.processes
        )
        if new.memory.peak < _WORTHWHILE * now.memory.peak:
            words = [f"{s}.{k}={str(v).lower()}" for s, keys in changes.items() for k, v in keys.items()]
            if found and found[-1][1] == price:  # the same key once more
                found.pop()
            found.append((" ".join(words), price, new))
            now = new
    return found


def _cheapest_first(plan: Plan) -> Iterator[tuple[dict[str, dict[str, Any]], str]]:
    config, train, cuda = plan.config, plan.config.train, plan.machine.device == "cuda"
    whole = {"batch_size": 1, "gradient_accumulation": train.micro_batch * train.gradient_accumulation}
    yield {"train": whole}, "smaller micro batches, the same step"
    if train.pack_length and train.pack_length > config.render.max_length:
        yield {"train": {"pack_length": config.render.max_length}}, "shorter rows, more of them"
    if cuda and (plan.run.processes < 2 or train.parallel == "ddp"):
        yield {"train": {"optimizer": "paged_adamw_8bit"}}, "Adam's states in 8 bit"
    if plan.run.processes > 1 and not plan.run.sharded and plan.backend == "bitsandbytes":
        yield {"train": {"parallel": "fsdp"}}, "weights are gathered layer by layer, twice a pass"
    if can_use_host(config, plan.shape, plan.machine, plan.backend, plan.run.processes):
        yield {"model": {"embeddings": "host"}}, "a look-up in host memory a row"
    yield {"train": {"gradient_checkpointing": True}}, "about a third slower"
    if config.tuning.mode == "full":
        yield {"tuning": {"mode": "lora"}}, "an adapter is trained instead of all weights"
    if plan.machine.device != "mps":
        yield {"tuning": {"mode": "qlora"}}, "base weights in 4 bit"
    if cuda:
        yield {"train": {"activation_offload": True}}, "activations go to host memory and back"
    yield {"lora": {"r": max(1, config.lora.r // 2)}}, "a smaller adapter"
    length = config.render.max_length
    while length >= 512:
        length //= 2
        shorter: dict[str, dict[str, Any]] = {"render": {"max_length": length}}
        if train.pack_length:
            shorter["train"] = {"pack_length": min(train.pack_length, length)}
        yield shorter, "longer rows are left out, counted"


def _with(config: "Config", **sections: dict[str, Any]) -> "Config":
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    return config.model_copy(update=changed)
