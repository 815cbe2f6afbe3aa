"""torch.compile(fullgraph=True): the bits of eager, without recompiling for every size or number.

Most tests trace without generating code (backend="aot_eager"): what can go wrong is in the tracing of the operators,
their fakes and autograd. One test of each kind generates code as well.
"""

import pytest
import torch
from compiling import Counter, assert_same
from inputs import logits, targets
from tolerance import assert_alike

from auxkernels import Logits, aux_cross_entropy, logit_stats, nn


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic=None):
    counter = Counter()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def batch(num_rows, device, ignored=0.3, dtype=torch.float32, ignore_index=-100):
    base = logits(num_rows, 40, dtype=dtype, device=device)
    aux = logits(num_rows, 40, dtype=dtype, device=device, requires_grad=True)
    return base, aux, targets(num_rows, vocab_size=37, device=device, ignored=ignored, ignore_index=ignore_index)


def with_gradient(function, base, aux, target, *extra):
    loss = function(base, aux, target, *extra)
    return [loss.detach(), *torch.autograd.grad(loss, aux, torch.full_like(loss, 0.5))]


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "recompute": {"recompute": True},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.01, "vocab_size": 37, "ignore_index": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_is_eager_with_ignored_rows_too(impl, options, ignored):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, backend=impl.backend, **OPTIONS[options])

    base, aux, target = batch(7, impl.device, ignored, ignore_index=OPTIONS[options].get("ignore_index", -100))
    fast, _ = compiled(function)
    assert_same(impl, with_gradient(fast, base, aux, target), with_gradient(function, base, aux, target))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["mean", "none"])
def test_compiled_half_precision_is_eager(impl, options, dtype):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, backend=impl.backend, **OPTIONS[options])

    arguments = batch(7, impl.device, dtype=dtype)
    fast, _ = compiled(function)
    assert_same(impl, with_gradient(fast, *arguments), with_gradient(function, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["mean", "none"])
def test_generated_code_around_the_operator_is_eager(impl, options):
    """With work before and after, so that views and buffers of generated kernels meet the operator."""

    def function(base, aux, target):
        shifted, labels = (aux * 2)[:-1], target[1:]
        return aux_cross_entropy(base[:-1] + 0, shifted, labels, backend=impl.backend, **OPTIONS[options]) * 3

    arguments = batch(7, impl.device)
    fast = torch.compile(function, fullgraph=True)
    for got, want in zip(with_gradient(fast, *arguments), with_gradient(function, *arguments), strict=True):
        assert_alike(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["mean", "none", "everything"])
def test_the_number_of_rows_is_compiled_once(impl, options):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, backend=impl.backend, **OPTIONS[options])

    fast, counter = compiled(function, dynamic=True)
    counts = []
    for num_rows in (5, 6, 17, 64, 100, 3):
        arguments = batch(num_rows, impl.device, ignore_index=OPTIONS[options].get("ignore_index", -100))
        assert_same(impl, with_gradient(fast, *arguments), with_gradient(function, *arguments))
        counts.append(counter.count)
    assert set(counts) == {counts[0]}


@pytest.mark.slow
def test_changing_the_number_of_rows_recompiles_once_and_then_is_dynamic(impl):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, backend=impl.backend)

    fast, counter = compiled(function)
    counts = []
    for num_rows in (5, 6, 17, 64, 100, 8):
        arguments = batch(num_rows, impl.device)
        assert_same(impl, with_gradient(fast, *arguments), with_gradient(function, *arguments))
        counts.append(counter.count)
    assert set(counts[1:]) == {counts[1]}


