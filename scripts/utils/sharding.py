"""How the ranks share a step's work: gradients summed by DDP, or weights in shards by FSDP2; both Accelerate's. Or ZeRO (zero.py).

The settings of the engines stand in env/*.yaml, in Accelerate's own form. Between passes a sharded weight is a DTensor, of
which each rank holds a piece; files hold whole tensors, so that a checkpoint goes on with any number of ranks.
"""

import contextlib
import types
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from scripts.utils import console, files, ranks
from scripts.utils.errors import MachineError, UserError

if TYPE_CHECKING:
    import torch

    from scripts.utils.schema import Config

CONFIGS = files.REPO_ROOT / "env"
_ENGINES = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
# what else env/deepspeed.yaml may say: the loop sums the gradients of a step's micro batches, and train.max_grad_norm clips
_ZERO = {"gradient_accumulation_steps": 1, "offload_optimizer_device": "none", "zero3_init_flag": False}


def engine(config: "Config") -> str:
    """How this run's ranks work together: none (there is one), ddp, fsdp or deepspeed."""
    return config.train.parallel if ranks.world_size() > 1 else "none"


def packages(config: "Config") -> list[str]:
    """What this run's engine is, where it is a package of its own."""
    return ["deepspeed"] if engine(config) == "deepspeed" else []


def settings(name: str) -> dict[str, Any]:
    """What Accelerate's config file of an engine says; raises ``UserError`` where it does not fit."""
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    path = CONFIGS / f"{name}.yaml"
    try:
        found = load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: Accelerate does not take this file: {error}", "git checkout the file, or mend it"
        ) from error
    if found.distributed_type != _ENGINES[name]:
        raise UserError(
            f"{path}: distributed_type is {found.distributed_type}, expected {_ENGINES[name]}", "mend the file"
        )
    return dict(found.fsdp_config if name == "fsdp" else found.deepspeed_config)


def zero_stage() -> int:
    """Which of ZeRO's stages env/deepspeed.yaml asks for; raises ``UserError`` for what is not done here."""
    path, found = CONFIGS / "deepspeed.yaml", settings("deepspeed")
    stage = found.pop("zero_stage", 2)
    if stage not in (1, 2):
        raise UserError(
            f"{path}: zero_stage is {stage!r}, expected 1 or 2",
            "to cut the weights in shards as well: train.parallel: fsdp",
        )
    for name, value in found.items():
        if value != _ZERO.get(name):
            only = f"only {_ZERO[name]!r} works here" if name in _ZERO else "this is not read here"
            raise UserError(f"{path}: deepspeed_config: {name}: {value!r}: {only}", "git checkout the file, or mend it")
    return int(stage)


def require_installed(config: "Config") -> None:
    """Raise ``MachineError`` where train.parallel asks for what is not installed."""
    if config.train.parallel != "deepspeed":
        return
    try:
        metadata.version("deepspeed")  # its module is hidden (environment.py)
    except metadata.PackageNotFoundError:
        raise MachineError(
            "train.parallel asks for deepspeed, which is not installed",
            'make install EXTRAS=deepspeed, or SET="train.parallel=fsdp", which needs nothing more',
        ) from None


def require_engine(config: "Config") -> None:
    """As ``require_installed``; raises ``UserError`` too, where the engine's file in env/ asks for what is not done here."""
    require_installed(config)
    if config.train.parallel == "deepspeed":
        zero_stage()


def check(config: "Config", precision: str) -> None:
    """Refuse what an engine cannot do; raises ``MachineError``."""
    name = engine(config)
    if name not in ("fsdp", "deepspeed"):
        return
    require_engine(config)
    if precision == "fp16":
        raise MachineError(
            f"train.parallel: {name} trains in bf16 or fp32, not fp16", "train.parallel: ddp, or a card that has bf16"
        )
    if "8bit" in config.train.optimizer:
        raise MachineError(
            f"train.optimizer {config.train.optimizer} has no shards",
            f"use train.optimizer: auto with train.parallel: {name}",
        )


