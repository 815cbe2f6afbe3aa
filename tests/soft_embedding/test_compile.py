"""soft_embedding, its module and segments under torch.compile(fullgraph=True): the bits of eager, compiled once."""

import pytest
import torch
from compiling import Counter, assert_same
from inputs import head, logits
from soft_oracle import FLOATS
from tolerance import assert_alike

from auxkernels import nn, soft_embedding
from auxkernels.soft_embedding import segments


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic=None):
    counter = Counter()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


MODES = {
    "soft": {},
    "hard": {"hard": True},
    "top_k": {"top_k": 3},
    "noisy": {"gumbel": 1.0, "seed": 3, "hard": True, "top_k": 5},
    "clean": {"gumbel": 1.0, "seed": 3, "hard": True, "clean_gradient": True},
}


def batch(num_rows, device, dtype=torch.float32):
    scores = logits(num_rows, 40, dtype=dtype, device=device, requires_grad=True)
    return scores, logits(2, 40, 6, dtype=dtype, device=device, requires_grad=True)


def with_gradient(function, *arguments):
    """Outputs and gradients of the first two arguments; the upstream gradient is contiguous and no constant."""
    out = function(*arguments)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, arguments[:2], upstream)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_compiled_is_eager(impl, mode, dtype):
    def function(scores, table):
        return soft_embedding(scores, table, **MODES[mode], backend=impl.backend)

    arguments = batch(7, impl.device, dtype)
    assert_same(impl, with_gradient(compiled(function)[0], *arguments), with_gradient(function, *arguments))


def test_compiled_statistics_are_eager(impl):
    def function(scores, table):
        out, stats = soft_embedding(scores, table, return_stats=True, backend=impl.backend)
        return out.sum() + sum((getattr(stats, name) * 0.3).sum() for name in FLOATS) + 0 * stats.argmax.sum()

    arguments = batch(7, impl.device)
    assert_same(impl, with_gradient(compiled(function)[0], *arguments), with_gradient(function, *arguments))


@pytest.mark.slow
def test_generated_code_around_the_operator_is_eager(fused):
    def function(scores, table):
        out = soft_embedding(scores[1:] * 2, table + 1, hard=True, temperature=0.5, backend=fused.backend)
        return out[:, :-1] * 3

    arguments = batch(7, fused.device)
    fast = torch.compile(function, fullgraph=True)
    for got, want in zip(with_gradient(fast, *arguments), with_gradient(function, *arguments), strict=True):
        assert_alike(got, want)


@pytest.mark.parametrize("mode", ["soft", "noisy"])
def test_the_number_of_rows_is_compiled_once(fused, mode):
    def function(scores, table):
        return soft_embedding(scores, table, **MODES[mode], backend=fused.backend)

    fast, counter = compiled(function, dynamic=True)
    counts = []
    for num_rows in (5, 17, 64):
        arguments = batch(num_rows, fused.device)
        assert_same(fused, with_gradient(fast, *arguments), with_gradient(function, *arguments))
        counts.append(counter.count)
    assert set(counts) == {counts[0]}


def test_changing_the_number_of_rows_recompiles_once_and_then_is_dynamic(fused):
    def function(scores, table):
        return soft_embedding(scores, table, top_k=4, backend=fused.backend)

    fast, counter = compiled(function)
    counts = []
    for num_rows in (5, 6, 17, 64):
        arguments = batch(num_rows, fused.device)
        assert_same(fused, with_gradient(fast, *arguments), with_gradient(function, *arguments))
        counts.append(counter.count)
    assert set(counts[1:]) == {counts[1]}


