"""selftest: on the model of this config, every fast way of computing a step has the loss and gradients of the plain one.

Rows in one row against each alone, accumulated against at once, loss in chunks against whole logits, a shared beginning
against a repeated one. Compares on a few made-up conversations, in the run's own precision; trains and writes nothing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import backends, chat, command, console, hardware, model_store, rendered
from scripts.utils.encoding import Encoded
from scripts.utils.errors import MachineError, UserError
from scripts.utils.loss import on_device, summed_loss, whole_loss
from scripts.utils.packing import to_row

if TYPE_CHECKING:
    import torch

    from scripts.utils.schema import Config

Rows = list[list[Encoded]]
_STYLE = "You answer questions about numbers. Be brief, be exact, and write each answer as one whole sentence."
# of the loss, and of the gradient (as the norm of the difference); 16-bit numbers hold about three digits
_ALLOWED = {"fp32": (1e-5, 1e-3), "bf16": (2e-2, 1e-1), "fp16": (1e-2, 5e-2)}


def build_parser() -> argparse.ArgumentParser:
    examples = ["make selftest", "make selftest CONFIG=configs/run_bnb.yaml", "sft-selftest --model my/model"]
    return command.new_parser(
        "selftest", "Compare the fast ways of training with the plain one.", examples, keys=["model"]
    )


def work(arguments: argparse.Namespace, config: "Config") -> None:
    if config.tuning.backend == "unsloth":
        raise UserError("selftest compares what bitsandbytes runs", "add SET=tuning.backend=bitsandbytes")
    machine = hardware.detect()
    precision = hardware.choose_precision(config, machine).actual
    path = model_store.resolve(config.model.name, config.model.revision).path
    tokenizer = chat.load_tokenizer(path)
    rows = conversations(tokenizer, chat.choose_template(tokenizer, config.render.template))
    loaded = backends.load_for_training(config, path, "bitsandbytes", precision, machine)
    wake_adapter(loaded.model)
    compared = "fp32" if config.tuning.mode == "full" else precision  # as its weights are, and as train compares it
    console.note("selftest", f"{config.model.name}: {config.tuning.mode} on {machine.name} in {compared}")
    table, failed = [], []
    for name, plain, fast in comparisons(loaded.model, rows):
        loss, gradient = difference(plain(), fast())
        allowed = _ALLOWED[compared]
        good = loss <= allowed[0] and gradient <= allowed[1]
        failed += [] if good else [name]
        table.append((name, f"{loss:.1e}", f"{gradient:.1e}", "equal" if good else "DIFFERENT"))
    console.table("selftest: relative differences", ("", "loss", "gradient", ""), table)
    if failed:
        raise MachineError(
            f"not the same as the plain way on this model: {', '.join(failed)}",
            "train compares too and leaves out what differs; please report this with the lines above",
        )
    if compared != "fp32":
        console.note(
            "selftest",
            f'that is equal to the rounding of {compared}; more digits: make selftest SET="train.precision=fp32"',
        )


def conversations(tokenizer: Any, template: chat.Template) -> list[Encoded]:
    """A few short conversations behind one system message (or one first question, where the template knows none)."""
    made = []
    for number in range(2, 6):
        turns = [
            {"role": "system", "content": _STYLE},
            {"role": "user", "content": f"What is {number} times {number + 1}?"},
            {"role": "assistant", "content": f"{number} times {number + 1} is {number * (number + 1)}."},
        ]
        try:
            done = chat.render_conversation(template, tokenizer, turns)
        except UserError:
            turns = [{**turns[1], "content": f"{_STYLE}\n\n{turns[1]['content']}"}, turns[2]]
            done = chat.render_conversation(template, tokenizer, turns)
        made.append(vars(done))
    return rendered.to_examples(tokenizer, made)


def wake_adapter(model: Any) -> None:
    """A new adapter's second half is zero, so its first would have no gradient to compare."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


Found = tuple[float, "torch.Tensor"]


def comparisons(model: Any, examples: list[Encoded]) -> list[tuple[str, Callable[[], "Found"], Callable[[], "Found"]]]:
    """Name, the plain way, the fast way."""
    from scripts.utils.attention import can_segment
    from scripts.utils.lean_lora import lean_layers

    alone: Rows = [[example] for example in examples]
    halves: Rows = [examples[:2], examples[2:]]
    segmented = can_segment(model)

    def way(rows: Rows, loss: Any, segments: bool, shared: bool = False, lean: bool = False) -> Callable[[], "Found"]:
        return lambda: compute(model, rows, loss, segments, shared, lean)

    plain = way(alone, whole_loss, False)
    found = [
        ("loss in chunks = whole logits", plain, way(alone, summed_loss, False)),
        ("packed = one at a time", plain, way([examples], summed_loss, segmented)),
        ("accumulated = at once", way([examples], whole_loss, False), way(halves, summed_loss, segmented)),
    ]
    if segmented:
        found.append(("shared beginning = repeated", plain, way([examples], summed_loss, True, shared=True)))
    if lean_layers(model):
        found.append(("lean LoRA = PEFT's own", plain, way(alone, whole_loss, False, lean=True)))
    return found


def compute(model: Any, rows: Rows, loss: Any, segments: bool, shared: bool, lean: bool) -> "Found":
    """Summed loss and the gradients of all trained weights, one after another."""
    import torch

    from scripts.utils import lean_lora
    from scripts.utils.attention import by_segment

    model.eval()  # no dropout: two passes must be comparable
    trained = [p for p in model.parameters() if p.requires_grad]
    total = 0.0
    gradients = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
    with by_segment(model, segments), lean_lora.lean(model, lean):
        for row in rows:
            value = loss(model, on_device(to_row(row, shared), trained[0].device))
            total += float(value.detach())
            for sum_so_far, gradient in zip(gradients, torch.autograd.grad(value, trained), strict=True):
                sum_so_far += gradient
    return total, torch.cat([gradient.flatten() for gradient in gradients])


def difference(plain: "Found", fast: "Found") -> tuple[float, float]:
    loss = abs(fast[0] - plain[0]) / abs(plain[0])
    return loss, float((fast[1] - plain[1]).norm() / plain[1].norm())


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
