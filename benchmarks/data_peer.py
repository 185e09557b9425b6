"""The work of one step done with ``datasets.map``: ``data_peer STEP FOLDER``.

``process`` does all that SFT-Play's does but the report: rows checked and brought into one form, near duplicates found, a
split that no question and no near duplicate straddles, rejected rows and splits as JSON lines. Each row's work is
SFT-Play's own function, in ``map``; what needs all rows is done as datasets' documentation shows it, with rensa's own search.
``process-less`` makes ids and signatures and takes doubles out, no more. The other steps are as in the documentation.
"""

import hashlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset, load_from_disk

from benchmarks.data import MODEL, STYLE
from scripts.utils import near, records, splits, suspicious
from scripts.utils.turns import Unusable

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load(folder: Path) -> Dataset:
    return load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))


def without_doubles(rows: Dataset) -> Dataset:
    seen: set[str] = set()

    def new(key: str) -> bool:
        before = len(seen)
        seen.add(key)
        return len(seen) > before

    return rows.filter(new, input_columns="id")


def process_less(folder: Path) -> Dataset:
    """Messages, an id by content, a signature; doubles out."""

    def read(row: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(row["messages"], ensure_ascii=False).encode()
        return {"id": hashlib.sha256(text).hexdigest()[:24], "signature": near.signature(row["messages"])}

    return without_doubles(load(folder).map(read, num_proc=CORES))


def process(folder: Path) -> Dataset:
    rows = load(folder)
    shape = records.detect(rows[0])
    assert shape is not None

    def read(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            content = records.to_content(dict(row), shape, {})
        except Unusable as problem:
            return {"id": "", "reason": problem.reason, "line": number + 1, "sketch": b"", "question": 0, "marks": []}
        text = json.dumps(content, ensure_ascii=False).encode()
        return {
            "messages": content["messages"],
            "id": hashlib.sha256(text).hexdigest()[:24],
            "reason": "",
            "line": number + 1,
            "sketch": pickle.dumps(sketch_of(content["messages"])),
            "question": int.from_bytes(splits.question_hash(content, 0)[:7]),
            "marks": suspicious.find(content["messages"]),
        }

    rows = rows.map(read, with_indices=True, num_proc=CORES)
    rows.filter(bool, input_columns="reason").to_json(folder / "peer-rejected.jsonl")
    rows = without_doubles(rows.filter(lambda reason: not reason, input_columns="reason"))
    split_of = place(rows)
    rows = rows.add_column("split", split_of).remove_columns(["sketch", "question", "reason"])
    for name in ("train", "val", "test"):
        part = rows.filter(lambda split, name=name: split == name, input_columns="split")
        part.to_json(folder / f"peer-{name}.jsonl", num_proc=CORES, force_ascii=False)
    return rows.select_columns(["messages", "id"])


def sketch_of(messages: list[dict[str, Any]]) -> Any:
    from rensa import RMinHash

    sketch = RMinHash(num_perm=near.PERMUTATIONS, seed=1)
    sketch.update(near.shingles(near.text_of(messages)))
    return sketch


def place(rows: Dataset) -> list[str]:
    """The split of each row: that of an earlier row with its question or nearly its text, else by its question's hash."""
    import numpy as np
    from rensa import RMinHashLSH

    search = RMinHashLSH(threshold=0.8, num_perm=near.PERMUTATIONS, num_bands=near.BANDS)
    found: list[str] = []
    of_question: dict[int, str] = {}
    for number, row in enumerate(rows.select_columns(["sketch", "question"])):
        sketch = pickle.loads(row["sketch"])
        alike = min(search.query(sketch), default=None)
        split = of_question.get(row["question"])
        if split is None:
            place = np.float64(row["question"]) / 2.0**56
            split = found[alike] if alike is not None else "test" if place < 0.1 else "val" if place < 0.2 else "train"
        of_question[row["question"]] = split
        found.append(split)
        search.insert(number, sketch)
    return found


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


STEPS = {"process": process, "process-less": process_less, "style": style, "render": render}

if __name__ == "__main__":
    datasets.disable_progress_bars()
    step, here = sys.argv[1], Path(sys.argv[2])
    STEPS[step](here).save_to_disk(str(here / f"peer-{step}"))
