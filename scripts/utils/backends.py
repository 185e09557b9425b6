"""The two ways to build a model for training: bitsandbytes (everywhere) and Unsloth (fast on NVIDIA cards).

One process, one backend (``backend_choice`` says which). Only this file imports Unsloth.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import environment, files, planning, ranks, sharding
from scripts.utils.errors import MachineError, SFTError, UserError

if TYPE_CHECKING:
    import torch

    from scripts.utils.backend_choice import Backend
    from scripts.utils.hardware import Hardware, Precision
    from scripts.utils.schema import Config


@dataclass(frozen=True)
class TrainingModel:
    """A model ready to train, and the facts about it that go into the stamp."""

    model: Any
    attention: str
    quantisation: str | None
    target_modules: list[str]
    trainable: int
    total: int
    checkpointing: bool


def import_unsloth(xformers: str | None) -> None:
    """Must be the first heavy import of the process but torch. ``xformers`` is the probe's verdict on it."""
    if (xformers or "").startswith("off"):
        # Unsloth takes SDPA where this import fails; XFORMERS_DISABLED is read by nothing (Unsloth 2026.10.9)
        sys.modules["xformers"] = None  # type: ignore[assignment]
    environment.show_hidden()
    import unsloth  # noqa: F401


def torch_dtype(precision: "Precision") -> "torch.dtype":
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def nf4(precision: "Precision", *, shards: bool = False) -> Any:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), computing in ``precision``.

    ``shards``: the packed bytes lie in a tensor of that precision, as FSDP cuts tensors of floating-point numbers only.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"QLoRA needs bitsandbytes, which does not import here ({error})", "use tuning.mode: lora"
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(precision),
        **({"bnb_4bit_quant_storage": torch_dtype(precision)} if shards else {}),
    )


def spare_bitsandbytes(path: Path) -> None:
    """Before a model is loaded as it lies in ``path``: PEFT need not import bitsandbytes, unless the weights there are quantised."""
    if "quantization_config" not in files.read_json(path / "config.json"):
        environment.leave_out("bitsandbytes")


def load_causal_lm(
    path: Path,
    *,
    precision: "Precision",
    device: str,
    quantised: bool = False,
    attention: str = "auto",
    shards: bool = False,
) -> Any:
    """The one place that builds a plain model: used by train, eval, infer and merge. ``shards``: for FSDP."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar a second long, in the middle of our lines
    options: dict[str, Any] = {"quantization_config": nf4(precision, shards=shards)} if quantised else {}
    if attention != "auto":
        options["attn_implementation"] = attention
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=torch_dtype(precision),
            device_map={"": ranks.place_of(device)},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise MachineError(
            f"{path}: the model does not load: {error}", "see the reason above; model.attention: auto is safest"
        ) from error
    keep_four_bits(model)
    return model


def keep_four_bits(model: Any) -> None:
    """Hold bitsandbytes back from rewriting 4-bit weights for a CPU with AVX-512 BF16 when a model first evaluates.

    That rounds their scales to bf16 for good, computes in bf16 whatever the precision, has no backward pass, and fails
    on layers narrower than a block (bitsandbytes 0.50.2, ``_convert_weight_packed_for_cpu``).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attention_in_transformers(path: Path, attention: str) -> str:
    """What ``load_causal_lm`` would give this model; looks at its config.json only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {} if attention == "auto" else {"attn_implementation": attention}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False), **options
        )
    return str(model.config._attn_implementation)


def as_out_of_memory(error: Exception) -> Exception:
    """A device that ran out of memory as a ``MachineError`` that says what to lower; other errors unchanged."""
    import torch

    if isinstance(error, SFTError):
        return error  # says more already
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return MachineError(
            f"out of memory: {str(error).splitlines()[0]}",
            "halve render.max_length, set train.gradient_checkpointing: true, or take a smaller model; the same command goes on",
        )
    return error


def linear_names(model: Any) -> list[str]:
    """Last names of all linear layers but the output head, found in the model itself."""
    import torch

    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not found:
        raise UserError(
            "no linear layers found in the model to put LoRA on", "set lora.target_modules to a list of names"
        )
    return sorted(found)


def load_for_training(
    config: "Config",
    path: Path,
    backend: "Backend",
    precision: "Precision",
    hardware: "Hardware",
    xformers: str | None = None,
) -> TrainingModel:
    """Load the base model and put LoRA on it (or free all its weights for ``full``).

    Raises ``MachineError`` where the loaded model is not what was asked for: Unsloth goes on in silence.
    """
    from transformers import set_seed

    set_seed(config.train.seed)  # the adapter's first weights are random: the Trainer's own seeding comes too late
    config, plan, _ = planning.resolve(config, path, hardware, precision, backend)
    device = "cpu" if plan and plan.run.load_on_host else hardware.device  # FSDP moves what it cuts
    checkpointing = config.train.gradient_checkpointing is True
    quantised = config.tuning.mode == "qlora"
    if quantised and hardware.device == "mps":
        raise MachineError(
            "tuning.mode qlora needs 4-bit layers, which bitsandbytes does not have for Apple GPUs",
            f'SET="tuning.mode=lora" trains an adapter on the whole model in {precision}; make plan says whether it fits',
        )
    attention = config.model.attention
    if attention == "auto" and (xformers or "").startswith("off"):
        attention = "sdpa"
    build = _build_unsloth if backend == "unsloth" else _build_bitsandbytes
    model, targets = build(config, path, precision, device, checkpointing, attention)
    keep_four_bits(model)
    actual = attention_of(model)
    if attention not in ("auto", actual):
        raise MachineError(
            f"{path}: {backend} loaded the model with attention {actual}, not {attention}", "set model.attention: auto"
        )
    if quantised and not any(p.__class__.__name__ == "Params4bit" for p in model.parameters()):
        raise MachineError(f"{path}: {backend} loaded the model without 4-bit weights", "use tuning.mode: lora")
    counts = [
        (p.numel() * (2 * p.element_size() if p.__class__.__name__ == "Params4bit" else 1), p.requires_grad)
        for p in model.parameters()
    ]
    return TrainingModel(
        model=model,
        attention=actual,
        quantisation="nf4, double" if quantised else None,
        target_modules=targets,
        trainable=sum(count for count, trained in counts if trained),
        total=sum(count for count, _ in counts),
        checkpointing=checkpointing,
    )


def attention_of(model: Any) -> str:
    """The attention that this model's layers really call."""
    # on a GPU Unsloth's own layers ask its dispatcher and never look at the config
    dispatch = sys.modules.get("unsloth.utils.attention_dispatch")
    if dispatch and any(type(m).forward.__module__.startswith("unsloth.") for m in model.modules()):
        chosen = str(dispatch.select_attention_backend())
        return "flash_attention_2" if chosen.startswith("flash") else chosen
    return str(model.config._attn_implementation)


