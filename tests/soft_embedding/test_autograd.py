"""Autograd of soft_embedding as a user meets it: how often, what is saved, autocast, and what is refused."""

import copy
import pickle

import pytest
import torch
from inputs import head, logits
from raw_lookup import arguments, backward_op, forward_op
from soft_oracle import F32, F64, FLOATS, Case, check, check_results, cut_lookup
from tolerance import assert_alike
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from auxkernels import Head, Logits, soft_embedding
from auxkernels.soft_embedding import noise
from auxkernels.soft_embedding.request import OUTPUTS, mask_of

BF16, F16 = torch.bfloat16, torch.float16
MODES = {
    "soft": {},
    "hard": {"hard": True},
    "top_k": {"top_k": 3},
    "hard top_k": {"hard": True, "top_k": 3},
    "noisy": {"gumbel": 1.0, "seed": 3},
    "hard noisy": {"hard": True, "gumbel": 0.5, "seed": 3},
    "clean gradient": {"hard": True, "gumbel": 0.5, "clean_gradient": True, "seed": 3},
    "clean top_k": {"hard": True, "gumbel": 0.5, "clean_gradient": True, "seed": 3, "top_k": 3},
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def leaves(impl, rows=6, K=19, D=5, tables=(), dtype=F32):
    made = {"device": impl.device, "dtype": dtype, "requires_grad": True}
    return [logits(rows, K, **made), logits(*tables, K, D, **made)]


# -- more than once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_second_backward_gives_the_same_bits(impl, monkeypatch, mode, dtype):
    cut_lookup(monkeypatch, 2)
    scores, tables = leaves(impl, tables=(2,), dtype=dtype)
    out, stats = soft_embedding(scores, tables, **mode, return_stats=True, backend=impl.backend)
    upstream = [torch.randn_like(out), torch.randn_like(stats.entropy)]
    first, second, third = (
        torch.autograd.grad([out, stats.entropy], (scores, tables), [by * u for u in upstream], retain_graph=True)
        for by in (1, 1, 2)
    )
    for one, two, twice in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert_alike(2 * one, twice)


def test_without_retain_graph_torch_itself_refuses_a_second_backward(impl, mode):
    scores, table = leaves(impl)
    out = soft_embedding(scores, table, **mode, backend=impl.backend).square().sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_gradients_accumulate(impl, mode):
    scores, table = leaves(impl)
    for count in (1, 2):
        soft_embedding(scores, table, **mode, backend=impl.backend).square().sum().backward()
        if count == 1:
            first = scores.grad.clone(), table.grad.clone()
    assert_alike((scores.grad, table.grad), (2 * first[0], 2 * first[1]))


def test_double_differentiation_raises_and_names_this_function(fused, mode):
    scores, table = leaves(fused)
    T = torch.ones((), device=fused.device, requires_grad=True)
    out, stats = soft_embedding(scores, table, temperature=T, **mode, return_stats=True, backend=fused.backend)
    for result in (out, stats.entropy):
        grads = torch.autograd.grad(result.square().sum(), (scores, T), create_graph=True)
        for grad in grads:
            for by in (scores, T):
                with pytest.raises(RuntimeError, match="cannot be differentiated twice") as caught:
                    torch.autograd.grad(grad.square().sum(), by, retain_graph=True)
                assert "soft_embedding" in str(caught.value)


def test_a_gradient_penalty_is_not_dropped_silently(fused, mode):
    scores, table = leaves(fused)
    out = soft_embedding(scores, table, **mode, backend=fused.backend)
    (grad,) = torch.autograd.grad(out.sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (out.sum() + grad.square().sum()).backward()


def test_double_differentiation_with_respect_to_the_upstream_raises_too(fused):
    scores, table = leaves(fused)
    out = soft_embedding(scores, table, backend=fused.backend)
    upstream = torch.randn_like(out).requires_grad_()
    (grad,) = torch.autograd.grad(out, scores, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(grad.sum(), upstream)


def test_the_reference_may_be_differentiated_twice():
    scores, table = leaves(type("Cpu", (), {"device": "cpu"}), dtype=F64)
    run = lambda s, t: soft_embedding(s, t, temperature=0.7, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (scores, table))


def test_forward_mode_and_functional_transforms_raise_torchs_own_errors(fused):
    scores, table = leaves(fused)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scores.detach(), torch.ones_like(scores))
        with pytest.raises((RuntimeError, NotImplementedError)):
            soft_embedding(dual, table.detach(), backend=fused.backend)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda s: soft_embedding(s, table, backend=fused.backend).sum())(scores)
    with pytest.raises(RuntimeError):
        torch.vmap(lambda s: soft_embedding(s, table, backend=fused.backend))(scores)


# -- what is kept and what is changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("of_head", [False, True])
def test_probabilities_are_never_saved(fused, mode, of_head):
    N, K, D = 64, 512, 8
    given = (
        head(N, vocab_size=K, device=fused.device) if of_head else logits(N, K, device=fused.device, requires_grad=True)
    )
    table = logits(K, D, device=fused.device, requires_grad=True)
    inputs = {t.data_ptr() for t in ((given.hidden, given.weight) if of_head else (given,))} | {table.data_ptr()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        soft_embedding(given, table, **mode, return_stats=True, backend=fused.backend)
    own = [t for t in saved if t.data_ptr() not in inputs]
    size = sum(t.nbytes for t in own)
    of_row = (8 + 4 + 4) * (2 if "top_k" in mode else 1)  # with top_k the whole row's entropy has a state of its own
    of_row += 8 * 3 * ("top_k" in mode) + 8 * ("clean_gradient" in mode)
    assert size <= N * of_row + 64, [t.shape for t in own]
    assert not any(t.numel() >= N * K for t in own)


def test_inputs_are_never_written(impl, monkeypatch, mode):
    cut_lookup(monkeypatch, 2)
    scores, tables = leaves(impl, tables=(2,))
    given = head(6, vocab_size=19, bias=True, device=impl.device)
    tensors = {
        "scores": scores,
        "tables": tables,
        "hidden": given.hidden,
        "weight": given.weight,
        "bias": given.bias,
        "temperature": torch.rand(6, device=impl.device).add(0.5).requires_grad_(),
        "mask": torch.rand(6, 19, device=impl.device) < 0.3,
    }
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    options = {name: tensors[name] for name in ("temperature", "mask")}
    for source in (scores, given, [scores, given], Logits(scores, scale=2.0)):
        out, stats = soft_embedding(source, tables, **mode, **options, return_stats=True, backend=impl.backend)
        upstream = torch.randn_like(out)
        kept = upstream.clone()
        torch.autograd.backward([out, stats.usage], [upstream, torch.ones_like(stats.usage)])
        assert torch.equal(upstream, kept)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.detach(), before[name][0]) and tensor._version == before[name][1], name


@pytest.mark.parametrize("name", ["scores", "table", "temperature", "mask"])
def test_an_input_changed_before_backward_is_an_error(fused, name):
    scores, table = leaves(fused)
    mask = torch.zeros(19, dtype=torch.bool, device=fused.device)
    T = torch.ones(6, device=fused.device)
    out = soft_embedding(scores, table, temperature=T, mask=mask, backend=fused.backend)
    with torch.no_grad():
        changed = {"scores": scores, "table": table, "temperature": T, "mask": mask}[name]
        changed.copy_(changed.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_results_may_be_written_without_harm_to_the_gradient(fused, mode):
    results = []
    for writes in (False, True):
        torch.manual_seed(2)
        scores, table = leaves(fused)
        out, stats = soft_embedding(scores, table, **mode, return_stats=True, backend=fused.backend)
        loss = out * 1 + stats.entropy.unsqueeze(-1)
        if writes:
            with torch.no_grad():
                for tensor in (stats.argmax, stats.max_prob.detach(), stats.sum_squares.detach(), out.detach()):
                    tensor.zero_()
        results.append(torch.autograd.grad(loss.sum(), (scores, table)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_one_tensor_may_be_scores_and_table(impl, mode):
    """A square one: its gradient is the sum of both roles."""
    both = logits(7, 7, device=impl.device, requires_grad=True)
    out = soft_embedding(both, both, **mode, backend=impl.backend)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, both, upstream)
    one, two = both.detach().clone().requires_grad_(), both.detach().clone().requires_grad_()
    apart = soft_embedding(one, two, **mode, backend=impl.backend)
    assert_alike(got, sum(torch.autograd.grad(apart, (one, two), upstream)))


def test_one_matrix_may_be_head_and_table(impl, monkeypatch):
    """Tied weights: a soft token of the vocabulary that it was predicted over."""
    cut_lookup(monkeypatch, 4)
    hidden, weight = leaves(impl, rows=9, K=16, D=16)
    weight = logits(40, 16, scale=0.5, device=impl.device, requires_grad=True)
    case = Case(Head(hidden, weight), weight, {"temperature": 0.9})
    out = soft_embedding(case.logits, weight, temperature=0.9, backend=impl.backend)
    upstream = torch.randn_like(out)
    of_hidden, of_weight = torch.autograd.grad(out, (hidden, weight), upstream)
    # one leaf of two names, each with the whole gradient
    got = {"out": out, "grad hidden 0": of_hidden, "grad weight 0": of_weight, "grad table": of_weight}
    check_results(case, got, {"out": upstream})


# -- modes of torch ----------------------------------------------------------------------------------------------------


def test_no_grad_and_inference_mode_give_the_same_bits(impl, mode):
    scores, table = leaves(impl)
    recorded = soft_embedding(scores, table, **mode, backend=impl.backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = soft_embedding(scores, table, **mode, backend=impl.backend)
            _, stats = soft_embedding(scores, table, **mode, return_stats=True, backend=impl.backend)
        assert not out.requires_grad and not stats.usage.requires_grad and torch.equal(out, recorded.detach())


def test_numbers_made_in_inference_mode_may_be_used_in_training(fused):
    scores, table = leaves(fused)
    with torch.inference_mode():
        seed, gumbel = torch.tensor(3, device=fused.device), torch.tensor(1.0, device=fused.device)
        mask = torch.zeros(19, dtype=torch.bool, device=fused.device)
    out = soft_embedding(scores, table, gumbel=gumbel, seed=seed, mask=mask, backend=fused.backend)
    want = soft_embedding(scores, table, gumbel=1.0, seed=3, backend=fused.backend)
    for one, two in zip(*(torch.autograd.grad(o.sum(), (scores, table)) for o in (out, want)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("scores_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("table_dtype", [F32, BF16], ids=str)
def test_autocast_decides_the_outputs_dtype_and_no_gradients(impl, mode, dtype, scores_dtype, table_dtype):
    made = {"device": impl.device, "requires_grad": True}
    scores, table = logits(9, 33, dtype=scores_dtype, **made), logits(33, 7, dtype=table_dtype, **made)
    case = Case(scores, table, mode)
    with torch.autocast(impl.device, dtype=dtype):
        out, stats = soft_embedding(scores, table, **mode, return_stats=True, backend=impl.backend)
    assert out.dtype == dtype and stats.entropy.dtype == F32
    upstream = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, (scores, table), upstream)  # outside of the context: remembered
    assert [g.dtype for g in grads] == [scores_dtype, table_dtype]
    got = dict(zip(("out", "grad values 0", "grad table"), (out, *grads), strict=True))
    check_results(case, got, {"out": upstream}, products=dtype)


def test_autocast_leaves_float64_alone(doubles):
    scores, table = leaves(doubles, dtype=F64)
    with torch.autocast(doubles.device, dtype=BF16):
        out = soft_embedding(scores, table, backend=doubles.backend)
    assert out.dtype == F64 and torch.equal(out, soft_embedding(scores, table, backend=doubles.backend))


def test_autocast_runs_a_heads_products_in_its_dtype(impl):
    given, table = head(9, vocab_size=33, bias=True, device=impl.device), logits(33, 7, device=impl.device)
    with torch.autocast(impl.device, dtype=BF16):
        out = soft_embedding(given, table, backend=impl.backend)
    assert out.dtype == BF16
    upstream, leaves = torch.randn_like(out), {name: getattr(given, name) for name in ("hidden", "weight", "bias")}
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    assert [grad.dtype for grad in grads] == [F32] * 3
    got = {"out": out, **{f"grad {name} 0": grad for name, grad in zip(leaves, grads, strict=True)}}
    check_results(Case(given, table), got, {"out": upstream}, products=BF16)


def test_autocast_does_not_copy_scores_into_float32(fused, monkeypatch):
    """No tensor of their size is made beside the probabilities of a chunk."""
    cut_lookup(monkeypatch, 64)
    scores, table = logits(1024, 512, dtype=BF16, device=fused.device), logits(512, 8, device=fused.device)
    sizes = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {
                t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if hasattr(t, "dtype")
            }
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    sizes.append((t.untyped_storage().nbytes(), function.__name__))
            return result

    with torch.autocast(fused.device, dtype=BF16), torch.no_grad(), Spy():
        soft_embedding(scores, table, temperature=0.7, backend=fused.backend)
    assert max(sizes)[0] <= 2 * 1024 * 512 // 8, max(sizes)


def test_the_grad_scaler_and_checkpointing_leave_gradients_as_they_are(impl, mode):
    scores, table = leaves(impl)
    run = lambda s, t: soft_embedding(s, t, **mode, backend=impl.backend).square()  # noqa: E731
    want = torch.autograd.grad(run(scores, table).sum(), (scores, table))
    again = torch.autograd.grad(checkpoint(run, scores, table, use_reentrant=False).sum(), (scores, table))
    scaled = torch.autograd.grad(run(scores, table).sum() * 2.0**16, (scores, table))
    for got, other, exact in zip(again, scaled, want, strict=True):
        assert torch.equal(got, exact)
        assert_alike(other / 2.0**16, exact)


def test_functional_call_and_copies_of_inputs_give_the_same(impl, mode):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.table = (torch.nn.Parameter(t) for t in leaves(impl))

        def forward(self):
            return soft_embedding(self.scores, self.table, **mode, backend=impl.backend)

    model = Model()
    want = model()
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, other, ())
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.square().sum(), list(other.values()))
    for got, exact in zip(grads, torch.autograd.grad(want.square().sum(), list(model.parameters())), strict=True):
        assert torch.equal(got, exact)


def test_statistics_may_be_copied_and_pickled(impl):
    scores, table = leaves(impl)
    _, stats = soft_embedding(scores.detach(), table.detach(), return_stats=True, backend=impl.backend)
    for copied in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        for name in (*FLOATS, "argmax"):
            assert torch.equal(getattr(copied, name), getattr(stats, name))
    with pytest.raises(AttributeError):
        stats.entropy = None


# -- gradcheck ---------------------------------------------------------------------------------------------------------

CHECKED = {
    "soft": {},
    "top_k": {"top_k": 3},
    "mask": {"mask": torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]]).bool()},
    "shared mask and top_k": {"mask": torch.tensor([0, 1, 0, 0, 0]).bool(), "top_k": 2},
}


@pytest.mark.parametrize("num_tables", [0, 2])
@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(doubles, monkeypatch, name, num_tables):
    cut_lookup(monkeypatch, 2)
    options = {k: v.to(doubles.device) if k == "mask" else v for k, v in CHECKED[name].items()}
    tables = (num_tables,) if num_tables else ()
    scores, table = leaves(doubles, rows=4, K=5, D=3, tables=tables, dtype=F64)
    T = torch.tensor([0.5, 1.0, 2.0, 0.8], dtype=F64, device=doubles.device, requires_grad=True)

    def run(scores, table, T):
        out, stats = soft_embedding(scores, table, temperature=T, **options, return_stats=True, backend=doubles.backend)
        return out, *(getattr(stats, field) for field in FLOATS)

    assert torch.autograd.gradcheck(run, (scores, table, T))


def test_gradcheck_of_a_head_and_a_sum_with_softcap_and_scale(doubles):
    made = {"dtype": F64, "device": doubles.device, "requires_grad": True}
    tensors = logits(4, 3, **made), logits(5, 3, **made), logits(5, **made), logits(4, 5, **made), logits(5, 2, **made)
    scale, T = (torch.rand(s, dtype=F64, device=doubles.device).add(0.5).requires_grad_() for s in ((4,), ()))

    def run(hidden, weight, bias, values, table, scale, T):
        sources = [Head(hidden, weight, bias=bias, scale=scale, softcap=6.0), Logits(values, scale=-0.3)]
        return soft_embedding(sources, table, temperature=T, backend=doubles.backend)

    assert torch.autograd.gradcheck(run, (*tensors, scale, T))


@pytest.mark.parametrize("top_k", [None, 3])
def test_straight_through_is_the_gradcheck_of_the_soft_mixture(doubles, top_k):
    """Its gradient is not that of its value: compared with the numeric gradient of what it stands for."""
    scores, table = leaves(doubles, rows=4, K=5, D=3, dtype=F64)
    upstream = torch.randn(4, 3, dtype=F64, device=doubles.device)
    options = {"temperature": 0.7, "top_k": top_k, "backend": doubles.backend}
    (got,) = torch.autograd.grad(soft_embedding(scores, table, hard=True, **options), scores, upstream)
    step, numeric = 1e-6, torch.zeros_like(scores)
    with torch.no_grad():
        for i in range(scores.numel()):
            moved = torch.zeros_like(scores).view(-1).index_fill_(0, torch.tensor(i, device=scores.device), step)
            moved = moved.view_as(scores)
            up, down = (soft_embedding(scores + by * moved, table, **options) for by in (1, -1))
            numeric.view(-1)[i] = ((up - down) * upstream).sum() / (2 * step)
    torch.testing.assert_close(got, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("hard", [False, True])
def test_gradients_given_the_noise_are_those_of_noisy_scores_in_float64(doubles, hard):
    made = {"dtype": F64, "device": doubles.device, "requires_grad": True}
    case = Case(logits(9, 12, **made), logits(2, 12, 4, **made), {"hard": hard, "gumbel": 0.7, "seed": 5})
    got = check(case, doubles.backend, case.upstream("out", *FLOATS))
    drawn = noise.gumbel(9, 12, torch.tensor(5, device=doubles.device), F64)
    assert torch.equal(got["argmax"], (case.logits.detach() + 0.7 * drawn).argmax(-1))


# -- opcheck -----------------------------------------------------------------------------------------------------------


def head_parts(device, rows=4):
    given = head(rows, vocab_size=9, bias=True, device=device, grad=False)
    return [given.hidden, given.weight, given.bias, torch.rand(rows, device=device)]


SAMPLES = {
    "everything": lambda d: arguments(d),
    "only what must be": lambda d: arguments(d, temperature=None, gumbel=None, seed=None, mask=None),
    "hard": lambda d: arguments(d, hard=True),
    "top_k": lambda d: arguments(d, top_k=4),
    "hard top_k": lambda d: arguments(d, top_k=40, hard=True),
    "tables": lambda d: arguments(d, table=logits(2, 9, 3, device=d), temperature=torch.tensor(0.5, device=d)),
    "halves": lambda d: arguments(
        d, parts=[logits(4, 9, dtype=BF16, device=d), None, None, None], table=logits(9, 3, dtype=BF16, device=d)
    ),
    "autocast": lambda d: arguments(d, autocast=BF16),
    "head": lambda d: arguments(d, parts=head_parts(d), softcaps=[5.0]),
    "sum": lambda d: arguments(
        d, parts=[logits(4, 9, device=d), None, None, None, *head_parts(d)], softcaps=[0.0, 0.0]
    ),
    "no rows": lambda d: arguments(
        d, parts=[logits(0, 9, device=d), None, None, None], temperature=None, mask=torch.ones(9, device=d) > 2
    ),
    "views": lambda d: arguments(d, parts=[logits(8, 14, device=d)[::2, 3:12], None, None, None]),
}


@pytest.fixture(params=SAMPLES)
def sample(request, fused):
    return SAMPLES[request.param](fused.device)


@pytest.mark.parametrize("names", [(), ("argmax",), OUTPUTS], ids=lambda names: f"{len(names)} fields")
def test_forward_passes_opcheck(fused, sample, names):
    names = [name for name in names if name != "labels" or sample["top_k"]]
    opcheck(forward_op, (*sample.values(), mask_of(*names), fused.backend))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["all", "no upstream", "statistics"])
def test_backward_passes_opcheck(fused, sample, what):
    names = ["max", "log_denom", "argmax"] + (["labels"] if sample["top_k"] else [])
    mixture, *state = forward_op(*sample.values(), mask_of(*names), fused.backend)
    state += [None] * (4 - len(state))
    rows = state[0]
    upstream = [None if what == "no upstream" else torch.randn_like(rows) for _ in range(3)]
    upstream.append(torch.randn(9, device=fused.device))
    needs = [part is not None for part in (*sample["parts"], sample["temperature"], sample["table"])]
    grad = None if what == "statistics" else torch.randn_like(mixture)
    given = [None if t is None else t.clone() for t in state]
    opcheck(backward_op, (*sample.values(), *given, grad, upstream, needs, fused.backend))
