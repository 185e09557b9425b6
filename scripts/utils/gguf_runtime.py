"""A GGUF file in a real runtime, llama.cpp by way of the package xllamacpp, in a child process of its own.

The parent asks for the log-probabilities that the runtime gives to next tokens, for its token ids of some texts, and for
what it makes of the chat template. A runtime that crashes takes only the child with it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from scripts.utils.errors import RefusedError
from scripts.utils.files import REPO_ROOT

SECONDS = 600
ASKED = 40  # likeliest next tokens that the runtime is asked for


def installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def ask(
    file: Path, *, prompts: list[list[int]], texts: list[str], chats: list[list[dict[str, str]]], context: int
) -> dict[str, Any]:
    """``next``: for each prompt (ids) log-probabilities by token id; ``ids``: of each text; ``chats``: each as text.

    Raises ``RefusedError`` where the runtime does not load the file or dies.
    """
    request = {"file": str(file.absolute()), "prompts": prompts, "texts": texts, "chats": chats, "context": context}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "scripts.utils.gguf_runtime"],
            input=json.dumps(request),
            cwd=REPO_ROOT,
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RefusedError(
            f"{file.absolute()}: the runtime gave no answer in {SECONDS} s", "report this as a bug"
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise RefusedError(
            f"{file.absolute()}: the runtime (xllamacpp) does not run it: {said[-1][:300] if said else done.returncode}",
            "report this as a bug, with the kind of model",
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["file"]
    parameters.n_ctx = request["context"]
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    # its defaults round what it remembers of earlier tokens, and attention, to f16, which has nothing to do with the file
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = False
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    found = [_next(server, ids) for ids in request["prompts"]]
    url = server.listening_address
    ids = [
        _post(url, "/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        for text in request["texts"]
    ]
    chats = [_post(url, "/apply-template", {"messages": chat})["prompt"] for chat in request["chats"]]
    return {"next": found, "ids": ids, "chats": chats}


def _next(server: Any, ids: list[int]) -> dict[int, float]:
    # an end token that is drawn comes without log-probabilities; those that are told are of the model, before any ban
    request = {"prompt": ids, "max_tokens": 1, "logprobs": ASKED, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(request)
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    print(json.dumps(_serve(json.loads(sys.stdin.read()))), flush=True)
