"""Small real parts for tests: the real SmolLM2 tokenizer, tiny random Llamas, and a tiny one that was taught answers."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def smollm2_folder() -> Path:
    """The embedded model's folder (fetched and converted once, then from the cache)."""
    from scripts.utils import model_store

    return model_store.resolve(model_store.EMBEDDED_NAME).path


@functools.cache
def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder(), local_files_only=True)


def tiny_llama(*, seed: int = 0, context: int = 256, hidden: int = 32, vocab: int | None = None) -> Any:
    """A random two-layer Llama in fp32 with SmolLM2's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab or len(smollm2_tokenizer()),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            initializer_range=0.3,  # learns in a few dozen steps
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        return LlamaForCausalLM(config).eval()


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")


def tiny(name: str, *, vocab: int = 300, seed: int = 0) -> Any:
    """A random two-layer model of a family, in fp32; sliding windows of 16 tokens where the family has them."""
    import torch
    import transformers

    kind = {
        "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
        "gemma3": "Gemma3Text", "phi3": "Phi3", "smollm3": "SmolLM3",
    }[name]  # fmt: skip
    extra: dict[str, Any] = {"head_dim": 8} if name in ("qwen3", "gemma2", "gemma3") else {}
    extra |= {"sliding_window": 16} if name in ("mistral", "gemma2", "gemma3", "phi3") else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()


def teach(model: Any, pairs: Sequence[tuple[list[int], list[int]]], *, steps: int = 300, rate: float = 1e-2) -> Any:
    """Train ``model`` until it follows each prompt (ids) with its answer (ids, stop token included); about 40 steps."""
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows = [prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in pairs]
    answered = [[0] * (len(p) - 1) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in pairs]
    ids, wanted = torch.tensor(rows), torch.tensor(answered).bool()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0, fused=True
    )
    for _ in range(steps):
        optimizer.zero_grad()
        # logits of the answers alone: the vocabulary is most of the work
        logits = base.lm_head(base.model(input_ids=ids).last_hidden_state[:, :-1][wanted])
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
        if losses.max().item() < 0.1:
            return model.eval()
        losses.mean().backward()
        optimizer.step()
    raise AssertionError(f"the tiny model did not learn its answers (loss {losses.max().item():.2f})")


# --- a whole run folder, as train leaves it, with a tiny base model

CHATS = (
    ("Parcel 12 to Oslo is late", '{"city": "Oslo", "parcel": 12}'),
    ("Where is 7? It goes to Bern", '{"city": "Bern", "parcel": 7}'),
    ("Parcel 305 for Rome\nhas not come", '{"city": "Rome", "parcel": 305}'),
    ("hello", "Hello, how can I help?"),
    ("thanks", "You are welcome"),
)
SPLITS = {"train": (0, 1, 2, 3, 4), "val": (3, 4), "test": (0, 1, 2, 3)}
SYSTEM = "Answer as the parcel desk."
RUN = "tiny"


def make_run(folder: Path, *, mode: str = "lora", style: bool = False) -> Path:
    """Write base/, data/rendered/demo, outputs/tiny and adapters/tiny into ``folder``; ``CHATS`` are learnt by heart."""
    import torch
    from peft import LoraConfig, get_peft_model

    from scripts.utils import chat, model_store, stages, stamp
    from scripts.utils.encoding import encode

    before = Path.cwd()
    os.chdir(folder)
    try:
        tokenizer, base = smollm2_tokenizer(), folder / "base"
        template = chat.choose_template(tokenizer, "auto")
        first = [{"role": "system", "content": SYSTEM}] if style else []
        rows, pairs = [], []
        for number, (question, answer) in enumerate(CHATS):
            messages = [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            done = chat.render_conversation(template, tokenizer, messages)
            encoded = encode(tokenizer, done.text, done.spans)
            rows.append(
                {
                    "id": f"{number:064x}",
                    **vars(done),
                    "tokens": len(encoded.ids),
                    "source": {"file": "raw", "line": number + 1},
                }
            )
            cut = encoded.trained.index(True)
            pairs.append((encoded.ids[:cut], encoded.ids[cut : len(encoded.ids) - encoded.trained[::-1].index(True)]))
        # the base gives each question its neighbour's answer: it writes well, and is always wrong
        answers = [answer for _, answer in pairs]
        model = teach(
            tiny_llama(hidden=64), [(p, a) for (p, _), a in zip(pairs, answers[1:] + answers[:1], strict=True)]
        )
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        rendered = stages.folder("render", "demo")
        rendered.mkdir(parents=True)
        for split, numbers in SPLITS.items():
            (rendered / f"{split}.jsonl").write_text("".join(json.dumps(rows[n]) + "\n" for n in numbers))
        manifest = stages.write_manifest(rendered, "render", {}, {}, splits={s: len(n) for s, n in SPLITS.items()})
        if mode == "qlora":
            from scripts.utils.backends import load_causal_lm

            model = load_causal_lm(base, precision="fp32", device="cpu", quantised=True)
        if mode != "full":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            torch.manual_seed(0)
            model.requires_grad_(False)
            model = get_peft_model(
                model, LoraConfig(r=32, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
            )
        teach(model, pairs)
        model.save_pretrained(stamp.adapter_folder(RUN))
        tokenizer.save_pretrained(stamp.adapter_folder(RUN))
        stamp.write(
            RUN,
            {
                "run": RUN,
                "status": "finished",
                "starts": [{"ended": "finished"}],
                "model": {"name": str(base), "revision": None, "path_hash": model_store.content_hash(base)},
                "tuning": {"mode": mode},
                "precision": {"actual": "fp32"},
                "render": {"max_length": 256, "template_hash": template.hash},
                "data": {"name": "demo", "hash": stages.data_hash(manifest)},
                "style": {"text": SYSTEM, "mode": "replace"} if style else None,
            },
        )
        (folder / "c.yaml").write_text(
            "run: {name: tiny}\neval: {max_new_tokens: 24, batch_size: 3}\ninfer: {max_new_tokens: 24}\n"
        )
    finally:
        os.chdir(before)
    return folder


@functools.cache
def _made_run(mode: str, style: bool) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sft-tiny-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_run(folder, mode=mode, style=style)


def enter_run(where: Path, monkeypatch: Any, *, mode: str = "lora", style: bool = False) -> Path:
    """Copy a made run into ``where`` (the base model stays where it was made), and work there.

    The steps' ``main`` may then be called in this process, which has imported torch already.
    """
    from scripts.utils import environment

    for part in ("data", "outputs", "adapters"):
        shutil.copytree(_made_run(mode, style) / part, where / part)
    shutil.copy(_made_run(mode, style) / "c.yaml", where)
    monkeypatch.chdir(where)
    monkeypatch.setattr(environment, "_HEAVY", ())
    for name in [name for name in os.environ if name.startswith("SFT_") and name != "SFT_MODEL_CACHE"]:
        monkeypatch.delenv(name)
    return where
