"""Heads under torch.compile(fullgraph=True): the bits of eager, without recompiling for every size or number."""

import pytest
import torch
from compiling import Counter
from inputs import cut_rows, head, logits, targets
from tolerance import assert_alike

from auxkernels import Head, Logits, aux_cross_entropy, logit_stats, nn

V = 37
OPTIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "recompute": {"recompute": True},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 3, "vocab_size": 33},
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    cut_rows(monkeypatch, 4)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic=None):
    counter = Counter()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


class Batch:
    """Weights that stay, and hidden states of any number of rows."""

    def __init__(self, device, dtype=torch.float32, grad=True):
        self.device, self.dtype, self.grad = device, dtype, grad
        made = {"vocab_size": V, "dtype": dtype, "device": device, "grad": grad}
        self.base, self.aux = head(1, width=8, **made), head(1, width=5, bias=True, **made)

    def rows(self, num_rows, ignore_index=-100, classes=33):
        of = {"dtype": self.dtype, "device": self.device, "requires_grad": self.grad}
        base, aux = (logits(num_rows, width, scale=1.0, **of) for width in (8, 5))
        return (
            base,
            aux,
            targets(num_rows, vocab_size=classes, device=self.device, ignored=0.3, ignore_index=ignore_index),
        )

    def weights(self):
        return self.base.weight, self.aux.weight, self.aux.bias


def step(impl, **options):
    def function(h_base, h_aux, target, w_base, w_aux, bias):
        sources = Head(h_base, w_base), Head(h_aux, w_aux, bias=bias)
        return aux_cross_entropy(*sources, target, backend=impl.backend, **options)

    return function


def with_gradients(function, *arguments):
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    loss = function(*arguments)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))]


def assert_same(impl, got, want):
    """Bits for the fused ones, whose op is the same; plain torch is traced into other kernels."""
    assert len(got) == len(want)
    for one, two in zip(got, want, strict=True):
        if impl.backend == "reference":
            assert_alike(one, two)
        else:
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


