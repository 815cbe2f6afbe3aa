"""The operator as torch.library sees it, raw calls with bad arguments, torch.compile, transforms."""

import pytest
import torch
from interpreter import run
from torch.library import opcheck

from auxkernels import Head, Logits, dispatch, sample_logits

F64 = torch.float64
op = torch.ops.auxkernels.sample_logits.default


def arguments(device, num_rows=3, width=9, backend="native", **changes):
    """Of a raw call, by position."""
    rows, column = torch.randn(num_rows, width, device=device), torch.rand(num_rows, device=device)
    given = {
        "leaves": [rows, None, None, None, torch.randn_like(rows), None, None, column],
        "softcaps": [0.0, 5.0],
        "num_base": 1,
        "autocast": None,
        "vocab_size": width,
        "temperature": torch.tensor(0.8, dtype=F64, device=device),
        "top_k": torch.full((num_rows,), 4, device=device),
        "top_p": column.double(),
        "min_p": torch.tensor(0.01, dtype=F64, device=device),
        "plausibility": column.double() / 10,
        "seed": torch.arange(num_rows, device=device),
        "position": torch.arange(num_rows, device=device),
        "order": "vllm",
        "wants_stats": True,
        "backend": backend,
    }
    return tuple((given | changes).values())


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("wants_stats", [False, True])
def test_the_operator_is_what_its_schema_and_fake_say(fused, num_rows, wants_stats):
    given = arguments(fused.device, num_rows, backend=fused.backend, wants_stats=wants_stats)
    opcheck(op, given, test_utils=("test_schema", "test_faketensor"))


def test_a_raw_call_is_the_function(fused):
    given = arguments(fused.device, backend=fused.backend)
    leaves, filters = (
        given[0],
        dict(zip(("temperature", "top_k", "top_p", "min_p", "plausibility"), given[5:10], strict=True)),
    )
    aux = Logits(leaves[4], scale=leaves[7], softcap=5.0)
    more = {"seed": given[10], "position": given[11], "order": "vllm", "return_stats": True, "backend": fused.backend}
    token, stats = sample_logits(leaves[0], aux, **filters, **more)
    assert all(map(torch.equal, op(*given), [token, *vars(stats).values()]))


BAD = {
    "leaves that lack one": {"leaves": [torch.zeros(3, 9), None, None]},
    "no values": {"leaves": [None] * 8},
    "0-d values": {"leaves": [torch.zeros(()), *[None] * 7]},
    "values of another shape": {"leaves": [torch.zeros(3, 9), None, None, None, torch.zeros(4, 9), None, None, None]},
    "num_base of 3": {"num_base": 3},
    "num_base of 0": {"num_base": 0},
    "vocab_size beyond": {"vocab_size": 10},
    "vocab_size of 0": {"vocab_size": 0},
    "a float32 top_k": {"top_k": torch.ones(3)},
    "a top_k of another length": {"top_k": torch.ones(4, dtype=torch.int64)},
    "a negative top_k": {"top_k": torch.tensor(-1)},
    "an integer temperature": {"temperature": torch.tensor(1)},
    "a temperature NaN": {"temperature": torch.tensor([1.0, torch.nan, 1.0])},
    "top_p above 1": {"top_p": torch.tensor(2.0)},
    "an int32 seed": {"seed": torch.tensor(1, dtype=torch.int32)},
    "a negative position": {"position": torch.tensor([0, -1, 2])},
    "an order": {"order": "hf"},
    "a backend": {"backend": "reference"},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
def test_raw_calls_are_checked(changes):
    if reason := dispatch.native_missing():
        pytest.skip(reason)
    with pytest.raises((TypeError, ValueError)):
        op(*arguments("cpu", **changes))


def test_raw_operators_survive_every_empty_shape():
    """A signal would end the process."""
    if reason := dispatch.native_missing():
        pytest.skip(reason)
    code = """
import itertools, torch
import auxkernels
made = 0
for N, V, D, threads in itertools.product((0, 3), (0, 5), (0, 2), (1, 4)):
    torch.set_num_threads(threads)
    for leaves in ([torch.zeros(N, V), None, None, None], [torch.zeros(N, D), torch.zeros(V, D), None, None]):
        for vocab_size, wants_stats in itertools.product({V, 0, 1}, (False, True)):
            one = torch.ones((), dtype=torch.float64)
            numbers = (one, torch.tensor(2), one / 2, one / 2, one / 2, torch.tensor(1))
            given = (leaves, [0.0], 1, None, vocab_size, *numbers)
            made += 1
            try:
                torch.ops.auxkernels.sample_logits(*given, None, "vllm", wants_stats, "native")
            except (ValueError, TypeError, RuntimeError):
                pass
print(made)
"""
    assert int(run(code)) > 60


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_is_eager(fused, dynamic):
    torch._dynamo.reset()

    def function(base, aux, temperature, top_k, seed):
        token, stats = sample_logits(
            base,
            Logits(aux, scale=0.5),
            temperature=temperature,
            top_k=top_k,
            top_p=0.9,
            seed=seed,
            return_stats=True,
            backend=fused.backend,
        )
        return token, stats.log_prob, stats.num_kept

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_rows in (3, 5):
        base, aux = (torch.randn(num_rows, 40, device=fused.device) for _ in range(2))
        numbers = torch.rand(num_rows, device=fused.device) + 0.1, torch.arange(num_rows, device=fused.device) + 1
        given = (base, aux, *numbers, torch.arange(num_rows, device=fused.device))
        assert all(map(torch.equal, compiled(*given), function(*given)))


def test_compiled_calls_refuse_values_out_of_range():
    if reason := dispatch.native_missing():
        pytest.skip(reason)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, T: sample_logits(s, temperature=T, seed=1), fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(2, 5), torch.ones(2)).shape == (2,)
    with pytest.raises(ValueError, match="temperature, row 1"):
        compiled(torch.zeros(2, 5), torch.tensor([1.0, -1.0]))


def test_heads_under_autocast_are_those_of_16_bits(impl):
    hidden, weight = torch.randn(4, 16, device=impl.device), torch.randn(50, 16, device=impl.device)
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        token = sample_logits(Head(hidden, weight), temperature=0, backend=impl.backend)
    halves = Head(hidden.bfloat16(), weight.bfloat16())
    assert torch.equal(token, sample_logits(halves, temperature=0, backend=impl.backend))


def test_the_sum_of_many_rows_is_never_stored():
    """64 rows of 50,000 float32 numbers are 12.8 MB; a row of each of two threads is 0.4 MB."""
    if reason := dispatch.native_missing():
        pytest.skip(reason)
    from interpreter import RESIDENT_SIZE

    code = """
import torch
from auxkernels import sample_logits
torch.set_num_threads(2)
base, aux = (torch.randn(64, 50_000).bfloat16() for _ in range(2))
call = lambda: sample_logits(base, aux, top_p=0.9, top_k=50, plausibility=1e-4, seed=1, return_stats=True)
sample_logits(base[:2], aux[:2], top_p=0.9, top_k=50, plausibility=1e-4, seed=1, return_stats=True)
reset_peak()
before = status("VmRSS")
call()
print(status("VmHWM") - before)
"""
    assert int(run(code, RESIDENT_SIZE)) < 6 << 20
