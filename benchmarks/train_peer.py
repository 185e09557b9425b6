"""A peer's whole run in the folder where it starts, from rows.jsonl to adapter/: ``train_peer trl-defaults|trl-best|padded``.

Each is the short script that its documentation shows. What all share with SFT-Play comes from job.json: rows, LoRA, optimizer,
learning rate and its schedule, precision, one epoch. It says ``step N/M`` after each step, and leaves its own counts in facts.json.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

JOB = json.loads(Path("job.json").read_text())
ROWS = [json.loads(line)["messages"] for line in Path("rows.jsonl").read_text().splitlines()]
LORA = LoraConfig(
    r=JOB["rank"], lora_alpha=JOB["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
)


class Steps(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"train: step {state.global_step}/{state.max_steps}", flush=True)


class Counting:
    """A collator that notes the tokens of each batch, without padding, and how many of them carry loss."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.tokens: list[int] = []
        self.trained = 0

    def __call__(self, rows: Any) -> Any:
        batch = self.collate(rows)
        mask = batch.get("attention_mask")
        self.tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        self.trained += int((batch["labels"][:, 1:] != -100).sum())
        return batch


def shared(steps: int, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": "out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "learning_rate": JOB["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(math.ceil(JOB["warmup"] * steps), steps - 1),
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "seed": JOB["seed"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def padded() -> Trainer:
    """Plain transformers: fp32, examples padded to the longest of their batch, logits at every position."""
    torch.manual_seed(JOB["seed"])
    tokenizer = AutoTokenizer.from_pretrained(JOB["model"])
    model = AutoModelForCausalLM.from_pretrained(JOB["model"], dtype=torch.float32)
    rows = []
    for messages in ROWS:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        asked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])

        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {
            "input_ids": filled("input_ids", tokenizer.pad_token_id or 0),
            "labels": filled("labels", -100),
            "attention_mask": torch.tensor(mask),
        }

    arguments = TrainingArguments(**shared(math.ceil(len(rows) / JOB["examples"]), JOB["examples"]))
    data = Dataset.from_list(rows)
    return Trainer(model=get_peft_model(model, LORA), args=arguments, train_dataset=data, data_collator=collate)


def trl(best: bool) -> Trainer:
    """TRL's trainer: with what it does when nothing is said, or as fast as its options make it on a CPU."""
    from trl import SFTConfig, SFTTrainer

    bf16 = JOB["precision"] == "bf16"
    steps = math.ceil(len(ROWS) / JOB["examples"])
    options = {**shared(steps, 1 if best else JOB["examples"]), "bf16": bf16}
    if best:
        # rows without padding, loss on the answer alone, weights in 16 bit, nothing computed twice
        data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in ROWS])
        options |= {
            "packing": True,
            "max_length": JOB["pack_length"],
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
        }
        if torch.cuda.is_available():
            options["optim"] = "adamw_torch_fused"  # as SFT-Play takes there
    else:
        data = Dataset.from_list([{"messages": row} for row in ROWS])
    if JOB["mode"] == "qlora":
        options["model_init_kwargs"] = {**options.get("model_init_kwargs", {}), "quantization_config": four_bits(bf16)}
    config = SFTConfig(**options, **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
    return SFTTrainer(model=JOB["model"], args=config, train_dataset=data, peft_config=LORA)


def four_bits(bf16: bool) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as SFT-Play has it."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def main() -> None:
    kind = sys.argv[1]
    trainer = padded() if kind == "padded" else trl(best=kind == "trl-best")
    trainer.data_collator = counting = Counting(trainer.data_collator)
    trainer.add_callback(Steps())
    done = trainer.train()
    trainer.save_model("adapter")
    facts = {
        "tokens": counting.tokens[: trainer.state.max_steps * trainer.args.gradient_accumulation_steps],
        "trained_tokens": counting.trained,
        "loss": done.training_loss,
        "steps": done.global_step,
        "device_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    Path("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