HALVES = [("mean", torch.bfloat16), ("mean", torch.float16), ("none", torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize("options, dtype", [*((name, torch.float32) for name in OPTIONS), *HALVES], ids=str)
def test_compiled_is_eager(impl, options, dtype):
    if impl.backend == "reference" and (options, dtype) != ("mean", torch.float32):
        pytest.skip("plain torch has one path")
    batch, function = Batch(impl.device, dtype), step(impl, **OPTIONS[options])
    arguments = (*batch.rows(14, OPTIONS[options].get("ignore_index", -100)), *batch.weights())
    fast, _ = compiled(function)
    assert_same(impl, with_gradients(fast, *arguments), with_gradients(function, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["hidden", "weights", "base", "nothing"])
def test_compiled_with_some_tensors_frozen_is_eager(fused, needs):
    batch, function = Batch(fused.device), step(fused)
    h_base, h_aux, target = batch.rows(14)
    w_base, w_aux, bias = batch.weights()
    for tensor, kinds in ((h_base, "hidden base"), (h_aux, "hidden"), (w_base, "weights base"), (w_aux, "weights")):
        tensor.requires_grad_(needs in kinds.split())
    bias.requires_grad_(False)
    arguments = (h_base, h_aux, target, w_base, w_aux, bias)
    fast, _ = compiled(function)
    if needs == "nothing":
        assert_same(fused, [fast(*arguments)], [function(*arguments)])
    else:
        assert_same(fused, with_gradients(fast, *arguments), with_gradients(function, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["mean", "none"])
def test_the_number_of_rows_is_compiled_once_however_many_are_ignored(fused, options):
    batch, function, counts = Batch(fused.device), step(fused, **OPTIONS[options]), []
    fast, counter = compiled(function, dynamic=True)
    for num_rows in (7, 6, 17, 64, 3):  # none of them a width: equal sizes share a symbol
        h_base, h_aux, target = batch.rows(num_rows)
        for _ in range(2):
            arguments = (h_base, h_aux, target, *batch.weights())
            assert_same(fused, with_gradients(fast, *arguments), with_gradients(function, *arguments))
            counts.append(counter.count)
            target.fill_(-100)
    assert set(counts) == {counts[0]}


def test_changing_the_number_of_rows_recompiles_once_and_then_is_dynamic(fused):
    batch, function, counts = Batch(fused.device), step(fused), []
    fast, counter = compiled(function)
    for num_rows in (7, 6, 17, 64, 9):
        arguments = (*batch.rows(num_rows), *batch.weights())
        assert_same(fused, with_gradients(fast, *arguments), with_gradients(function, *arguments))
        counts.append(counter.count)
    assert set(counts[1:]) == {counts[1]}


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [("number", "mean"), ("tensor", "mean"), ("tensor", "recompute")])
def test_scales_and_normalizer_that_change_every_step_do_not_recompile_every_step(fused, kind, options):
    def function(h_base, h_aux, target, w_base, w_aux, one, two, three):
        base, aux = Head(h_base, w_base, scale=one), Head(h_aux, w_aux, scale=two)
        return aux_cross_entropy(base, aux, target, normalizer=three, backend=fused.backend, **OPTIONS[options])

    batch, counts = Batch(fused.device), []
    arguments = (*batch.rows(9), *batch.weights()[:2])
    fast, counter = compiled(function)
    for value in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.0, 1.9, 1.0, 2.3):
        numbers = (value, value + 2.0, value * 3)
        if kind == "tensor":
            numbers = [torch.tensor(number, device=fused.device) for number in numbers]
        for one, two in zip(*(with_gradients(f, *arguments, *numbers) for f in (fast, function)), strict=True):
            assert_alike(one, two)
        counts.append(counter.count)
    assert set(counts[2:8]) == {counts[2]}  # compiled for the first value, for a second one, and then for any
    assert set(counts[8:]) == {counts[8]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shared, options",
    [("weight", "mean"), ("hidden", "mean"), ("both", "mean"), ("both", "none"), ("scale", "mean"), ("logits", "mean")],
)
def test_one_tensor_in_two_places_compiles(fused, shared, options):
    def function(h, other, weight, other_weight, scale, target):
        sources = {
            "weight": (Head(h, weight), Head(other, weight)),
            "hidden": (Head(h, weight), Head(h, other_weight)),
            "both": (Head(h, weight), [Head(h, weight), Head(h, other_weight)]),
            "scale": (Head(h, weight, scale=scale), Head(other, other_weight, scale=scale)),
            "logits": (Logits(h), Head(h, weight)),
        }[shared]
        return aux_cross_entropy(*sources, target, backend=fused.backend, **OPTIONS[options])

    of = {"device": fused.device, "requires_grad": True, "scale": 0.3}
    h, other, weight, other_weight = logits(9, V, **of), logits(9, V, **of), logits(V, V, **of), logits(V, V, **of)
    scale = torch.tensor(0.6, device=fused.device, requires_grad=True)
    target = targets(9, vocab_size=V, device=fused.device, ignored=0.2)
    results = []
    for f in (compiled(function)[0], function):
        loss = f(h, other, weight, other_weight, scale, target)
        leaves = [h, other, weight, other_weight, scale]
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        results.append([loss.detach(), *(grad for grad in grads if grad is not None)])
    for one, two in zip(*results, strict=True):
        assert_alike(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["mean", "none"])
def test_sums_scales_and_softcaps_compile(fused, options):
    def function(values, h_base, h_aux, target, w_base, w_aux, bias, one, many):
        base = [Logits(values, scale=one), Head(h_base, w_base, softcap=4.0)]
        aux = Head(h_aux, w_aux, bias=bias, scale=many, softcap=3.0)
        return aux_cross_entropy(base, aux, target, backend=fused.backend, **OPTIONS[options])

    batch = Batch(fused.device)
    of = {"device": fused.device, "requires_grad": True}
    numbers = torch.rand((), **of), torch.rand(9, **of)
    arguments = (logits(9, V, **of), *batch.rows(9), *batch.weights(), *numbers)
    fast, _ = compiled(function)
    for one, two in zip(with_gradients(fast, *arguments), with_gradients(function, *arguments), strict=True):
        assert_alike(one, two)


def test_statistics_compile_with_their_gradients(fused):
    def function(h_base, h_aux, target, w_base, w_aux, bias):
        stats = logit_stats(Head(h_base, w_base), Head(h_aux, w_aux, bias=bias), target, backend=fused.backend)
        return stats.entropy + 2 * stats.kl_to_base - stats.base_log_prob, stats.argmax

    batch = Batch(fused.device)
    arguments = (*batch.rows(9), *batch.weights())
    leaves = [t for t in arguments if t.requires_grad]
    results = []
    for f in (compiled(function)[0], function):
        value, argmax = f(*arguments)
        results.append([value.detach(), argmax, *torch.autograd.grad(value.sum(), leaves)])
    for one, two in zip(*results, strict=True):
        assert_alike(one, two)


def test_return_stats_compiles(fused):
    def function(*arguments):
        loss, stats = step(fused, return_stats=True)(*arguments)
        return loss, stats.entropy, stats.log_prob, stats.argmax

    batch = Batch(fused.device)
    arguments = (*batch.rows(9), *batch.weights())
    for one, two in zip(compiled(function)[0](*arguments), function(*arguments), strict=True):
        assert_alike(one.detach(), two.detach())


@pytest.mark.parametrize("options", ["mean", "recompute"])
def test_compiled_autocast_is_eager_autocast(fused, options):
    def function(*arguments):
        with torch.autocast(fused.device, torch.bfloat16):
            return step(fused, **OPTIONS[options])(*arguments)

    batch = Batch(fused.device)
    arguments = (*batch.rows(9), *batch.weights())
    fast, _ = compiled(function)
    got, want, plain = (with_gradients(f, *arguments) for f in (fast, function, step(fused, **OPTIONS[options])))
    assert_same(fused, got, want)
    assert not torch.equal(got[0], plain[0])


def test_a_compiled_training_step_of_a_lora_with_a_module_is_eager(fused):
    """With work around the operator, a module's weight, a frozen base and a scale that is a parameter."""
    loss_of = nn.AuxCrossEntropyLoss(torch.ones(V, device=fused.device), backend=fused.backend)

    def function(hidden, weight, down, up, alpha, target):
        hidden = torch.tanh(hidden)
        return 2 * loss_of(Head(hidden, weight), Head(hidden @ down.T, up, scale=alpha), target)

    of = {"device": fused.device, "scale": 0.5}
    hidden, weight = logits(9, 12, requires_grad=True, **of), logits(V, 12, **of)
    down, up = logits(3, 12, requires_grad=True, **of), logits(V, 3, requires_grad=True, **of)
    alpha = torch.tensor(0.5, device=fused.device, requires_grad=True)
    arguments = (hidden, weight, down, up, alpha, targets(9, vocab_size=V, device=fused.device, ignored=0.2))
    fast, _ = compiled(function)
    for one, two in zip(with_gradients(fast, *arguments), with_gradients(function, *arguments), strict=True):
        assert_alike(one, two)


@pytest.mark.slow
def test_generated_code_around_the_operator_is_eager(fused):
    """Inductor's own buffers and views go into the operator, and its gradients into generated code."""

    def function(hidden, weight, other, target):
        base = Head((hidden * 2)[:-1], weight)
        loss = aux_cross_entropy(base, Head(other[1:] + 1, weight), target[1:], backend=fused.backend)
        return loss * 3

    of = {"device": fused.device, "requires_grad": True, "scale": 0.5}
    arguments = (logits(9, 6, **of), logits(V, 6, **of), logits(9, 6, **of))
    arguments = (*arguments, targets(9, vocab_size=V, device=fused.device, ignored=0.2))
    fast = torch.compile(function, fullgraph=True)
    for one, two in zip(with_gradients(fast, *arguments), with_gradients(function, *arguments), strict=True):
        assert_alike(one, two)


def test_a_target_out_of_range_is_an_index_error_when_compiled_too(on_cpu):
    batch, function = Batch("cpu"), step(on_cpu)
    h_base, h_aux, target = batch.rows(9)
    fast, _ = compiled(function)
    assert fast(h_base, h_aux, target, *batch.weights()).isfinite().all()
    target[7] = V
    with pytest.raises(IndexError, match=rf"got target\[7\] = {V} \(row 7\)"):
        fast(h_base, h_aux, target, *batch.weights())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"w_aux": torch.zeros(V, 6)}, ValueError, "weight of aux must be"),
        ({"w_aux": torch.zeros(V + 1, 5)}, ValueError, "bias of aux must be"),
        ({"bias": torch.zeros(V).double()}, TypeError, "bias of aux must have the hidden states' dtype"),
        ({"h_aux": torch.zeros(8, 5)}, ValueError, "hidden of aux must be"),
    ],
    ids=["width", "classes", "dtype", "rows"],
)
def test_bad_arguments_are_refused_while_compiling(fused, change, error, message):
    if fused.device != "cpu":
        pytest.skip("the message is the same")
    batch, function = Batch("cpu"), step(fused)
    names = ("h_base", "h_aux", "target", "w_base", "w_aux", "bias")
    given = dict(zip(names, (*batch.rows(9), *batch.weights()), strict=True)) | change
    with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match=message):
        compiled(function)[0](**given)
