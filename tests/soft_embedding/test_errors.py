"""What soft_embedding refuses: the type of the exception, and a message that names the argument."""

import pytest
import torch
from inputs import head
from raw_lookup import arguments, backward_op, forward_op
from soft_oracle import F64

from auxkernels import Head, Logits, nn, soft_embedding

K, D = 7, 3
BF16 = torch.bfloat16


def scores(*shape, dtype=torch.float32):
    return torch.zeros(*(shape or (4,)), K, dtype=dtype)


def table(*tables, dtype=torch.float32):
    return torch.zeros(*tables, K, D, dtype=dtype)


def quantised():
    return torch.quantize_per_tensor(torch.zeros(K, D), 0.1, 0, torch.qint8)


# what is changed of a good call, the exception, what its message must hold
BAD = {
    "scores that are no tensor": ({"logits": [[1.0] * K]}, TypeError, "logits"),
    "no scores": ({"logits": None}, TypeError, "logits"),
    "an empty sequence": ({"logits": []}, ValueError, "logits"),
    "0-d scores": ({"logits": torch.zeros(())}, ValueError, "logits"),
    "integer scores": ({"logits": torch.zeros(4, K, dtype=torch.int64)}, TypeError, "logits"),
    "complex scores": ({"logits": torch.zeros(4, K, dtype=torch.complex64)}, TypeError, "logits"),
    "bool scores": ({"logits": torch.zeros(4, K, dtype=torch.bool)}, TypeError, "logits"),
    "sparse scores": ({"logits": torch.zeros(4, K).to_sparse()}, TypeError, "logits"),
    "scores with gaps": ({"logits": torch.zeros(4, 2 * K)[:, ::2]}, ValueError, "contiguous"),
    "scores wider than the table": ({"logits": torch.zeros(4, K + 1)}, ValueError, "table"),
    "scores narrower than the table": ({"logits": torch.zeros(4, K - 1)}, ValueError, "table"),
    "no labels": ({"logits": torch.zeros(4, 0), "table": torch.zeros(0, D)}, ValueError, "at least one"),
    "sources of two widths": ({"logits": [torch.zeros(4, K), torch.zeros(4, K + 1)]}, ValueError, "wide"),
    "sources of two lengths": ({"logits": [torch.zeros(4, K), torch.zeros(5, K)]}, ValueError, "logits[1]"),
    "a table that is no tensor": ({"table": [[1.0] * D] * K}, TypeError, "table"),
    "a flat table": ({"table": torch.zeros(K)}, ValueError, "table"),
    "a table of four dimensions": ({"table": torch.zeros(1, 1, K, D)}, ValueError, "table"),
    "a table with labels last": ({"table": torch.zeros(D, K)}, ValueError, "table"),
    "an integer table": ({"table": torch.zeros(K, D, dtype=torch.int64)}, TypeError, "table"),
    "a complex table": ({"table": torch.zeros(K, D, dtype=torch.complex64)}, TypeError, "table"),
    "a sparse table": ({"table": torch.zeros(K, D).to_sparse()}, TypeError, "table"),
    "a quantised table": ({"table": quantised}, TypeError, "table"),
    "an 8-bit table": ({"table": torch.zeros(K, D).to(torch.float8_e4m3fn)}, TypeError, "table"),
    "a table elsewhere": ({"table": torch.zeros(K, D, device="meta")}, ValueError, "table"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperature int 0": ({"temperature": 0}, ValueError, "temperature"),
    "negative temperature": ({"temperature": -1.0}, ValueError, "temperature"),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, "temperature"),
    "temperature of text": ({"temperature": "1"}, TypeError, "temperature"),
    "temperature bool": ({"temperature": True}, TypeError, "temperature"),
    "temperature None": ({"temperature": None}, TypeError, "temperature"),
    "temperatures for other rows": ({"temperature": torch.ones(3)}, ValueError, "temperature"),
    "temperatures for labels": ({"temperature": torch.ones(K)}, ValueError, "temperature"),
    "a column of temperatures": ({"temperature": torch.ones(4, 1)}, ValueError, "temperature"),
    "integer temperatures": ({"temperature": torch.ones(4, dtype=torch.int64)}, TypeError, "temperature"),
    "temperatures elsewhere": ({"temperature": torch.ones(4, device="meta")}, ValueError, "temperature"),
    "hard of 1": ({"hard": 1}, TypeError, "hard"),
    "hard of text": ({"hard": "yes"}, TypeError, "hard"),
    "negative gumbel": ({"gumbel": -0.5}, ValueError, "gumbel"),
    "gumbel NaN": ({"gumbel": float("nan")}, ValueError, "gumbel"),
    "gumbel bool": ({"gumbel": True}, TypeError, "gumbel"),
    "gumbel of text": ({"gumbel": "1"}, TypeError, "gumbel"),
    "gumbel None": ({"gumbel": None}, TypeError, "gumbel"),
    "gumbel per row": ({"gumbel": torch.ones(4)}, ValueError, "gumbel"),
    "integer gumbel tensor": ({"gumbel": torch.ones((), dtype=torch.int64)}, TypeError, "gumbel"),
    "a float seed": ({"gumbel": 1.0, "seed": 1.0}, TypeError, "seed"),
    "a bool seed": ({"gumbel": 1.0, "seed": True}, TypeError, "seed"),
    "a seed of text": ({"gumbel": 1.0, "seed": "1"}, TypeError, "seed"),
    "a seed of 65 bits": ({"gumbel": 1.0, "seed": 2**63}, ValueError, "seed"),
    "a negative seed of 65 bits": ({"gumbel": 1.0, "seed": -(2**63) - 1}, ValueError, "seed"),
    "an int32 seed": ({"gumbel": 1.0, "seed": torch.tensor(1, dtype=torch.int32)}, (TypeError, ValueError), "seed"),
    "a float seed tensor": ({"gumbel": 1.0, "seed": torch.tensor(1.0)}, (TypeError, ValueError), "seed"),
    "two seeds": ({"gumbel": 1.0, "seed": torch.tensor([1, 2])}, ValueError, "seed"),
    "a float mask": ({"mask": torch.zeros(K)}, TypeError, "mask"),
    "a uint8 mask": ({"mask": torch.zeros(K, dtype=torch.uint8)}, TypeError, "mask"),
    "a mask of a list": ({"mask": [False] * K}, TypeError, "mask"),
    "a short mask": ({"mask": torch.zeros(K - 1, dtype=torch.bool)}, ValueError, "mask"),
    "a mask of other rows": ({"mask": torch.zeros(3, K, dtype=torch.bool)}, ValueError, "mask"),
    "a mask of one row": ({"mask": torch.zeros(1, K, dtype=torch.bool)}, ValueError, "mask"),
    "a mask elsewhere": ({"mask": torch.zeros(K, dtype=torch.bool, device="meta")}, ValueError, "mask"),
    "top_k 0": ({"top_k": 0}, ValueError, "top_k"),
    "negative top_k": ({"top_k": -1}, ValueError, "top_k"),
    "top_k bool": ({"top_k": True}, TypeError, "top_k"),
    "top_k float": ({"top_k": 2.0}, TypeError, "top_k"),
    "top_k vector": ({"top_k": torch.tensor([2])}, TypeError, "top_k"),
    "an unknown backend": ({"backend": "cuda"}, ValueError, "backend"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_meant_is_refused_by_name(on_cpu, what):
    change, error, name = BAD[what]
    change = {key: value() if callable(value) else value for key, value in change.items()}
    given = {"logits": scores(), "table": table(), "backend": on_cpu.backend} | change
    with pytest.raises(error) as caught:
        soft_embedding(given.pop("logits"), given.pop("table"), **given)
    assert name in str(caught.value)


@pytest.mark.parametrize("what", ["hidden", "weight", "bias", "scale", "softcap"])
def test_a_heads_mistakes_are_refused_by_name(on_cpu, what):
    good = head(4, vocab_size=K, width=5, bias=True, grad=False)
    parts = {"hidden": good.hidden, "weight": good.weight, "bias": good.bias, "scale": 1.0, "softcap": None}
    bad = {
        "hidden": torch.zeros(4, 5, dtype=torch.int64),
        "weight": torch.zeros(K, 6),
        "bias": torch.zeros(K + 1),
        "scale": torch.ones(3),
        "softcap": -1.0,
    }
    parts[what] = bad[what]
    hidden, weight = parts.pop("hidden"), parts.pop("weight")
    with pytest.raises((TypeError, ValueError), match=what):
        soft_embedding(Head(hidden, weight, **parts), table(), backend=on_cpu.backend)


def test_a_backend_that_cannot_is_an_error_that_says_why():
    with pytest.raises((RuntimeError, TypeError, ValueError), match="triton"):
        soft_embedding(scores(), table(), backend="triton")


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        soft_embedding(scores(), table(), 0.5)


def test_good_calls_that_look_unusual_are_taken(on_cpu):
    run = {"backend": on_cpu.backend}
    assert soft_embedding(scores(), table(), temperature=2, **run).shape == (4, D)
    assert soft_embedding(scores(), table(), temperature=float("inf"), **run).shape == (4, D)
    assert soft_embedding(scores(), table(dtype=BF16), top_k=10**9, **run).dtype == BF16
    assert soft_embedding(Logits(scores(dtype=F64), scale=2.0), table(), **run).dtype == torch.float32
    assert soft_embedding([scores(), scores(dtype=BF16)], table(2), **run).shape == (2, 4, D)
    assert soft_embedding(torch.zeros(K), table(), mask=torch.zeros(K, dtype=torch.bool), **run).shape == (D,)
    square = torch.zeros(K, K)  # [K] and [*, K] are told apart by their dimensions
    assert soft_embedding(square, table(), mask=torch.eye(K, dtype=torch.bool), **run).shape == (K, D)


def test_nothing_is_written_before_a_refusal(on_cpu):
    given = scores().requires_grad_()
    module = nn.SoftEmbedding(K, D, backend=on_cpu.backend)
    with pytest.raises(ValueError):
        module(given, mask=torch.zeros(3, dtype=torch.bool))
    assert given.grad is None and module.weight.grad is None


# -- raw ops -----------------------------------------------------------------------------------------------------------

RAW = {
    "no parts": {"parts": [], "softcaps": []},
    "parts of another number": {"parts": [torch.zeros(4, 9), None, None]},
    "a part that is not there": {"parts": [None] * 4},
    "an integer part": {"parts": [torch.zeros(4, 9, dtype=torch.int64), None, None, None]},
    "a part with gaps": {"parts": [torch.zeros(4, 18)[:, ::2], None, None, None]},
    "scores of another width": {"parts": [torch.zeros(4, 8), None, None, None]},
    "a negative softcap": {"softcaps": [-1.0]},
    "a flat table": {"table": torch.zeros(9)},
    "an integer table": {"table": torch.zeros(9, 3, dtype=torch.int64)},
    "a table elsewhere": {"table": torch.zeros(9, 3, device="meta")},
    "other temperatures": {"temperature": torch.ones(3)},
    "integer temperature": {"temperature": torch.ones((), dtype=torch.int64)},
    "temperature elsewhere": {"temperature": torch.ones((), device="meta")},
    "gumbel per row": {"gumbel": torch.ones(4)},
    "gumbel without a seed": {"seed": None},
    "a seed without gumbel": {"gumbel": None},
    "a float seed": {"seed": torch.tensor(1.0)},
    "a float mask": {"mask": torch.zeros(9)},
    "a mask of other rows": {"mask": torch.zeros(3, 9, dtype=torch.bool)},
    "a mask elsewhere": {"mask": torch.zeros(9, dtype=torch.bool, device="meta")},
    "negative top_k": {"top_k": -1},
    "an integer autocast": {"autocast": torch.int32},
}


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("what", RAW)
def test_a_raw_call_refuses_nonsense(native, op, what):
    given = arguments("cpu") | RAW[what]
    with pytest.raises((TypeError, ValueError)):
        if op == "forward":
            forward_op(*given.values(), 1, "native")
        else:
            rows = [torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.int64)]
            needs = [True, False, False, False, False, True]
            backward_op(*given.values(), *rows, None, torch.zeros(4, 3), [None] * 4, needs, "native")


@pytest.mark.parametrize("wanted", [-1, 1 << 8, 1 << 40])
def test_a_raw_forward_refuses_fields_that_do_not_exist(native, wanted):
    with pytest.raises(ValueError, match="wanted"):
        forward_op(*arguments("cpu").values(), wanted, "native")


def test_a_raw_forward_gives_no_labels_where_none_are_selected(native):
    try:
        *_, labels = forward_op(*arguments("cpu").values(), 1 << 7, "native")
    except ValueError:
        return
    assert labels.numel() == 0


BACKWARD = {
    "a short max": {"max": torch.zeros(3)},
    "a max of another dtype": {"max": torch.zeros(4, dtype=F64)},
    "a short log_denom": {"log_denom": torch.zeros(3)},
    "a long argmax": {"argmax": torch.zeros(5, dtype=torch.int64)},
    "a float argmax": {"argmax": torch.zeros(4)},
    "labels without top_k": {"labels": torch.zeros(4, 2, dtype=torch.int64)},
    "a gradient of another width": {"grad": torch.zeros(4, 4)},
    "a gradient of other rows": {"grad": torch.zeros(3, 3)},
    "a short upstream": {"upstream": [torch.zeros(3), None, None, None]},
    "an upstream per label": {"upstream": [None, None, None, torch.zeros(8)]},
    "three upstreams": {"upstream": [None] * 3},
    "few needs": {"needs": [True]},
    "a gradient of what is not there": {"needs": [True, True, False, False, False, True]},
}


@pytest.mark.parametrize("what", BACKWARD)
def test_a_raw_backward_refuses_a_state_that_is_not_the_rows(native, what):
    rest = {
        "max": torch.zeros(4),
        "log_denom": torch.zeros(4),
        "argmax": torch.zeros(4, dtype=torch.int64),
        "labels": None,
        "grad": torch.zeros(4, 3),
        "upstream": [None] * 4,
        "needs": [True, False, False, False, True, True],
    } | BACKWARD[what]
    with pytest.raises((TypeError, ValueError)):
        backward_op(*arguments("cpu").values(), *rest.values(), "native")


@pytest.mark.parametrize("label", [9, 2**31, 2**40, 2**63 - 1])
def test_a_raw_backward_reads_no_label_that_does_not_exist(native, label):
    given = arguments("cpu", top_k=2, gumbel=None, seed=None, mask=None)
    rows = [torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.int64)]
    labels = torch.tensor([[0, label]] * 4)
    with pytest.raises((ValueError, IndexError)):
        backward_op(
            *given.values(),
            *rows,
            labels,
            torch.ones(4, 3),
            [None] * 4,
            [True, False, False, False, True, True],
            "native",
        )


@pytest.mark.parametrize("argmax", [9, -2, 2**40])
def test_a_raw_backward_writes_no_label_that_does_not_exist(native, argmax):
    """An argmax is an index too: into the rows of the table's gradient, and into the row of the probabilities."""
    given = arguments("cpu", hard=True, gumbel=None, seed=None, mask=None)
    rows = [torch.zeros(4), torch.zeros(4), torch.full((4,), argmax)]
    upstream = [None, torch.ones(4), None, None]
    try:
        grads = backward_op(
            *given.values(), *rows, None, torch.ones(4, 3), upstream, [True, False, False, False, False, True], "native"
        )
    except (ValueError, IndexError):
        return
    assert not grads[1].any()


def test_a_raw_call_of_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        forward_op(*arguments("cpu").values(), 1, "auto")
