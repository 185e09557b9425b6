"""The embedded model is the GGUF that it came from: same numbers, same tokens, and it can talk."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import embedded_model, model_store
from scripts.utils.errors import RefusedError
from scripts.utils.gguf_file import GGUFFile

# ids that llama.cpp (xllamacpp 2026.10.11549, POST /tokenize with parse_special) gives for the same GGUF
# fmt: off
LLAMA_CPP_IDS: list[tuple[str, list[int]]] = [
    ("2024-11-25 costs $1,234,567.89 (007)", [34, 32, 34, 36, 29, 33, 33, 29, 34, 37, 3499, 1885, 33, 28, 34, 35, 36, 28, 37, 38, 39, 30, 40, 41, 365, 32, 32, 39, 25]),
    ("x=10**3;y=0x1F3A", [104, 45, 33, 32, 828, 35, 43, 105, 45, 32, 104, 33, 54, 35, 49]),
    ("def f(n: int) -> int:\n    return n if n < 2 else f(n - 1) + f(n - 2)\n", [1604, 275, 24, 94, 42, 464, 25, 4722, 464, 42, 472, 1003, 304, 585, 304, 2067, 216, 34, 1745, 275, 24, 94, 731, 216, 33, 25, 1232, 275, 24, 94, 731, 216, 34, 25, 198]),
    ("for (let i = 0; i < 10; i++) {\n\tconsole.log(`a${i}`);\r\n}", [1710, 365, 2016, 2056, 446, 216, 32, 43, 2056, 2067, 216, 33, 32, 43, 2056, 11444, 25, 1662, 198, 197, 38461, 30, 3107, 24, 80, 81, 20, 107, 89, 109, 80, 4258, 201, 198, 109]),
    ("I'm sure you've said they'll, we'd, it's 'QUOTED' and DON'T", [57, 5248, 2090, 346, 3543, 1137, 502, 3060, 28, 392, 6737, 28, 357, 506, 637, 11745, 4515, 3010, 23, 284, 422, 2154, 23, 68]),
    ("  two leading,   three inner, trailing  ", [216, 827, 2899, 28, 256, 1296, 6210, 28, 35079, 256]),
    ("\n\n\ttabs\t\tand\n \n newlines\n", [1116, 197, 100, 7366, 197, 197, 397, 198, 3717, 725, 5110, 198]),
    ("Zürich naïve façade — “quotes” … ½ ²³ №5", [74, 7170, 5130, 15486, 46494, 40852, 1841, 619, 385, 2346, 573, 5548, 216, 16738, 216, 19133, 39050, 4636, 222, 240, 37]),
    ("日本語のテキストと한국어 और हिन्दी עברית", [23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134, 11100, 226, 7365, 118, 33085, 246, 181, 130, 251, 183, 240, 129, 12335, 238, 21891, 12335, 134, 27011, 30658, 16525, 44757, 37189, 12960, 112, 37657, 30825, 28532, 120]),
    ("\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f1e8\U0001f1ed ok \U0001f44d\U0001f3fd!", [10813, 38887, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 321, 231, 10813, 235, 116, 10813, 225, 118, 10813, 225, 251, 10907, 15107, 235, 231, 10813, 233, 138, 17]),
    ("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", [1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198]),
    ("<|endoftext|><repo_name>a/b<file_sep>c.py<jupyter_start>", [0, 3, 81, 31, 82, 5, 83, 30, 1306, 11]),
    ("almost <|im_end| > and <|im_start", [27423, 2067, 108, 306, 79, 486, 108, 2986, 284, 2067, 108, 306, 79, 3738]),
    ('{"name": "Ann", "total": 12.50, "items": [1, 22, 333]}', [39428, 1245, 1799, 476, 22940, 1002, 476, 9712, 1799, 216, 33, 34, 30, 37, 32, 28, 476, 8416, 1799, 933, 33, 28, 216, 34, 34, 28, 216, 35, 35, 35, 28852]),
    ("https://example.org/a?b=1&c=%20#x", [4687, 1742, 7434, 30, 2295, 31, 81, 47, 82, 45, 33, 22, 83, 23446, 34, 32, 19, 104]),
    ("١٢٣ and ５６７ and Ⅷ", [164, 111, 164, 112, 164, 113, 284, 216, 8083, 239, 8083, 240, 8083, 241, 284, 216, 173, 223, 117]),
    ("a\x00b\u200bc\xa0d\ufeffe", [81, 190, 82, 321, 229, 83, 15442, 84, 186, 136, 140, 85]),
    ("﷽ ẞ İ ǅ ﬁ", [186, 132, 138, 15822, 135, 248, 24488, 125, 216, 146, 223, 40367]),
    ("", []),
    (" ", [216]),
    ("The quick brown fox jumps over 13 lazy dogs.", [504, 2365, 6354, 16438, 27003, 690, 216, 33, 35, 23790, 5046, 30]),
    ("total:  12   7\n\n3 \t4  ½²٣", [9712, 42, 256, 33, 34, 333, 39, 1116, 35, 216, 197, 36, 256, 16738, 19133, 164, 113]),
    ("  - id: 42\n    at:   2024-01-02T03:04:05Z\n", [216, 731, 4492, 42, 216, 36, 34, 472, 418, 42, 333, 34, 32, 34, 36, 29, 32, 33, 29, 32, 34, 68, 32, 35, 42, 32, 36, 42, 32, 37, 74, 198]),
]
# fmt: on
# its greedy continuation of "The three largest planets are"; it computes with 8-bit activations, so the two part later
LLAMA_CPP_GREEDY = [14713, 28, 16440, 28, 284, 36985, 30, 198, 198, 504, 3995, 3925, 314, 441, 253, 2811, 8455]


@pytest.fixture(scope="session")
def folder() -> Path:
    return model_store.resolve(model_store.EMBEDDED_NAME).path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_model.fetch_gguf(tmp_path_factory.mktemp("gguf"), print)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def test_every_token_and_merge_is_the_gguf_own(folder: Path, gguf: Path, tokenizer: Any) -> None:
    with GGUFFile(gguf) as source:
        tokens = source.metadata["tokenizer.ggml.tokens"]
        merges = source.metadata["tokenizer.ggml.merges"]
        kinds = source.metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(list(range(49152))) == tokens
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert [" ".join(pair) for pair in written["model"]["merges"]] == merges
    special = [token["id"] for token in written["added_tokens"] if token["special"]]
    assert special == [i for i, kind in enumerate(kinds) if kind == 3]


@pytest.mark.parametrize(("text", "ids"), LLAMA_CPP_IDS, ids=range(len(LLAMA_CPP_IDS)))
def test_text_becomes_the_ids_that_llama_cpp_gives_and_back(tokenizer: Any, text: str, ids: list[int]) -> None:
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text


def test_end_token_is_im_end_and_no_begin_token_is_added(tokenizer: Any, model: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
    )
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 2
    assert tokenizer("").input_ids == []


def test_chat_template_is_the_gguf_own(gguf: Path, tokenizer: Any) -> None:
    with GGUFFile(gguf) as source:
        assert tokenizer.chat_template == source.metadata["tokenizer.chat_template"]
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_config_is_the_published_one(model: Any) -> None:
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (576, 30, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (100000, 1e-5)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_dequantised_numbers_are_those_of_the_gguf_package(gguf: Path) -> None:
    digest = hashlib.sha256()
    with GGUFFile(gguf) as source:
        for name, values in source.tensors():
            digest.update(name.encode())
            digest.update(values.tobytes())
    # made once with gguf.quants.dequantize of gguf 0.19.0, all 272 tensors in file order
    assert digest.hexdigest() == "3d36236037ab7420ec103c8e026cc38edbde536506031ea7d8c37e1530fb4fe0"


def test_answers_and_predicts_english(tokenizer: Any, model: Any) -> None:
    import torch

    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    sentence = tokenizer("The sun rises in the east and sets in the west.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(model(input_ids=sentence, labels=sentence).loss.exp()) < 12


def test_greedy_continuation_is_the_one_of_llama_cpp(tokenizer: Any, model: Any) -> None:
    prompt = tokenizer("The three largest planets are", return_tensors="pt")
    length = prompt.input_ids.shape[1]
    tokens = model.generate(**prompt, max_new_tokens=len(LLAMA_CPP_GREEDY), do_sample=False)[0, length:]
    assert tokens.tolist() == LLAMA_CPP_GREEDY


def test_another_checksum_is_refused_and_nothing_is_written(gguf: Path, tmp_path: Path) -> None:
    altered = bytearray(gguf.read_bytes())
    altered[-1] ^= 1
    (tmp_path / "altered.gguf").write_bytes(altered)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RefusedError, match="sha256") as caught:
        embedded_model.convert(tmp_path / "altered.gguf", out)
    assert caught.value.exit_code == 3
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"PK\x03\x04" + b"\0" * 64])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(RefusedError, match=r"x\.gguf"):
        GGUFFile(tmp_path / "x.gguf")
