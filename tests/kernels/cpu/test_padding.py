"""What lies beyond the end of a row never reaches a result: oneDNN's bfloat16 products read there (padded_matrix)."""

import pytest
import torch
from inputs import head, logits, targets
from torch.autograd import grad

from auxkernels import Head, aux_cross_entropy, memory, soft_embedding
from auxkernels.soft_embedding import native_plain

pytestmark = pytest.mark.usefixtures("native")
SIZES = [3, 31, 33, 127, 257, 1025]  # labels or vocabulary: contracted over, and no multiple of 32


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh buffers are full of NaN, as recycled memory may be."""

    def full(like, shape, dtype=None):
        made.append(like.new_full(tuple(shape), float("nan"), dtype=dtype))
        return made[-1]

    def full_like(tensor, **options):
        if options or not tensor.is_floating_point():
            return empty_like(tensor, **options)
        made.append(tensor.new_full((tensor.numel() + 64,), float("nan")))  # and what lies behind the last row
        return made[-1][: tensor.numel()].view(tensor.shape)

    made: list[torch.Tensor] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(memory, "empty", full)
    monkeypatch.setattr(torch, "empty_like", full_like)
    yield
    assert made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("V", SIZES)
def test_heads_in_recycled_memory(poisoned, V, dtype):
    base, aux = (head(70, vocab_size=V, width=40, dtype=dtype) for _ in range(2))
    loss = aux_cross_entropy(base, aux, targets(70, vocab_size=V))
    tensors = [base.hidden, base.weight, aux.hidden, aux.weight]
    assert all(t.isfinite().all() for t in (loss, *grad(loss, tensors)))


@pytest.mark.parametrize("options", [{}, {"gumbel": 1.0, "seed": 3}, {"temperature": torch.tensor(0.7)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [*SIZES, 32, 96])
def test_lookups_in_recycled_memory(poisoned, monkeypatch, K, dtype, options):
    for name in ("SMALL", "SMALL_BFLOAT16"):  # by a library's products, whatever the size
        monkeypatch.setattr(native_plain, name, 0)
    scores = logits(70, K, dtype=dtype, requires_grad=True)
    table = logits(K, 40, dtype=dtype, requires_grad=True)
    mixture = soft_embedding(scores, table, **options)
    grads = grad(mixture, (scores, table), logits(70, 40, dtype=dtype))
    assert all(t.isfinite().all() for t in (mixture, *grads))


@pytest.mark.parametrize("options", [{}, {"gumbel": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_a_nan_among_the_scores_stays_in_its_row(K, dtype, options):
    scores, table = logits(70, K, dtype=dtype), logits(K, 40, dtype=dtype)
    scores[[5, 69], 0] = float("nan")
    scores.requires_grad_()
    mixture = soft_embedding(scores, table, **options)
    (dscores,) = grad(mixture, scores, logits(70, 40, dtype=dtype))
    for t in (mixture, dscores):
        assert t.isnan().any(-1).nonzero().flatten().tolist() == [5, 69]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", SIZES)
def test_a_nan_among_the_logits_stays_in_its_row_of_the_hidden_gradient(V, dtype):
    hidden = logits(70, 64, dtype=dtype, scale=1.0)
    hidden[7, 0] = float("nan")
    hidden.requires_grad_()
    loss = aux_cross_entropy(Head(hidden, logits(V, 64, dtype=dtype)), None, targets(70, vocab_size=V), reduction="sum")
    (dhidden,) = grad(loss, hidden)
    assert dhidden.isnan().any(-1).nonzero().flatten().tolist() == [7]
