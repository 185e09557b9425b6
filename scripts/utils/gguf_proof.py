"""Is a GGUF file the model it was made from? Its tensors, its logits in transformers, and a real runtime's answers."""

import gc
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, gguf_export, gguf_runtime, merge_proof, rendered, stages
from scripts.utils.chat import render_prompt
from scripts.utils.errors import MachineError, RefusedError
from scripts.utils.exporting import Whole

if TYPE_CHECKING:
    import torch

POSITIONS = 8  # of each row, at which the runtime is asked for the next token
_SAMPLE = "Café déjà vu, 12345 Häuser; it's   «fine» — don't?\n\n\tx = [1,2]  # 日本語 🙂\r\nend"


def check_space(target: Path, weights: int, quant: str) -> None:
    """``weights``: bytes of the model's folder. Raises ``MachineError`` where the file will not fit beside it."""
    need = weights * {"f32": 2, "q8_0": 0.6}.get(quant, 1.05) + 50_000_000
    free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
    if free < need:
        raise MachineError(
            f"{target.parent.absolute()}: the file needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free",
            "free some space (make clean shows what it would remove), then run the same command again",
        )


def prove(whole: Whole, file: Path, plan: "gguf_export.Plan | None", quant: str, tolerance: float) -> dict[str, Any]:
    """Raises ``RefusedError`` where one of the comparisons fails; what could not be compared is missing in the answer."""
    proof: dict[str, Any] = {}
    if plan and quant in gguf_export.KINDS:
        proof["tensors"] = gguf_export.compare_tensors(file, plan, quant)
    rows = merge_proof.rows("export-gguf", whole.facts, whole.tokenizer, whole.template)
    model = _load(whole)
    if model is None:
        console.warn("the model does not fit into this machine's memory in fp32: its answers are not compared")
        return proof
    references = merge_proof.reference(model, rows)
    asked = [(number, place) for number, ids in enumerate(rows) for place in _places(len(ids))]
    wanted = [_next_of(references[number], place) for number, place in asked]
    if plan:
        gguf_export.load_into(model, file, plan)
        proof["logits"] = merge_proof.compare(model, references)
        _judge("transformers with the file's weights", proof["logits"], tolerance)
    del model
    gc.collect()
    if not gguf_runtime.installed():
        return proof
    proof["runtime"] = _in_runtime(whole, file, [rows[number][:place] for number, place in asked], wanted)
    _judge("the runtime (xllamacpp)", proof["runtime"], tolerance)
    return proof


def _load(whole: Whole) -> Any:
    """The original in fp32, or None where the memory does not hold it."""
    import psutil
    from transformers import AutoConfig

    from scripts.utils.backends import load_causal_lm

    config = AutoConfig.from_pretrained(str(whole.folder), local_files_only=True, trust_remote_code=False)
    bytes_each = 4 if "32" in str(config.dtype) else 2
    parameters = sum(path.stat().st_size for path in whole.folder.glob("*.safetensors")) // bytes_each
    if psutil.virtual_memory().available < 5 * parameters:
        return None
    return load_causal_lm(whole.folder, precision="fp32", device="cpu").eval()


