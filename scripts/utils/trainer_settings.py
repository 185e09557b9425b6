"""A run's settings as transformers' Trainer takes them."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from scripts.utils import hardware, sharding

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def training_arguments(
    config: "Config", folder: Path, machine: hardware.Hardware, precision: str, steps: int
) -> TrainingArguments:
    """The config as the Trainer wants it. Saving and evaluating are driven by ``Rhythm``."""
    train = config.train
    # a share never takes all the steps: the learning rate of the first one is zero
    shared = sharding.trainer_options(config, precision)
    warmup = train.warmup if train.warmup >= 1 else min(math.ceil(train.warmup * steps), steps - 1)
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
        optim=hardware.optimizer_name(config, machine),
        use_cpu=machine.device == "cpu",
        seed=train.seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",  # callbacks.Tracked does it
        run_name=folder.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=machine.device == "cuda",
        push_to_hub=False,
        **{"bf16": precision == "bf16", "fp16": precision == "fp16", **shared},
    )
