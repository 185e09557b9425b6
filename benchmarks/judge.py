"""Held-out loss of several adapters of one base, in fp32, one row at a time, from whole logits: reads judge.json, writes judged.json."""

from pathlib import Path

from scripts.utils import environment, files


def main() -> None:
    environment.prepare(files.REPO_ROOT)
    import torch

    from scripts.utils.backends import load_causal_lm
    from scripts.utils.encoding import Encoded
    from scripts.utils.loss import Exact, batch_loss, whole_loss
    from scripts.utils.trained import attach_adapter

    request = files.read_json(Path("judge.json"))
    held = [Encoded(row["ids"], row["trained"]) for row in files.read_jsonl(Path("held.jsonl"))]
    plain = Exact(packing=False, segments=False, shared=False, chunked=False)
    found = {}
    for name, adapter in {"base": None, **request["adapters"]}.items():
        model = load_causal_lm(
            Path(request["model"]), precision="fp32", device="cuda" if torch.cuda.is_available() else "cpu"
        )
        if adapter:
            model = attach_adapter(model, Path(adapter))
        total, count = batch_loss(model, held, 1, loss=whole_loss, exact=plain)
        found[name] = total / max(count, 1)
    files.write_json(Path("judged.json"), found)


if __name__ == "__main__":
    main()