def _wanted_targets(config: "Config", model: Any) -> list[str]:
    names = linear_names(model)
    if config.lora.target_modules == "auto":
        return names
    unknown = [name for name in config.lora.target_modules if name not in names]
    if unknown:
        raise UserError(
            f"lora.target_modules: no layer is called {', '.join(unknown)}",
            f"this model has: {', '.join(names)}, or use auto",
        )
    return list(config.lora.target_modules)


def _build_bitsandbytes(
    config: "Config", path: Path, precision: "Precision", device: str, checkpointing: bool, attention: str
) -> tuple[Any, list[str]]:
    full = config.tuning.mode == "full"
    # full tuning keeps its master weights in fp32 and computes under autocast: small updates vanish in 16 bit
    model = load_causal_lm(
        path,
        precision="fp32" if full else precision,
        device=device,
        quantised=config.tuning.mode == "qlora",
        attention=attention,
        shards=sharding.engine(config) == "fsdp",
    )
    model.config.use_cache = False
    if config.model.embeddings == "host":  # as planned: they are frozen and of their own
        from scripts.utils.offload import keep_embeddings_on_host

        keep_embeddings_on_host(model)
    targets: list[str] = []
    if not full:
        from peft import LoraConfig, get_peft_model

        model.requires_grad_(False)
        targets = _wanted_targets(config, model)
        lora = config.lora
        shape = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, shape)
    if checkpointing:
        model.enable_input_require_grads()  # frozen embeddings give no gradient for checkpoints to start from
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, targets


def _build_unsloth(
    config: "Config", path: Path, precision: "Precision", device: str, checkpointing: bool, attention: str
) -> tuple[Any, list[str]]:
    from unsloth import FastLanguageModel

    mode = config.tuning.mode
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(path),
        max_seq_length=config.render.max_length,
        dtype=torch_dtype(precision),
        load_in_4bit=mode == "qlora",
        full_finetuning=mode == "full",
        use_exact_model_name=True,  # else Unsloth looks on the hub for its own upload of the model
        local_files_only=True,
        trust_remote_code=False,
        **({} if attention == "auto" else {"attn_implementation": attention}),
    )
    if mode == "full":
        return model, []
    targets = _wanted_targets(config, model)
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=config.train.seed,
    )
    return model, targets
