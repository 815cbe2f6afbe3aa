"""What is asked of sample_logits and of its implementations: by name, and the mathematics.

Row n has the base's sum z and the sum s = z + aux, each side added from left to right in the compute dtype, products
with scales rounded before they are added. With m_z the largest z, and m the largest s among what is allowed:

    allowed     s_v > -inf, and z_v - m_z >= log(plausibility)
    top-k       allowed, and s_v at least the k-th largest allowed s
    min-p       s_v - m >= T log(min_p)
    top-p       M_v < top_p Z, with M_v the weight of the classes of the set whose s is greater than s_v, and Z that of
                all of the set: of the top-k ("transformers"), of those that are in min-p, too ("vllm")
    kept        all of them; the largest s is always kept
    token       the kept v with the largest (s_v - m) / T + gumbel_v, the lowest on a tie; for T = 0 the largest s

Every set is one of the largest s, so that ties at a threshold are kept, all of them. A row is no distribution, and gets
token -1, if it has a NaN or +inf or no allowed class, or if a parameter of it is out of range (on CPU an error).

What a decision hangs on is made of operations that round in one way on every device (arithmetic.py): thresholds and the
choice in float64; a weight is exp((s_v - m) / T) in float32, cut to a multiple of 2**-40, so that sums of weights are
exact whatever their order. Two of s within a rounding of each other may be told apart, so that of heads (products of a
library) and softcaps (tanh) the tokens of two backends can differ where their s do.

Noise of row n and class v: Philox4x32-10 with key = seed[n] and counter = (v >> 2, position[n] low, position[n] high,
0), lane v & 3 of it, which is the generator of soft_embedding with the position for the row. All 32 bits count here:
u = (bits + 0.5) * 2**-32 and then -log(-log(u)); with 23 of them classes would tie for the largest noise in 2 of 100
rows of 150,000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..sources import Matrix, SourceTensors

ORDERS = ("transformers", "vllm")
# what a row is given, as SampleStats has it after the token
FIELDS = ("token", "log_prob", "kept_log_prob", "num_kept", "base_rank")
WEIGHT_BITS = 40  # of a weight's fraction: 2**23 classes of weight 1 fit into 63 bits
MAX_CLASSES = 1 << (63 - WEIGHT_BITS)


class Parameters(NamedTuple):
    """Numbers, or one for each row or all; None: no such filter."""

    temperature: float | Tensor
    top_k: int | Tensor | None  # 0: all classes
    top_p: float | Tensor | None
    min_p: float | Tensor | None
    plausibility: float | Tensor | None
    seed: int | Tensor
    position: int | Tensor | None  # None: the row's number


INTEGERS = ("top_k", "seed", "position")
# what a filter that is not there is as a number
DEFAULTS: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "plausibility": 0.0, "position": 0}
_INT64 = -(2**63), 2**63 - 1
# of each: the dtypes of a tensor, the least and the largest value
RULES: dict[str, tuple[tuple[torch.dtype, ...], float, float]] = {
    "temperature": (checks.FLOATING, 0.0, checks.FLOAT_MAX),
    "top_k": (checks.INTEGERS, 0, _INT64[1]),
    "top_p": (checks.FLOATING, 0.0, 1.0),
    "min_p": (checks.FLOATING, 0.0, 1.0),
    "plausibility": (checks.FLOATING, 0.0, 1.0),
    "seed": ((torch.int64,), *_INT64),
    "position": (checks.INTEGERS, 0, _INT64[1]),
}


class Request(NamedTuple):
    """What the operator is asked about: sources, the first `num_base` of which are the base, and parameters."""

    sources: list[SourceTensors]
    num_base: int
    autocast: torch.dtype | None
    vocab_size: int
    parameters: Parameters
    order: str
    wants_stats: bool

    def first(self) -> Tensor:
        return self.sources[0].values

    def shape(self) -> torch.Size:
        return self.first().shape[:-1]

    def compute(self) -> torch.dtype:
        is_double = any(source.values.dtype == torch.float64 for source in self.sources)
        return torch.float64 if is_double else torch.float32


class SampleRows(NamedTuple):
    """A chunk of rows as an implementation takes them; its module says whether a side may be several matrices."""

    base: list[Matrix]
    aux: list[Matrix]
    num_rows: int
    first_row: int  # its number, which is its position where none is given
    vocab_size: int
    compute: torch.dtype
    order: str
    parameters: Parameters  # of the chunk


def empty_fields(request: Request) -> list[Tensor]:
    """Room for the tokens [*] and, where wanted, the fields of `SampleStats`."""
    like, shape, compute = request.first(), request.shape(), request.compute()
    dtypes = (torch.int64, compute, compute, torch.int64, torch.int64)
    return [like.new_empty(shape, dtype=dtype) for dtype in dtypes[: None if request.wants_stats else 1]]


def check_parameters(given: Parameters, shape: torch.Size, device: torch.device) -> Parameters:
    """Types, shapes and numbers, but not what tensors hold. Numbers come back as ints and floats."""
    checked: dict[str, Any] = {}
    for name, value in given._asdict().items():
        is_off = value is None and name not in ("temperature", "seed")
        checked[name] = None if is_off else checks.row_parameter(name, value, shape, device, *RULES[name])
    return Parameters(**checked)


def check_values(given: Parameters) -> None:
    """What tensors on CPU hold: those on a GPU are looked at by a kernel alone."""
    for name, value in given._asdict().items():
        if isinstance(value, Tensor) and name != "seed":
            checks.row_parameter_values(name, value, *RULES[name][1:])


def check(request: Request) -> None:
    """A request by itself, so that a raw call of the operator is as safe as the public function."""
    if request.first().dim() == 0:
        raise ValueError("source 0 must be [*, V] or [*, D], got a 0-d tensor")
    shape, device = request.shape(), request.first().device
    widths = [
        (f"source {i}", checks.source_tensors(f"source {i}", one, shape, device, request.autocast)[0])
        for i, one in enumerate(request.sources)
    ]
    check_size(checks.common_width(widths, request.vocab_size))
    checks.one_of("order", request.order, ORDERS)
    check_parameters(request.parameters, shape, device)


def check_size(vocab_size: int) -> None:
    if vocab_size > MAX_CLASSES:
        raise ValueError(f"vocab_size must be at most {MAX_CLASSES} to sample from, got {vocab_size}")
