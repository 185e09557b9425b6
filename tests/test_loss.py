"""Packed rows, shared beginnings and the loss in chunks change no loss and no gradient, in every architecture."""

import copy
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.utils import chunked_loss
from scripts.utils.attention import NAME, by_segment, can_segment, is_segmented
from scripts.utils.autocast import mixed
from scripts.utils.encoding import Encoded
from scripts.utils.loss import Exact, Loss, batch_loss, find_exact, on_device, summed_loss, whole_loss
from scripts.utils.packing import make_rows, pack, rows_in_order, shared_prefixes, split_indices, to_row
from tests.tiny_models import FAMILIES, tiny

VOCAB = 300


def examples(count: int = 6, prefix: int = 0, seed: int = 1) -> list[Encoded]:
    """Rows of different lengths, each with a question and a trained answer, after the same ``prefix`` tokens."""
    chosen = random.Random(seed)
    begin = [chosen.randrange(VOCAB) for _ in range(prefix)]
    made = []
    for _ in range(count):
        asked, answered = chosen.randint(3, 20), chosen.randint(1, 15)
        ids = begin + [chosen.randrange(VOCAB) for _ in range(asked + answered)]
        made.append(Encoded(ids, [False] * (prefix + asked) + [True] * answered))
    return made


def gradients(model: Any, total: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_has_the_loss_and_gradients_of_its_examples_alone(name: str, prefix: int) -> None:
    model = tiny(name, vocab=VOCAB).eval()
    rows = examples(prefix=prefix)
    alone = sum(whole_loss(model, to_row([row])) for row in rows)
    wanted = gradients(model, alone)
    assert can_segment(model)
    with by_segment(model):
        together = summed_loss(model, packed := to_row(rows, shared=True))
        found = gradients(model, together)
    assert packed["input_ids"].shape[1] == sum(len(row.ids) for row in rows) - prefix * (len(rows) - 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=float(wanted.abs().max()) * 1e-4)
    assert model.config._attn_implementation == "sdpa", "as it was"


@settings(max_examples=40)
@given(
    st.integers(1, 300), st.integers(0, 150), st.sampled_from([0, 7, 100]),
    st.sampled_from([(4, 4), (6, 2), (4, 1)]), st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_the_gradient_of_short_attention_is_that_of_exact_attention(
    tokens: int, before: int, window: int, heads: tuple[int, int], scale: float | None
) -> None:
    """In bf16 on a CPU it is written by hand: with a shared beginning, windows and groups of heads, as exact as torch's own."""
    from scripts.utils import attention

    torch.manual_seed(tokens)
    mask = attention._mask(tokens, before, window, torch.device("cpu")) if before or window else None
    shapes = [(1, heads[0], tokens, 16), (1, heads[1], before + tokens, 16), (1, heads[1], before + tokens, 16)]
    low = [torch.randn(shape).to(torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [part.detach().float().requires_grad_() for part in low]
    plain = torch.nn.functional.scaled_dot_product_attention(
        *exact, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    upstream = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, exact, upstream)
    found = attention._ShortAttention.apply(*low, mask, 16**-0.5 if scale is None else scale)
    torch.testing.assert_close(found.float(), plain, rtol=2e-2, atol=2e-2)
    for one, other in zip(torch.autograd.grad(found, low, upstream.to(torch.bfloat16)), wanted, strict=True):
        assert float((one.float() - other).norm()) <= 2e-2 * float(other.norm()) + 2e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_compared_at_the_start_of_a_run_is_exact_for_every_family(name: str) -> None:
    exact = find_exact(tiny(name, vocab=VOCAB), examples())
    assert exact.packing and exact.segments and exact.shared and exact.chunked


def test_a_model_that_looks_across_examples_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import attention

    model = tiny("llama", vocab=VOCAB)
    real = attention._forward
    monkeypatch.setattr(
        attention, "_forward",
        lambda *a, segments, **o: real(*a, segments=[(0, max(s[1] for s in segments), 0, 0)], **o),
    )  # fmt: skip
    exact = find_exact(model, examples())
    assert not exact.segments and not exact.shared and exact.packing, "the mask over the whole row is exact still"


def test_a_head_that_is_not_what_it_seems_falls_back_to_whole_logits() -> None:
    model = tiny("llama", vocab=VOCAB)
    forward = type(model).forward

    def doubled(self: Any, *arguments: Any, **options: Any) -> Any:
        done = forward(self, *arguments, **options)
        done.logits = done.logits * 2
        return done

    model.forward = doubled.__get__(model)
    assert not find_exact(model, examples()).chunked
    assert find_exact(tiny("llama", vocab=VOCAB), examples()).chunked


@pytest.mark.parametrize("chunk", [1, 7 * VOCAB, 2**24])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_size_of_the_chunks_changes_nothing(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_CHUNK", chunk)
    model = tiny(name, vocab=VOCAB)
    row = to_row(examples(20))
    for part in (model, copy.deepcopy(model).requires_grad_(False)):
        if part is not model:
            part.get_input_embeddings().weight.requires_grad_(True)
        one, two = whole_loss(part, row), summed_loss(part, row)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
        wanted = gradients(part, one)
        torch.testing.assert_close(gradients(part, two), wanted, rtol=1e-3, atol=float(wanted.abs().max()) * 1e-5)


def test_checkpointed_layers_get_their_segments_again_on_the_way_back() -> None:
    model = tiny("llama", vocab=VOCAB).train()
    rows = examples(prefix=30)
    with by_segment(model):
        wanted = gradients(model, summed_loss(model, to_row(rows, shared=True)))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients(model, summed_loss(model, to_row(rows, shared=True)))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_evaluation_in_rows_of_any_size_has_one_loss(shared: bool) -> None:
    model, rows = tiny("qwen2", vocab=VOCAB), examples(12, prefix=20)
    way = Exact(packing=True, segments=True, shared=shared, chunked=True)
    totals = [batch_loss(model, rows, budget, exact=way) for budget in (1, 90, 200, 4000)]
    alone = batch_loss(model, rows, 1, loss=whole_loss, exact=replace(way, packing=False, segments=False, shared=False))
    for total, count in totals:
        assert total == pytest.approx(alone[0], rel=1e-5) and count == alone[1]


def test_rows_that_are_not_packed_never_meet_attention_by_segment() -> None:
    model = tiny("llama", vocab=VOCAB)
    with by_segment(model, wanted=False):
        assert not is_segmented(model)
    with by_segment(model):
        assert model.config._attn_implementation == NAME
    assert not is_segmented(model)


# --- which examples share a row, and which a beginning


@st.composite
def many(draw: st.DrawFn) -> list[Encoded]:
    styles = draw(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=3))
    made = []
    for _ in range(draw(st.integers(1, 30))):
        begin = draw(st.sampled_from(styles))
        asked = draw(st.lists(st.integers(0, 9), max_size=6))
        answer = draw(st.lists(st.integers(0, 9), min_size=2, max_size=6))
        made.append(Encoded(begin + asked + answer, [False] * len(begin + asked) + [True] * len(answer)))
    return made


def size_of(group: list[Encoded]) -> int:
    return int(to_row(group, shared=True)["input_ids"].shape[1])


@given(many(), st.integers(1, 120), st.booleans(), st.integers(0, 5))
@settings(max_examples=150)
def test_every_example_is_in_one_row_that_fits(rows: list[Encoded], budget: int, packing: bool, seed: int) -> None:
    made = make_rows(rows, budget=budget, batch_size=3, packing=packing, seed=seed)
    assert made == make_rows(rows, budget=budget, batch_size=3, packing=packing, seed=seed)
    assert sorted(itertools.chain(*made)) == list(range(len(rows)))
    if packing:
        assert all(len(row) == 1 or sum(len(rows[i].ids) for i in row) <= budget for row in made)


@given(many(), st.integers(1, 120), st.data())
@settings(max_examples=150)
def test_rows_with_shared_beginnings_hold_what_they_are_given_and_fit(
    rows: list[Encoded], budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True)) if rows else []
    made = rows_in_order(rows, order, budget, shared=True)
    assert sorted(itertools.chain(*made)) == sorted(order)
    assert all(len(row) == 1 or size_of([rows[i] for i in row]) <= budget for row in made)


@given(many())
@settings(max_examples=150)
def test_a_row_holds_each_example_behind_its_beginning_and_each_label_once(rows: list[Encoded]) -> None:
    row = to_row(rows, shared=True)
    ids, positions, labels = (row[name][0].tolist() for name in ("input_ids", "position_ids", "shift_labels"))
    assert [end for _, end, _, _ in row["segments"]] == [start for start, _, _, _ in row["segments"][1:]] + [len(ids)]
    prefixes = {(start, end) for _, _, start, end in row["segments"] if end}
    seen = []
    for start, end, before, before_end in row["segments"]:
        if (start, end) in prefixes:
            assert set(labels[start:end]) == {-100}, "a shared beginning predicts nothing"
            continue
        whole = ids[before:before_end] + ids[start:end]
        assert positions[before:before_end] + positions[start:end] == list(range(len(whole)))
        seen.append((whole, [label for label in labels[start:end] if label != -100]))
    wanted = [(row.ids, [i for i, yes in zip(row.ids[1:], row.trained[1:], strict=True) if yes]) for row in rows]
    assert sorted(seen) == sorted(wanted)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 20))
def test_a_micro_batch_falls_into_as_many_parts_as_asked_for(lengths: list[int], parts: int) -> None:
    row = list(range(100, 100 + len(lengths)))
    pieces = split_indices(row, parts, lengths)
    assert list(itertools.chain(*pieces)) == row and len(pieces) == min(parts, len(row)) and all(pieces)


def test_a_style_is_computed_once_a_row() -> None:
    rows = examples(20, prefix=200)
    [(length, members)] = shared_prefixes(rows)
    assert length == 200 and members == list(range(20))
    budget = 512
    shared = rows_in_order(rows, range(20), budget, shared=True)
    assert len(shared) < len(pack([len(row.ids) for row in rows], budget)) / 2


def test_tensors_move_and_segments_stay() -> None:
    row = to_row(examples(2))
    assert on_device(row, "cpu")["segments"] == row["segments"]


def test_a_loss_near_zero_keeps_its_digits() -> None:
    """As the model learns its answers, the loss becomes the small difference of two large numbers."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(60, 64), torch.randn(3000, 64)
    targets = (hidden @ weight.T).argmax(-1)
    weight[targets] *= 1.2
    found = chunked_loss.ChunkedLoss.apply(hidden, weight, None, targets, 0.0, 1.0)
    true = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert float(true) / 60 < 0.2 and float(found) == pytest.approx(float(true), rel=5e-6)


@pytest.mark.parametrize("way", [summed_loss, whole_loss])
def test_fp32_weights_compute_in_the_precision_of_the_run(way: Loss) -> None:
    """What full tuning asks for: Accelerate's autocast lies around the model's own forward, which the chunked loss goes past."""
    model, row = tiny("llama", vocab=VOCAB), to_row(examples()[:2])
    wanted = gradients(model, way(model, row))
    seen = []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    found = gradients(model, mixed(way, "cpu", torch.bfloat16)(model, row))
    assert seen == [torch.bfloat16] and mixed(way, "cpu", torch.float32) is way
    hook.remove()
    assert 0 < float((found - wanted).norm()) < 0.1 * float(wanted.norm())


def test_small_gradients_survive_fp16_under_autocast() -> None:
    """Of tokens that are nearly learnt, times a head's small weights."""
    torch.manual_seed(0)
    weight, targets = torch.randn(3000, 64) * 1e-4, torch.arange(8)
    learnt = weight[:8] * (18 / weight[:8].square().sum(1, keepdim=True))

    def gradient(half: bool) -> torch.Tensor:
        hidden = learnt.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            loss = chunked_loss.ChunkedLoss.apply(hidden, weight, None, targets, 0.0, 1.0)
        return torch.autograd.grad(loss, hidden)[0]

    wanted = gradient(False)
    assert float((gradient(True) - wanted).norm()) < 0.01 * float(wanted.norm()) < 1e-7


def test_a_backends_own_loss_is_compared_by_packing_alone_whatever_its_name() -> None:
    calls = []

    def own(model: Any, row: Any) -> torch.Tensor:
        calls.append(row)
        return whole_loss(model, row)

    exact = find_exact(tiny("llama", vocab=VOCAB), examples(), own, fused=True)
    assert exact.packing and not (exact.segments or exact.shared or exact.chunked) and len(calls) == 3
    assert find_exact(tiny("llama", vocab=VOCAB), []).packing


def test_a_model_that_hands_nothing_on_to_its_attention_is_packed_by_its_own_mask() -> None:
    model = tiny("llama", vocab=VOCAB)
    for layer in model.model.layers:
        real = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, real=real, **o: real(*a, **{k: v for k, v in o.items() if k != "segments"})
    exact = find_exact(model, examples())
    assert exact.packing and not exact.segments and not exact.shared
    alone, _ = batch_loss(model, examples(), 1, exact=exact)
    assert batch_loss(model, examples(), 4000, exact=exact)[0] == pytest.approx(alone, rel=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 6), st.sampled_from([0, 20, 40]), st.integers(0, 10**6))
