"""Eight ranks, as threads of one process, against float64."""

import pytest
import sharded
import sharded_lookups
import torch
import torch.distributed as dist
from inputs import logits, targets
from oracle import Case
from ranks_in_threads import Ranks
from soft_oracle import Case as Lookup

from auxkernels import Logits, dispatch

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(bool(dispatch.native_missing()), reason=f"native on cpu: {dispatch.native_missing()}"),
]


def cases(vocab_size: int) -> list[Case]:
    def both(dtype=torch.float32):
        return [logits(N, vocab_size, dtype=dtype, requires_grad=True) for _ in range(2)]

    def head(width: int, **options):
        return sharded.head((N,), vocab_size, width, torch.float32, **options)

    N = 10
    y, weight = targets(N, vocab_size=vocab_size, ignored=0.2), torch.rand(vocab_size) + 0.1
    options = {"label_smoothing": 0.1, "weight": weight, "z_loss": 1e-3}
    return [
        Case(*both(), y),
        Case(*both(torch.bfloat16), y, options),
        Case(head(16), head(8, bias=torch.randn(vocab_size).requires_grad_()), y, options),
    ]


@pytest.mark.parametrize("vocab_size", [203, 10])  # of 10 three ranks hold none
def test_loss_and_gradients(vocab_size):
    for make in sharded.LAYOUTS.values():
        bounds = make(vocab_size, 8)
        for case in cases(vocab_size):
            shares = Ranks().run(8, sharded.run_share, case, bounds)
            sharded.check_case(case, sharded.joined(case, shares, bounds))


@pytest.mark.parametrize("options", [{}, {"hard": True, "gumbel": 1.0, "seed": 3}, {"top_k": 3}], ids="-".join)
def test_mixtures_and_gradients(options):
    scores = Logits(logits(5, 41, requires_grad=True), scale=torch.rand(5).requires_grad_())
    case = Lookup(scores, torch.randn(41, 6, requires_grad=True), options)
    upstream = case.upstream("out", "entropy", "usage")
    sharded_lookups.check(Ranks(), case, [make(41, 8) for make in sharded.LAYOUTS.values()], upstream)