# a float argument of an op would be compiled in, and at its ninth value torch gives up with fullgraph=True
NUMBERS = {
    "scale": (lambda x: x, lambda b, a, x: (b, Logits(a, scale=x), {})),
    "base scale": (lambda x: x, lambda b, a, x: (Logits(b, scale=x), a, {})),
    "normalizer": (lambda x: x, lambda b, a, x: (b, a, {"normalizer": x})),
    "whole normalizer": (lambda x: round(x * 10), lambda b, a, x: (b, a, {"normalizer": x})),
    "tensor scale": (torch.tensor, lambda b, a, x: (b, Logits(a, scale=x), {})),
    "tensor normalizer": (torch.tensor, lambda b, a, x: (b, a, {"normalizer": x})),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", ["mean", "recompute"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_every_step_does_not_recompile_every_step(impl, name, options):
    make, place = NUMBERS[name]

    def function(base, aux, target, value):
        base, aux, changed = place(base, aux, value)
        return aux_cross_entropy(base, aux, target, backend=impl.backend, **OPTIONS[options], **changed)

    arguments = batch(6, impl.device)
    fast, counter = compiled(function)
    counts = []
    # 1.0 comes late: a scale of one is no scale and may have a graph of its own, but only one
    for value in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.0, 1.9, 2.1, 1.0, 2.3):
        value = make(value)
        value = value.to(impl.device) if isinstance(value, torch.Tensor) else value
        got, want = (with_gradient(f, *arguments, value) for f in (fast, function))
        for one, two in zip(got, want, strict=True):
            assert_alike(one, two)
        counts.append(counter.count)
    assert set(counts[2:8]) == {counts[2]}  # compiled for the first value, for a second one, and then for any
    assert set(counts[8:]) == {counts[8]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_constant_options_are_compiled_in(impl, name):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, backend=impl.backend, **{name: 0.1})

    arguments = batch(6, impl.device)
    fast, counter = compiled(function)
    counts = []
    for _ in range(3):
        assert_same(impl, with_gradient(fast, *arguments), with_gradient(function, *arguments))
        counts.append(counter.count)
    assert set(counts) == {counts[0]} and counts[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scales_that_are_tensors_get_their_gradients(impl, reduction):
    def function(base, aux, target, one, many):
        sources = Logits(base, scale=one, softcap=9.0), Logits(aux, scale=many)
        return aux_cross_entropy(*sources, target, reduction=reduction, backend=impl.backend)

    base, aux, target = batch(6, impl.device)
    scales = [torch.tensor(0.4, device=impl.device), torch.rand(6, device=impl.device)]
    leaves = (aux, *(scale.requires_grad_() for scale in scales))
    results = []
    for f in (compiled(function)[0], function):
        loss = f(base, aux, target, *scales)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert_alike(got, want)


def test_sequences_of_sources_compile(impl):
    def function(base, aux, target):
        return aux_cross_entropy([base, Logits(base, scale=-0.5)], [aux, base], target, backend=impl.backend)

    arguments = batch(6, impl.device)
    fast, _ = compiled(function)
    for got, want in zip(with_gradient(fast, *arguments), with_gradient(function, *arguments), strict=True):
        assert_alike(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("with_target", [False, True])
def test_statistics_compile_with_their_gradients(impl, with_target):
    def function(base, aux, target):
        stats = logit_stats(base, aux, target if with_target else None, backend=impl.backend)
        return stats.entropy + 2 * stats.kl_to_base - stats.lse, stats.argmax

    base, aux, target = batch(6, impl.device)
    results = []
    for f in (compiled(function)[0], function):
        value, argmax = f(base, aux, target)
        results.append([value.detach(), argmax, *torch.autograd.grad(value.sum(), aux)])
    for got, want in zip(*results, strict=True):
        assert_alike(got, want)


def test_return_stats_compiles(impl):
    def function(base, aux, target):
        loss, stats = aux_cross_entropy(base, aux, target, return_stats=True, backend=impl.backend)
        return loss, stats.entropy, stats.argmax

    arguments = batch(6, impl.device)
    for got, want in zip(compiled(function)[0](*arguments), function(*arguments), strict=True):
        assert_alike(got.detach(), want.detach())


def test_a_compiled_module_with_weights_is_eager(impl):
    module = nn.AuxCrossEntropyLoss(torch.rand(40), label_smoothing=0.1, backend=impl.backend).to(impl.device)
    arguments = batch(6, impl.device)
    fast, _ = compiled(module)
    for got, want in zip(with_gradient(fast, *arguments), with_gradient(module, *arguments), strict=True):
        assert_alike(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_index_error_when_compiled_too(on_cpu, reduction):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, reduction=reduction, backend=on_cpu.backend)

    base, aux, target = batch(6, "cpu")
    fast, _ = compiled(function)
    assert fast(base, aux, target).isfinite().all()
    target[4] = 40
    with pytest.raises(IndexError, match=r"got target\[4\] = 40 \(row 4\)"):
        fast(base, aux, target)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"target": torch.zeros(6)}, TypeError, "target must be int32 or int64"),
        ({"aux": torch.zeros(6, 41)}, ValueError, "equally wide"),
        # torch 2.11 shows a message with sizes in its parts
        ({"aux": torch.zeros(5, 40)}, ValueError, r"aux must be|'aux'\), ConstantVariable\(str: ' must be '\)"),
    ],
)
def test_bad_arguments_are_refused_while_compiling(on_cpu, change, error, message):
    def function(base, aux, target):
        return aux_cross_entropy(base, aux, target, backend=on_cpu.backend)

    base, aux, target = batch(6, "cpu")
    assert compiled(function)[0](base, aux, target).isfinite()
    given = {"base": base, "aux": aux, "target": target} | change
    with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match=message):
        compiled(function)[0](**given)


@pytest.mark.parametrize("view", ["shifted", "padded"])
def test_compiled_views_are_read_where_they_lie(impl, view):
    """An offset into a larger buffer: elsewhere such a view was cloned past its end when compiled."""

    def function(base, aux, target):
        if view == "shifted":
            base, aux, target = base[:, :-1], aux[:, :-1], target[:, 1:]
        else:
            base, aux = base[..., 3:37], aux[..., 3:37]
        return aux_cross_entropy(base, aux, target.clamp(max=30), backend=impl.backend)

    base, aux = logits(2, 5, 40, device=impl.device), logits(2, 5, 40, device=impl.device, requires_grad=True)
    arguments = (base, aux, targets(2, 5, vocab_size=30, device=impl.device, ignored=0.2))
    fast, _ = compiled(function)
    assert_same(impl, with_gradient(fast, *arguments), with_gradient(function, *arguments))


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_inputs(on_gpu):
    base, aux, target = batch(64, "cuda")

    def step():
        loss = aux_cross_entropy(base, aux, target, backend=on_gpu.backend)
        return loss, *torch.autograd.grad(loss, aux)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ignored in (0.0, 0.5, 1.0):
        new = batch(64, "cuda", ignored)
        with torch.no_grad():
            for place, value in zip((base, aux, target), new, strict=True):
                place.copy_(value)
        graph.replay()
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_gpu):
    base, aux, target = batch(64, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in OPTIONS.values():
            loss = aux_cross_entropy(base, aux, target, backend=on_gpu.backend, **options)
            torch.autograd.grad(loss.sum(), aux)
        logit_stats(base, aux, target, backend=on_gpu.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
