"""The process that serves: it prepares the run's folder and becomes an existing engine, transformers serve or vLLM.

`transformers serve` knows no key, lists the models of the hub's cache, and loads any other model that a request asks
for; so a door stands before it, which asks for the key, names the one model there is, and opens the routes that
answer. vLLM has all of this itself.
"""

import hmac
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import console, environment, files, servers
from scripts.utils.errors import SFTError

if TYPE_CHECKING:
    from scripts.utils.schema import InferSection
    from scripts.utils.trained import Found

KEY = "SERVE_API_KEY"
OPEN = ("/health", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Question:
    """What the parent asks for: ``folder`` is an empty one that it deletes afterwards."""

    run: str
    which: str
    engine: str
    host: str
    port: int
    folder: str
    settings: dict[str, Any]


class Door:
    """ASGI: everything but /health needs the key, where there is one, and only the routes in ``OPEN`` are there."""

    def __init__(self, app: Any, model: str, key: str) -> None:
        self.app, self.model, self.key = app, model, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path != "/health" and not self._has_key(scope):
            answer = JSONResponse(_error("wrong or missing API key", "invalid_api_key"), 401)
        elif path not in OPEN:
            answer = JSONResponse(_error(f"there is no {path} here", "not_found"), 404)
        elif path == "/v1/models":
            only = {"id": self.model, "object": "model", "created": 0, "owned_by": "sft-play"}
            answer = JSONResponse({"object": "list", "data": [only]})
        else:
            await self.app(scope, receive, send)
            return
        await answer(scope, receive, send)

    def _has_key(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        return not self.key or hmac.compare_digest(given, self.key)


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


def main() -> int:
    try:
        environment.prepare(files.REPO_ROOT)
        os.environ["HF_HUB_OFFLINE"] = "1"  # one model is served, and it is here
        question = Question(**json.loads(sys.argv[1]))
        from scripts.utils.schema import InferSection

        _become_engine(question, InferSection.model_validate(question.settings))
    except SFTError as problem:
        console.error(problem.message, problem.hint)
        return problem.exit_code
    except KeyboardInterrupt:  # while it was loading
        return 130
    return 0


def _become_engine(question: Question, settings: "InferSection") -> None:
    from scripts.utils.served import prepare
    from scripts.utils.trained import find_trained, inference_precision

    found = find_trained(question.run, which=question.which)  # type: ignore[arg-type]
    machine, precision = inference_precision(found.facts["precision"]["actual"])
    adapter = found.adapter.absolute() if found.adapter else None
    prepare(found, Path(question.folder) / question.run, settings, with_adapter=question.engine == "transformers")
    console.note("serve", f"run {question.run}: {found.folder}; {precision} on {machine.device}; by {question.engine}")
    os.chdir(question.folder)  # so that the run's name is the model's name, to the engine and to those who ask it
    if question.engine == "vllm":
        words = vllm_command(question, _DTYPES[precision], adapter, found)
        os.execvp(words[0], words)
    _serve_with_transformers(question, _DTYPES[precision], machine.device, found)


def _serve_with_transformers(question: Question, dtype: str, device: str, found: "Found") -> None:
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    build = server.build_server

    def build_with_door(*arguments: Any, **options: Any) -> Any:
        app = build(*arguments, **options)
        app.add_middleware(Door, model=question.run, key=os.environ.get(KEY, ""))
        if question.host == servers.LOOPBACK:  # else a web page could make itself a name for this machine, and read
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[servers.LOOPBACK, "localhost"])
        return app

    server.build_server = build_with_door
    if found.quantised:
        model_manager.ModelManager = _four_bits(model_manager.ModelManager, found)
    Serve(
        force_model=question.run,
        host=question.host,
        port=question.port,
        device=device,
        dtype=dtype,
        quantization="bnb-4bit" if found.quantised else None,
    )


def _four_bits(manager: Any, found: "Found") -> Any:
    """The engine's loader, with 4-bit weights as in training."""
    from scripts.utils.backends import keep_four_bits, nf4
    from scripts.utils.trained import inference_precision

    class FourBits(manager):  # type: ignore[misc]
        def get_quantization_config(self) -> Any:
            return nf4(inference_precision(found.facts["precision"]["actual"])[1])

        def _load_model(self, *arguments: Any, **options: Any) -> Any:
            model = super()._load_model(*arguments, **options)
            keep_four_bits(model)
            return model

    return FourBits


def vllm_command(question: Question, dtype: str, adapter: Path | None, found: "Found") -> list[str]:
    """vLLM's own command line; it takes the key from VLLM_API_KEY. Not run on a GPU yet."""
    words = ["vllm", "serve", question.run, "--host", question.host, "--port", str(question.port), "--dtype", dtype]
    if found.quantised:
        words += ["--quantization", "bitsandbytes"]
    if adapter is None:
        return [*words, "--served-model-name", question.run]
    rank = files.read_json(adapter / "adapter_config.json")["r"]
    allowed = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    lora = ["--enable-lora", "--max-lora-rank", str(allowed), "--lora-modules", f"{question.run}={adapter}"]
    return [*words, "--served-model-name", f"{question.run}-base", *lora]


if __name__ == "__main__":
    raise SystemExit(main())