def test_what_the_variable_length_kernel_is_told_is_what_segments_say(count: int, prefix: int, seed: int) -> None:
    """Its queries and keys, cut as it cuts them, give the attention that segments one by one give; the kernel itself needs a card."""
    from scripts.utils import attention

    row = to_row(examples(count, prefix, seed), shared=True)
    tokens = row["input_ids"].shape[1]
    q, k, v = torch.randn(3, 1, 2, tokens, 8)
    module = torch.nn.Module()
    wanted = attention._forward(module, q, k, v, None, segments=row["segments"])[0][0]
    cuts = attention._cuts(tuple(row["segments"]), q.device)
    keys, values = (part[0] if cuts.keys is None else part[0][:, cuts.keys] for part in (k, v))
    pieces = []
    for number in range(len(row["segments"])):
        mine, theirs = (slice(*cut[number : number + 2].tolist()) for cut in (cuts.of_queries, cuts.of_keys))
        rows, seen = q[0, :, mine], theirs.stop - theirs.start
        assert rows.shape[1] <= cuts.longest[0] and seen <= cuts.longest[1]
        mask = torch.ones(rows.shape[1], seen, dtype=torch.bool).tril(seen - rows.shape[1])
        pieces.append(torch.nn.functional.scaled_dot_product_attention(rows, keys[:, theirs], values[:, theirs], mask))
    torch.testing.assert_close(torch.cat(pieces, 1).transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)
