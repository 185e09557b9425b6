"""Each row's own loss, taken from packed rows, is what the row has alone; their sum is what training sees."""

import pytest

from scripts.utils.encoding import Encoded
from scripts.utils.loss import Exact, batch_loss, find_exact, whole_loss
from scripts.utils.packing import to_row
from scripts.utils.row_losses import losses_in_row
from tests.test_loss import VOCAB, examples
from tests.tiny_models import FAMILIES, tiny


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rows_loss_is_that_of_the_row_alone(name: str, prefix: int) -> None:
    model = tiny(name, vocab=VOCAB).eval()
    rows = [*examples(prefix=prefix), *examples(3, prefix=20, seed=5)]
    alone = [float(whole_loss(model, to_row([row]))) for row in rows]
    found = find_exact(model, rows)
    assert found.shared and found.chunked
    whole = Exact(packing=True, segments=True, shared=True, chunked=False)
    apart = Exact(packing=True, segments=False, shared=False, chunked=True)
    for way in (found, whole, apart):
        assert losses_in_row(model, rows, way) == pytest.approx(alone, rel=1e-4)
    total, _ = batch_loss(model, rows, 10_000, exact=found)
    assert sum(losses_in_row(model, rows, found)) == pytest.approx(total, rel=1e-5)


def test_a_row_without_trained_tokens_has_no_loss() -> None:
    model = tiny("llama", vocab=VOCAB).eval()
    silent, spoken = Encoded([1, 2, 3], [False] * 3), examples(1)[0]
    way = Exact(packing=True, segments=False, shared=False, chunked=True)
    assert losses_in_row(model, [silent], way) == [0.0]
    for chunked in (True, False):
        way = Exact(packing=True, segments=False, shared=False, chunked=chunked)
        assert losses_in_row(model, [silent, spoken], way)[0] == 0.0