def without_levers(config: "Config") -> "Config":
    """The config less what does not work on shards, each said where it was asked for."""
    if engine(config) != "fsdp":
        return config
    if config.model.embeddings == "host":
        console.warn(
            "model.embeddings: host does not go with train.parallel: fsdp, which cuts the table in shards instead"
        )
    if config.train.activation_offload:
        console.warn("train.activation_offload does not go with train.parallel: fsdp: it is off")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"embeddings": "device"}),
            "train": config.train.model_copy(update={"activation_offload": False}),
        }
    )


def allowed(config: "Config", exact: Any) -> Any:
    """Of the ways of computing a step that were found exact (a loss.Exact), those that go with the engine."""
    if engine(config) == "fsdp" and config.tuning.mode == "full" and exact.chunked:
        console.note(
            "train", "fsdp and tuning.mode: full: the loss from whole logits, as the head has a gradient in shards"
        )
        return replace(exact, chunked=False)
    return exact


def trainer_options(config: "Config", precision: str) -> dict[str, Any]:
    """What TrainingArguments takes beside the usual where several ranks run."""
    if ranks.world_size() < 2:
        return {}
    if engine(config) != "fsdp":
        return {"ddp_find_unused_parameters": False} if engine(config) == "ddp" else {}
    options: dict[str, Any] = {"fsdp": True, "fsdp_config": {**settings("fsdp"), "activation_checkpointing": False}}
    if config.tuning.mode != "full":
        # adapters stay in fp32 and are reduced in it, the base in the precision that it was loaded in, as in one process
        options |= {"bf16": False, "fp16": False}
    return options


def let_accelerate_shard_on_cpu(accelerator: Any, plugin_arguments: dict[str, Any] | None) -> bool:
    """Accelerate (1.15) leaves FSDP out for ranks on a CPU, though all of its code works there: put it back."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if plugin_arguments is None or accelerator.device.type != "cpu" or hasattr(accelerator.state, "fsdp_plugin"):
        return False
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def leave_frozen_alone(model: Any) -> None:
    """Tell DDP not to send frozen weights around: every rank has read the same files, by their hash."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]


def reduce_gradients(wrapped: Any) -> None:
    """Average over the ranks the gradients that lie there, by DDP's own reducer.

    The step's micro batches went by it, each rank doing as many as it has. It acts in one pass at the end, to which every
    trained weight adds nothing; a rank without a row brings zeros.
    """
    inner = wrapped.module
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]

    def nothing(_: int) -> "torch.Tensor":
        import torch

        return torch.stack([(parameter.sum() * 0).float() for parameter in trained]).sum()

    with _forward_of(inner, nothing):
        wrapped(0).backward()


@contextlib.contextmanager
def _forward_of(model: Any, forward: Any) -> Iterator[None]:
    before = model.__dict__.get("forward")  # Accelerate puts one there for mixed precision
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


# --- FSDP2


def is_sharded(model: Any) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def through_root(model: Any, loss: Any) -> Any:
    """``loss`` as a forward pass of the sharded model: FSDP gathers weights on the way into it and lets go of them after."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def compute(self: Any, row: dict[str, Any]) -> Any:
        return loss(self, row)

    model.loss_of_row = types.MethodType(compute, model)
    register_fsdp_forward_method(model, "loss_of_row")
    return lambda _, row: model.loss_of_row(row)


@contextlib.contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Inside, the weights of a sharded module that is used without a call of it are whole."""
    sharded = hasattr(module, "unshard")
    if sharded:
        module.unshard()
    try:
        yield
    finally:
        if sharded:
            module.reshard()


def local(tensor: "torch.Tensor") -> "torch.Tensor":
    """This rank's piece of a tensor: all of it where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tree: Any) -> Any:
    """The tree with each sharded tensor whole, on the CPU. All ranks must call it, with the same tree."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree.full_tensor().detach().cpu() if hasattr(tree, "full_tensor") else tree


def as_in(like: Any, tensor: "torch.Tensor") -> "torch.Tensor":
    """A whole tensor, the same on every rank, cut as ``like`` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # every rank has the whole one, so none of it is sent
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_as_in(state: dict[str, Any], optimizer: "torch.optim.Optimizer") -> dict[str, Any]:
    """A saved optimizer's whole state, cut as the optimizer's own weights are."""
    import torch

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    cut = {
        number: {
            name: as_in(weights[number], value) if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": cut}
