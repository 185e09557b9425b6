"""Every config key: its type, default, bounds and meaning. The schema is closed: an unknown key is an error.

configs/base.yaml shows the same keys with a comment each; a test holds the two together.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
# SET="train.eval_strategy=false" and JSON configs say False where YAML 1.1 writes a bare no
Strategy = Annotated[
    Literal["no", "steps", "epoch"], BeforeValidator(lambda v: "no" if v in (False, "false", "off") else v)
]
Switch = Literal["auto"] | bool
RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "pairs", "text"]
Meaning = Literal["user", "assistant", "system", "messages", "tools", "text", "group"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class RunSection(Section):
    name: str | None = None


class ModelSection(Section):
    name: str = "embedded/smollm2-135m-instruct"
    revision: str | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    embeddings: Literal["auto", "device", "host"] = "auto"


class SourceSection(Section):
    """One item of data.sources; format and columns are those of the data section where they are not given."""

    raw: str | list[str]
    weight: Annotated[float, Field(gt=0, le=1)] | None = None
    limit: Positive | None = None
    format: RowFormat | None = None
    columns: dict[Meaning, str] | None = None


class DataSection(Section):
    raw: str | list[str] = "data/raw"
    sources: list[SourceSection] = []
    name: str | None = None
    format: RowFormat = "auto"
    columns: dict[Meaning, str] = {}
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.1
    split_seed: int = 0
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    near_duplicates: Literal["report", "remove", "off"] = "report"
    near_threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8


class StyleSection(Section):
    text: str | None = None
    mode: Literal["prepend", "append", "replace", "only-if-missing"] = "replace"


class RenderSection(Section):
    template: str = "auto"
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    max_length: Annotated[int, Field(ge=8)] = 2048
    too_long: Literal["drop", "truncate_start", "truncate_end", "split_turns", "error"] = "drop"


class TuningSection(Section):
    mode: Literal["qlora", "lora", "full"] = "qlora"
    backend: Literal["bitsandbytes", "unsloth"] = "bitsandbytes"
    fallback: Literal["auto", "never"] = "auto"
    init_adapter: str | None = None


class LoraSection(Section):
    r: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: Literal["auto"] | list[str] = "auto"


class TrainSection(Section):
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Positive | None = None
    batch_size: Literal["auto"] | Positive = 1
    gradient_accumulation: Positive = 8
    packing: bool = True
    share_prefix: bool = True
    lean_lora: bool = True
    fused_kernels: Switch = "auto"
    pack_length: Annotated[int, Field(ge=8)] | None = None
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    gradient_checkpointing: Switch = "auto"
    activation_offload: bool = False
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    bf16: bool | None = None
    fp16: bool | None = None
    precision_strict: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    logging_steps: Positive = 5
    eval_strategy: Strategy = "epoch"
    eval_steps: Positive = 100
    save_strategy: Strategy = "epoch"
    save_steps: Positive = 100
    save_minutes: Annotated[float, Field(ge=0)] = 15.0
    save_total_limit: Positive = 2
    load_best_model_at_end: Switch = "auto"
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    non_finite: Literal["stop", "skip"] = "stop"
    self_test: bool = True
    parallel: Literal["ddp", "fsdp", "deepspeed"] = "ddp"

    @property
    def micro_batch(self) -> int:
        """``batch_size`` as a number; planning.py resolves auto before a run begins."""
        return 1 if self.batch_size == "auto" else self.batch_size

    @property
    def chooses_best(self) -> bool:
        """Whether the checkpoint with the lowest validation loss is exported; auto: where both are there to choose by."""
        if self.load_best_model_at_end != "auto":
            return self.load_best_model_at_end
        return "no" not in (self.save_strategy, self.eval_strategy)


class EvalSection(Section):
    split: Literal["train", "val", "test"] = "test"
    limit: Positive | None = None
    quick_limit: Positive = 20
    batch_size: Positive = 16
    max_new_tokens: Positive = 256
    generate: bool = True
    headline: Literal[
        "auto", "exact_match", "normalised_match", "f1", "number_match", "json_exact", "json_keys", "rouge_l", "bleu", "chrf", "loss"
    ] = "auto"  # fmt: skip


class InferSection(Section):
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    batch_size: Positive = 16
    num_samples: Positive = 1
    stop: list[Annotated[str, Field(min_length=1)]] = []
    json_schema: str | None = None


class MergeSection(Section):
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    shard_size: str = "4GB"
    by_layer: Switch = "auto"
    tolerance: Annotated[float, Field(gt=0)] = 0.05


class TrackingSection(Section):
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "sft-play"


class Config(Section):
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    style: StyleSection = StyleSection()
    render: RenderSection = RenderSection()
    tuning: TuningSection = TuningSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    infer: InferSection = InferSection()
    merge: MergeSection = MergeSection()
    tracking: TrackingSection = TrackingSection()


# other tools' names for the same keys, accepted here and nowhere else
ALIASES: dict[str, dict[str, str]] = {
    "model": {
        "model_name": "name",
        "model_name_or_path": "name",
        "base_model": "name",
        "attn_implementation": "attention",
    },
    "data": {"path": "raw", "file": "raw", "files": "raw"},
    "style": {"system": "text", "system_prompt": "text"},
    "render": {"max_seq_length": "max_length", "max_seq_len": "max_length", "chat_template": "template"},
    "tuning": {"method": "mode"},
    "lora": {"lora_r": "r", "rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"},
    "train": {
        "lr": "learning_rate",
        "num_train_epochs": "epochs",
        "num_epochs": "epochs",
        "evaluation_strategy": "eval_strategy",
        "per_device_train_batch_size": "batch_size",
        "gradient_accumulation_steps": "gradient_accumulation",
        "lr_scheduler_type": "scheduler",
        "lr_scheduler": "scheduler",
        "warmup_ratio": "warmup",
        "warmup_steps": "warmup",
        "optim": "optimizer",
        "max_norm": "max_grad_norm",
    },
    "eval": {"max_samples": "limit"},
    "tracking": {"trackers": "report_to"},
}