def _places(length: int) -> list[int]:
    """Lengths of the beginnings of a row whose next token is asked for, spread evenly."""
    count = min(POSITIONS, length - 1)
    return sorted({(length - 1) * (number + 1) // count for number in range(count)}) if count > 0 else []


def _next_of(reference: merge_proof.Reference, place: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Likeliest next tokens after ``place`` tokens, and their log-probabilities (both [10])."""
    return reference.top[place - 1], reference.adapted[place - 1]


def _in_runtime(
    whole: Whole, file: Path, prompts: list[list[int]], wanted: "list[tuple[torch.Tensor, torch.Tensor]]"
) -> dict[str, Any]:
    texts = [_SAMPLE, *_texts(whole)]
    chats = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
        [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Three"},
        ],
    ]
    console.note("export-gguf", f"asking the runtime (xllamacpp) at {len(prompts)} places")
    answer = gguf_runtime.ask(file, prompts=prompts, texts=texts, chats=chats, context=max(map(len, prompts)) + 64)
    weighted, largest, agreed = 0.0, 0.0, 0
    for (top, known), found in zip(wanted, answer["next"], strict=True):
        logs = {int(number): value for number, value in found.items()}
        floor = min(logs.values())  # one that is not among those told is at most as likely as the last of them
        for number, value in zip(top.tolist(), known.tolist(), strict=True):
            off = abs(logs.get(number, min(floor, value)) - value)
            weighted += off * math.exp(value) / len(wanted)
            largest = max(largest, off if math.exp(value) >= merge_proof.LIKELY else 0.0)
        agreed += max(logs, key=lambda number: logs[number]) == int(top[0])
    ids = [whole.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    shown = [render_prompt(whole.template, whole.tokenizer, chat).text for chat in chats]
    bos = whole.tokenizer.bos_token or ""
    return {
        "mean_difference": weighted,
        "max_difference": largest,
        "greedy_agreement": agreed / len(wanted),
        "positions": len(wanted),
        "texts": len(texts),
        "same_ids": sum(mine == its for mine, its in zip(ids, answer["ids"], strict=True)),
        "chats": len(chats),
        # the runtime takes away a begin token that it will put there itself
        "same_chats": sum(
            its in (mine, mine.removeprefix(bos)) for mine, its in zip(shown, answer["chats"], strict=True)
        ),
    }


def _texts(whole: Whole) -> list[str]:
    """Texts of rows that the run rendered, where they still lie there."""
    folder = stages.folder("render", whole.facts["data"]["name"])
    for split in ("test", "val", "train"):
        if (folder / f"{split}.jsonl").is_file():
            rows = [row["text"] for row, _ in zip(rendered.read_rows(folder, split), range(20), strict=False)]
            if rows:
                return rows
    return []


def _judge(what: str, proof: dict[str, Any], tolerance: float) -> None:
    if not proof["mean_difference"] <= tolerance:
        raise RefusedError(
            f"{what} does not answer as the model does: log-probabilities differ by {proof['mean_difference']:.4f} on average "
            f"(at most {proof['max_difference']:.4f}), merge.tolerance is {tolerance:g}; nothing was written",
            "QUANT=f16 rounds less than q8_0, bf16 keeps large weights; if f32 differs too, report it as a bug",
        )
    if proof.get("same_ids", 0) != proof.get("texts", 0):
        raise RefusedError(
            f"{what} cuts {proof['texts'] - proof['same_ids']} of {proof['texts']} texts into other tokens than the model's own "
            "tokenizer; nothing was written",
            "report this as a bug, with the name of the base model",
        )
    if proof.get("same_chats", 0) != proof.get("chats", 0):
        console.warn(
            f"{what} makes another text of {proof['chats'] - proof['same_chats']} of {proof['chats']} sample conversations "
            "than the run was trained with: give it the prompt as text, rendered by this project"
        )


def sentence(name: str, proof: dict[str, Any] | None) -> str:
    """What a comparison showed, in one line."""
    if proof is None:
        return {
            "tensors": "not compared: the converter's file has names or numbers not known here",
            "logits": "not compared",
            "runtime": "not run here (make install EXTRAS=gguf brings xllamacpp)",
        }[name]
    if name == "tensors":
        return f"all {proof['tensors']:,} read back; at most {proof['largest_difference']:.1e} off, relative to the largest near it"
    text = (
        f"{proof['mean_difference']:.5f} on average, {proof['max_difference']:.5f} at most; likeliest token the same at "
        f"{proof['greedy_agreement']:.2%} of {proof['positions']:,} places"
    )
    if name == "runtime":
        text += f"; token ids of {proof['same_ids']} of {proof['texts']} texts and {proof['same_chats']} of {proof['chats']} chats the same"
    return text
