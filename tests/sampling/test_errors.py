"""What sample_logits refuses: the type of the exception, and a message that names the argument."""

import numpy as np
import pytest
import torch

from auxkernels import Head, Logits, sample_logits

N, V = 4, 7
ROWS = torch.zeros(N, V)

# what is changed of a good call, the exception, what its message must hold
BAD = {
    "no tensor": ({"base": [[1.0] * V]}, TypeError, "base"),
    "no base": ({"base": None}, TypeError, "base"),
    "an empty sequence": ({"aux": []}, ValueError, "aux"),
    "integers": ({"base": torch.zeros(N, V, dtype=torch.int64)}, TypeError, "base"),
    "0-d": ({"base": torch.zeros(())}, ValueError, "base"),
    "no classes": ({"base": torch.zeros(N, 0), "aux": None}, ValueError, "at least one"),
    "gaps": ({"base": torch.zeros(N, 2 * V)[:, ::2]}, ValueError, "contiguous"),
    "two widths": ({"aux": torch.zeros(N, V + 1)}, ValueError, "wide"),
    "two shapes": ({"aux": torch.zeros(N + 1, V)}, ValueError, "aux"),
    "elsewhere": ({"aux": torch.zeros(N, V, device="meta")}, ValueError, "aux"),
    "a head that does not fit": ({"aux": Head(torch.zeros(N, 3), torch.zeros(V, 4))}, ValueError, "weight of aux"),
    "a softcap of 0": ({"base": Logits(ROWS, softcap=0.0)}, ValueError, "softcap"),
    "vocab_size of 0": ({"vocab_size": 0}, ValueError, "vocab_size"),
    "vocab_size beyond": ({"vocab_size": V + 1}, ValueError, "vocab_size"),
    "order": ({"order": "sglang"}, ValueError, "order"),
    "order None": ({"order": None}, ValueError, "order"),
    "return_stats of 1": ({"return_stats": 1}, TypeError, "return_stats"),
    "backend": ({"backend": "cuda"}, ValueError, "backend"),
    "temperature None": ({"temperature": None}, TypeError, "temperature"),
    "temperature of text": ({"temperature": "1"}, TypeError, "temperature"),
    "top_k of 2.0": ({"top_k": 2.0}, TypeError, "top_k"),
    "top_k of 2**70": ({"top_k": 2**70}, ValueError, "top_k"),
    "seed of 65 bits": ({"seed": 2**63}, ValueError, "seed"),
    "negative seed of 65 bits": ({"seed": -(2**63) - 1}, ValueError, "seed"),
    "a float seed": ({"seed": 1.0}, TypeError, "seed"),
    "an int32 seed": ({"seed": torch.zeros(N, dtype=torch.int32)}, TypeError, "seed"),
    "a list of seeds": ({"seed": [1] * N}, TypeError, "seed"),
    "position of 65 bits": ({"position": 2**63}, ValueError, "position"),
    "integer top_p": ({"top_p": torch.ones(N, dtype=torch.int64)}, TypeError, "top_p"),
    "float top_k": ({"top_k": torch.ones(N)}, TypeError, "top_k"),
}
for _name in ("temperature", "top_k", "top_p", "min_p", "plausibility", "seed", "position"):
    _is_int = _name in ("top_k", "seed", "position")
    _dtype = torch.int64 if _is_int else torch.float32
    BAD[f"{_name} bool"] = ({_name: True}, TypeError, _name)
    BAD[f"{_name} of other rows"] = ({_name: torch.zeros(N + 1, dtype=_dtype)}, ValueError, _name)
    BAD[f"a column of {_name}"] = ({_name: torch.zeros(N, 1, dtype=_dtype)}, ValueError, _name)
    BAD[f"{_name} elsewhere"] = ({_name: torch.zeros(N, dtype=_dtype, device="meta")}, ValueError, _name)
    BAD[f"bool tensor of {_name}"] = ({_name: torch.ones(N, dtype=torch.bool)}, TypeError, _name)
    BAD[f"complex tensor of {_name}"] = ({_name: torch.ones(N, dtype=torch.complex64)}, TypeError, _name)
    if _name != "seed":
        BAD[f"negative {_name}"] = ({_name: -1}, ValueError, _name)
        BAD[f"a negative {_name} among others"] = ({_name: torch.tensor([1, 1, -1, 1]).to(_dtype)}, ValueError, "row 2")
    if not _is_int:
        BAD[f"{_name} NaN"] = ({_name: float("nan")}, ValueError, _name)
        BAD[f"{_name} NaN among others"] = ({_name: torch.tensor([1.0, torch.nan, 1.0, 1.0])}, ValueError, "row 1")
        BAD[f"{_name} infinite"] = ({_name: torch.inf}, ValueError, _name)
        BAD[f"{_name} infinite among others"] = ({_name: torch.tensor([1.0, 1.0, 1.0, torch.inf])}, ValueError, "row 3")
    if _name in ("top_p", "min_p", "plausibility"):
        BAD[f"{_name} above 1"] = ({_name: 1.001}, ValueError, _name)
        BAD[f"0-d {_name} above 1"] = ({_name: torch.tensor(1.5)}, ValueError, _name)


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_sampled_from_is_an_error(changed, error, message):
    given = {"base": ROWS, "aux": ROWS, "seed": 1} | changed
    with pytest.raises(error, match=message.replace("[", r"\[")):
        sample_logits(given.pop("base"), given.pop("aux"), **given)


@pytest.mark.parametrize(
    "value", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2).int()], ids=repr
)
def test_integers_of_any_type_are_ints(impl, value):
    s = torch.randn(5, 9, device=impl.device)
    for name in ("top_k", "position", "seed", "vocab_size"):
        if name == "seed" and torch.is_tensor(value) and value.dtype != torch.int64:
            continue
        given = value.to(impl.device) if torch.is_tensor(value) and name != "vocab_size" else value
        found, want = (sample_logits(s, backend=impl.backend, **({"seed": 1} | {name: v})) for v in (given, 2))
        assert torch.equal(found, want), name


@pytest.mark.parametrize(
    "value", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5).double()], ids=repr
)
def test_real_numbers_of_any_type_are_floats(impl, value):
    s = torch.randn(5, 9, device=impl.device)
    for name in ("temperature", "top_p", "min_p", "plausibility"):
        given = value.to(impl.device) if torch.is_tensor(value) else value
        found, want = (sample_logits(s, seed=1, backend=impl.backend, **{name: v}) for v in (given, 0.5))
        assert torch.equal(found, want), name
