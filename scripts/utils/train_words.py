"""What train says of itself: its choices before it begins, the sum of it all at the end, and a run's stamp."""

from typing import TYPE_CHECKING, Any

from scripts.utils import backend_choice, console, hardware, planning, ranks, sharding, stamp

if TYPE_CHECKING:
    from scripts.utils.loss import Exact
    from scripts.utils.schema import Config


def say_choices(
    choice: backend_choice.BackendChoice, precision: hardware.PrecisionChoice, machine: hardware.Hardware
) -> None:
    if choice.reason:
        console.warn(
            f"Unsloth was asked for, but {choice.reason}. This run uses bitsandbytes instead: the same training, slower "
            f"on a GPU; the stamp says so. What helps: {choice.remedy}; tuning.fallback: never refuses instead."
        )
    elif choice.actual == "unsloth" and machine.device == "cpu":
        console.note("train", "Unsloth is no faster on a CPU; bitsandbytes is the usual choice here")
    if precision.changed:
        console.warn(f"precision {precision.requested} was asked for; training in {precision.actual}: {precision.why}")
    console.note("train", f"{choice.actual} on {machine.name} in {precision.actual} ({precision.why})")


def say_plan(plan: planning.Plan | None, why_none: str, wanted: "Config") -> None:
    if plan is None:
        console.note("train", f"no plan of the memory: {why_none}")
        return
    console.note("train", f"plan: {plan.verdict()}")
    console.note("train", f"plan: {plan.choices()}")
    if wanted.model.embeddings == "host" and not plan.run.host_embeddings:
        console.warn(
            "model.embeddings: host has no use here: the table is trained, shared with the head, or not on a card"
        )
    if not plan.fits:
        console.warn("by plan this run does not fit; it is tried all the same. make plan says what to change")


def say_ranks(config: "Config") -> None:
    count = ranks.world_size()
    if count < 2:
        return
    how = {"ddp": "each with the whole model (DDP)", "fsdp": "the model in shards (FSDP2)"}.get(sharding.engine(config))
    how = how or f"each with the whole model and a part of the optimizer's states (ZeRO stage {sharding.zero_stage()})"
    console.note("train", f"{count} processes, {how}; the step's rows are dealt out, so the same is learnt as by one")
    if config.train.gradient_accumulation < count:
        console.warn(
            f"a step has {config.train.gradient_accumulation} micro batches for {count} processes: some have nothing to do. "
            f"train.gradient_accumulation: {count} or more uses all; it makes the step larger, or train.batch_size smaller"
        )


def say_exact(exact: "Exact", fused: bool) -> None:
    how = ["packed rows" if exact.packing else "padded rows"]
    if exact.packing:
        by_segment = "attention by segment" + (" in one kernel" if exact.kernel else "")
        how += [by_segment if exact.segments else "attention masked over the whole row"]
    how += ["shared beginnings computed once"] if exact.shared else []
    how += ["the backend's own loss" if fused else "loss in chunks" if exact.chunked else "loss from whole logits"]
    how += ["lean LoRA"] if exact.lean else []
    how += [f"fused kernels of {exact.fused}"] if exact.fused else []
    console.note("train", f"{', '.join(how)}; compared with one example at a time")


def summarise(run: str, trainer: Any, best: str | None) -> None:
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    console.facts(
        f"run {run} is trained",
        [
            ("steps", f"{trainer.state.global_step:,} ({trainer.run_state.tokens:,} tokens)"),
            ("train loss", f"{losses[0]['loss']:.4f} → {losses[-1]['loss']:.4f}" if losses else "–"),
            ("val loss", f"{evals[0]:.4f} → {evals[-1]:.4f}, best {min(evals):.4f}" if evals else "– (no val rows)"),
            ("kept", f"the best checkpoint ({best})" if best else "the last step"),
            ("adapter", f"{stamp.adapter_folder(run)}"),
            ("next", f"make eval RUN={run}   make infer RUN={run}   make merge RUN={run}"),
        ],
    )


def show_stamp(run: str) -> None:
    known = stamp.require(run)
    console.facts(f"run {run}: {known['status']}", stamp.for_people(known))
    console.table(
        "starts",
        ["began", "from step", "reached", "ended"],
        [(start["at"], start["from_step"], start["step"], start["ended"]) for start in known["starts"]],
    )
    console.result(f"all of it: {stamp.path_of(run)}")