NUMBERS = {
    "temperature": lambda x, d: {"temperature": x},
    "temperature tensor": lambda x, d: {"temperature": torch.tensor(x, device=d)},
    "gumbel": lambda x, d: {"gumbel": x, "seed": 3},
    "seed": lambda x, d: {"gumbel": 1.0, "seed": int(x * 1000)},
    "seed tensor": lambda x, d: {"gumbel": 1.0, "seed": torch.tensor(int(x * 1000), device=d)},
    "all": lambda x, d: {"temperature": x, "gumbel": x / 2, "seed": int(x * 1000)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change_every_step_are_compiled_a_small_number_of_times(fused, name):
    def function(scores, table, options):
        return soft_embedding(scores, table, **options, backend=fused.backend)

    arguments = batch(6, fused.device)
    fast, counter = compiled(function)
    counts = []
    for value in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5):
        options = NUMBERS[name](value, fused.device)
        got, want = (with_gradient(f, *arguments, options) for f in (fast, function))
        for one, two in zip(got, want, strict=True):
            assert_alike(one, two)
        counts.append(counter.count)
    assert counts[-1] == counts[3] and counts[-1] <= 8  # a first value, a second one, then any


def test_a_compiled_step_draws_a_new_seed_every_time(impl):
    def function(scores, table):
        return soft_embedding(scores, table, gumbel=1.0, hard=True, backend=impl.backend)

    scores, table = torch.zeros(50, 40, device=impl.device), torch.eye(40, device=impl.device)
    fast, _ = compiled(function)
    torch.manual_seed(0)
    first, second = fast(scores, table), fast(scores, table)
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(fast(scores, table), first)


def test_compiled_heads_and_tensor_temperatures_get_their_gradients(fused):
    given = head(6, vocab_size=40, bias=True, device=fused.device)
    table, T = logits(40, 5, device=fused.device, requires_grad=True), torch.full((6,), 0.7, device=fused.device)
    tensors = (given.hidden, given.weight, given.bias, T.requires_grad_(), table)

    def function(hidden, weight, bias, T, table):
        from auxkernels import Head

        return soft_embedding(Head(hidden, weight, bias=bias), table, temperature=T, backend=fused.backend)

    results = []
    for run in (compiled(function)[0], function):
        out = run(*tensors)
        results.append(
            (out, *torch.autograd.grad(out, tensors, torch.linspace(0, 1, 30, device=out.device).view(6, 5)))
        )
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_one_tensor_may_be_scores_and_table_when_compiled(fused):
    def function(both):
        return soft_embedding(both, both, backend=fused.backend).square()

    both = logits(7, 7, device=fused.device, requires_grad=True)
    got, want = (torch.autograd.grad(f(both).sum(), both)[0] for f in (compiled(function)[0], function))
    assert_alike(got, want)


def test_the_compiled_module_with_segments_is_eager(fused):
    module = nn.SoftEmbedding(40, 6, gumbel=1.0, backend=fused.backend).to(fused.device)
    scores, _ = batch(5, fused.device)
    ids = torch.tensor([[0, 0, 1, -1], [4, 3, 3, 3]], device=fused.device)
    for training in (True, False):
        module.train(training)
        results = []
        for run in (
            compiled(lambda s: module(s, segment_ids=ids, seed=4))[0],
            lambda s: module(s, segment_ids=ids, seed=4),
        ):
            out = run(scores)
            results.append((out, *torch.autograd.grad(out.square().sum(), (scores, module.weight))))
        for got, want in zip(*results, strict=True):
            assert_alike(got, want)


def test_compiled_segments_of_any_number_are_compiled_once(fused):
    def function(rows, ids):
        return segments.segments_to_tokens(rows, ids, fused.backend)

    fast, counter = compiled(function, dynamic=True)
    counts = []
    for num_segments, num_tokens in ((5, 30), (7, 41), (3, 8)):
        rows = logits(num_segments, 6, device=fused.device, requires_grad=True)
        ids = torch.randint(-1, num_segments, (num_tokens,), device=fused.device)
        results = [
            (out, *torch.autograd.grad(out.square().sum(), rows)) for out in (f(rows, ids) for f in (fast, function))
        ]
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        counts.append(counter.count)
    assert set(counts) == {counts[0]}


def test_a_compiled_call_on_cpu_refuses_an_unknown_segment(on_cpu):
    fast, _ = compiled(lambda rows, ids: segments.segments_to_tokens(rows, ids, on_cpu.backend))
    with pytest.raises(IndexError, match="segment_ids"):
        fast(torch.randn(3, 4), torch.tensor([0, 3]))
