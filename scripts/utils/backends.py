"""The two ways to build a model for training: bitsandbytes (everywhere) and Unsloth (fast on NVIDIA cards).

One process, one backend. Only this file imports Unsloth. Whether Unsloth works is found out in a child process,
before this process imports transformers: a failed import would leave Unsloth's patches behind.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.utils.errors import MachineError, UserError
from scripts.utils.files import REPO_ROOT

if TYPE_CHECKING:
    import torch

    from scripts.utils.hardware import Hardware, Precision
    from scripts.utils.schema import Config

Backend = Literal["bitsandbytes", "unsloth"]
REASON_VARIABLE = "SFT_FALLBACK_REASON"
PROBE_SECONDS = 180


@dataclass(frozen=True)
class BackendChoice:
    """``requested`` by the config, ``actual`` as it will run; ``reason`` is one plain sentence for a fallback."""

    requested: Backend
    actual: Backend
    reason: str | None = None


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


def choose(config: "Config") -> BackendChoice:
    """Decide before anything heavy is imported. Raises ``MachineError`` where a fallback would be needed but is off."""
    if config.tuning.backend == "bitsandbytes":
        return BackendChoice("bitsandbytes", "bitsandbytes")
    # a restart after a failure of Unsloth hands its reason over, so that a second failure cannot loop
    reason = os.environ.pop(REASON_VARIABLE, None) or probe_unsloth()
    if reason is None:
        return BackendChoice("unsloth", "unsloth")
    if config.tuning.fallback == "never":
        raise MachineError(
            f"Unsloth does not work here: {reason}", "set tuning.fallback: auto, or tuning.backend: bitsandbytes"
        )
    return BackendChoice("unsloth", "bitsandbytes", reason)


def probe_unsloth() -> str | None:
    """Import Unsloth in a child process and run a tiny forward and backward there: None, or the reason it fails."""
    from importlib.util import find_spec

    if find_spec("unsloth") is None:
        return "it is not installed (make install EXTRAS=unsloth)"
    code = "from scripts.utils import backends; backends.probe_child()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO_ROOT,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"its import did not end within {PROBE_SECONDS} seconds"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        reason = json.loads(lines[-1])["reason"]
        return str(reason) if reason else None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"importing it ended the process with code {done.returncode}: {last[:300]}"


def probe_child() -> None:
    """Runs in the child: prints one JSON object with the reason of a failure, or null."""
    try:
        import unsloth  # noqa: F401  # isort: skip  (must precede torch and transformers)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        # the path that training takes: attention forward and backward on this device
        query = torch.randn(1, 2, 8, 16, device=device, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
        reason = None
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print("\n" + json.dumps({"reason": reason}), flush=True)


def restart_with_bitsandbytes(reason: str) -> None:
    """Replace this process, which Unsloth has patched, by a clean one that runs the same command."""
    os.environ[REASON_VARIABLE] = reason
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def import_unsloth() -> None:
    """Must be the first heavy import of the process."""
    import unsloth  # noqa: F401


def torch_dtype(precision: "Precision") -> "torch.dtype":
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def nf4(precision: "Precision") -> Any:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), computing in ``precision``."""
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
    )


def load_causal_lm(
    path: Path, *, precision: "Precision", device: str, quantised: bool = False, attention: str = "auto"
) -> Any:
    """The one place that builds a plain model: used by train, eval, infer and merge."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar a second long, in the middle of our lines
    options: dict[str, Any] = {"quantization_config": nf4(precision)} if quantised else {}
    if attention != "auto":
        options["attn_implementation"] = attention
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=torch_dtype(precision),
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise MachineError(
            f"{path}: the model does not load: {error}", "see the reason above; model.attention: auto is safest"
        ) from error


def as_out_of_memory(error: Exception) -> Exception:
    """A device that ran out of memory as a ``MachineError`` that says what to lower; other errors unchanged."""
    import torch

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


def needs_checkpointing(config: "Config", model_config: Any, hardware: "Hardware") -> bool:
    """Whether activations would take more than a third of the memory.

    34 bytes a token, layer and hidden unit in 16 bit (Korthikanti et al. 2022, arXiv 2205.05198, without the attention
    matrix, which SDPA does not keep); doubled, as fp32 takes twice that.
    """
    setting = config.train.gradient_checkpointing
    if setting != "auto":
        return setting
    # a packed row may be shorter than its longest example
    tokens = max(
        config.render.max_length, config.train.pack_length or config.render.max_length * config.train.batch_size
    )
    return bool(2 * 34 * tokens * model_config.hidden_size * model_config.num_hidden_layers > hardware.memory / 3)


def load_for_training(
    config: "Config", path: Path, backend: Backend, precision: "Precision", hardware: "Hardware"
) -> TrainingModel:
    """Load the base model and put LoRA on it (or free all its weights for ``full``)."""
    from transformers import AutoConfig, set_seed

    set_seed(config.train.seed)  # the adapter's first weights are random: the Trainer's own seeding comes too late
    checkpointing = needs_checkpointing(
        config, AutoConfig.from_pretrained(str(path), local_files_only=True).get_text_config(), hardware
    )
    quantised = config.tuning.mode == "qlora"
    if quantised and hardware.device == "mps":
        raise MachineError("bitsandbytes has no 4-bit layers for Apple GPUs", "use tuning.mode: lora")
    build = _build_unsloth if backend == "unsloth" else _build_bitsandbytes
    model, targets = build(config, path, precision, hardware, checkpointing)
    counts = [
        (p.numel() * (2 if p.__class__.__name__ == "Params4bit" else 1), p.requires_grad) for p in model.parameters()
    ]
    return TrainingModel(
        model=model,
        attention=str(model.config._attn_implementation),
        quantisation="nf4, double" if quantised else None,
        target_modules=targets,
        trainable=sum(count for count, trained in counts if trained),
        total=sum(count for count, _ in counts),
        checkpointing=checkpointing,
    )


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
    config: "Config", path: Path, precision: "Precision", hardware: "Hardware", checkpointing: bool
) -> tuple[Any, list[str]]:
    full = config.tuning.mode == "full"
    # full tuning keeps its master weights in fp32 and computes under autocast: small updates vanish in 16 bit
    model = load_causal_lm(
        path,
        precision="fp32" if full else precision,
        device=hardware.device,
        quantised=config.tuning.mode == "qlora",
        attention=config.model.attention,
    )
    model.config.use_cache = False
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
    config: "Config", path: Path, precision: "Precision", hardware: "Hardware", checkpointing: bool
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
