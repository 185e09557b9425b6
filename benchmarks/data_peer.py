"""The work of one step done with ``datasets.map``, as its documentation shows it: ``data_peer STEP FOLDER``."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset, load_from_disk

from benchmarks.data import MODEL, STYLE
from scripts.utils import near

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def process(folder: Path) -> Dataset:
    """Messages, an id by content, a signature; doubles out; rows of a hash below a bound aside."""
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))

    def read(row: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(row["messages"], ensure_ascii=False).encode()
        return {"id": hashlib.sha256(text).hexdigest()[:24], "signature": near.signature(row["messages"])}

    rows = rows.map(read, num_proc=CORES)
    seen: set[str] = set()

    def new(key: str) -> bool:
        before = len(seen)
        seen.add(key)
        return len(seen) > before

    return rows.filter(new, input_columns="id")


def style(folder: Path) -> Dataset:
    rows = load_from_disk(str(folder / "peer-process"))

    def add(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": STYLE}, *row["messages"]]}

    return rows.map(add, num_proc=CORES)


def render(folder: Path) -> Dataset:
    """Text, ids, and labels that leave out the prompt."""
    from transformers import AutoTokenizer

    name = Path(os.environ["SFT_MODEL_CACHE"]) / MODEL.replace("/", "--")
    tokenizer = AutoTokenizer.from_pretrained(str(name), local_files_only=True)
    rows = load_from_disk(str(folder / "peer-style"))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        asked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return {"text": text, "input_ids": ids, "labels": [-100] * asked + ids[asked:]}

    return rows.map(encode, num_proc=CORES, remove_columns=["messages"])


if __name__ == "__main__":
    datasets.disable_progress_bars()
    step, here = sys.argv[1], Path(sys.argv[2])
    {"process": process, "style": style, "render": render}[step](here).save_to_disk(str(here / f"peer-{step}"))
