"""Argument checks: one function per rule, one message format (argument, rule, received value)."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sources import Head, Leaves, Logits, Source, SourceTensors, by_source

if TYPE_CHECKING:
    from .cross_entropy.request import Request as CrossEntropyRequest
    from .soft_embedding.request import Request as LookupRequest
    from .soft_embedding.request import State as LookupState

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
FLOAT_MAX = torch.finfo(torch.float64).max
REDUCTIONS = ("mean", "sum", "none")
_PLAIN = (Tensor, torch.nn.Parameter)


def plain_tensor(name: str, value: object) -> Tensor:
    """A dense, unquantised, unsharded tensor; anything else has no strided memory that a kernel could read."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantised, got {value.dtype}")
    if type(value) not in _PLAIN and is_traceable_wrapper_subclass(value):  # sharded, quantised: others hold its memory
        hint = ": pass to_local() of an unsharded tensor" if type(value).__name__ == "DTensor" else ""
        raise TypeError(f"{name} must be a plain tensor, got {type(value).__name__}{hint}")
    return value


def floating(name: str, value: object) -> Tensor:
    tensor = plain_tensor(name, value)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def number(name: str, value: object) -> float:
    """A real number of any type, NumPy's too, as a float; a symbolic one as it is."""
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        bits = int(value).bit_length()  # type: ignore[call-overload]
        raise ValueError(f"{name} must fit in a float, got an integer of {bits} bits") from None


def real_number(name: str, value: object, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    if type(value) is float and minimum <= value <= maximum:
        return value
    found = number(name, value)
    if isinstance(found, (torch.SymFloat, torch.SymInt)):
        return found
    if not minimum <= found <= maximum:
        if minimum == -math.inf:
            raise ValueError(f"{name} must not be NaN, got {value}")
        bounds = f"at least {minimum:g}" if maximum == math.inf else f"in [{minimum:g}, {maximum:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return found


def leading(name: str, given: Source) -> tuple[torch.Size, torch.device]:
    """Leading shape and device of a source, where there is no target to say them."""
    of, values, form = _values_of(name, given)
    floating(of, values)
    if values.dim() == 0:
        raise ValueError(f"{of} must be {form}, got a 0-d tensor")
    return values.shape[:-1], values.device


def _values_of(name: str, given: Source) -> tuple[str, Tensor, str]:
    """What the rows of a source are in: their name, the tensor and its form."""
    if isinstance(given, Logits):
        return name, given.values, "[*, V]"
    return f"hidden of {name}", given.hidden, "[*, D]"


def source(
    name: str, given: Source, shape: torch.Size, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[int, torch.dtype]:
    """One source against the target's shape and device; returns its number of classes and its dtype."""
    of, values, form = _values_of(name, given)
    floating(of, values)
    if values.device != device:
        raise ValueError(f"{of} must be on the target's device {device}, got {values.device}")
    if values.dim() == 0 or values.shape[:-1] != shape:
        raise ValueError(
            f"{of} must be {form} with leading shape {list(shape)}, got {list(values.shape)}: "
            "the leading shape is the target's"
        )
    if given.softcap is not None:
        softcap(f"softcap of {name}", given.softcap)
    if type(given.scale) is not float:
        scale(f"scale of {name}", given.scale, shape, device)
    if isinstance(given, Head):
        return head(name, given, autocast), values.dtype
    if values.stride(-1) != 1 and values.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got stride {values.stride(-1)}: "
            f"call .contiguous() on it first"
        )
    return values.shape[-1], values.dtype


def head(name: str, given: Head, autocast: torch.dtype | None) -> int:
    """Weight and bias of a head against its hidden states; returns its number of classes."""
    hidden, weight, bias = given.hidden, floating(f"weight of {name}", given.weight), given.bias
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight of {name} must be [V, D] with the hidden states' D={hidden.shape[-1]}, got {list(weight.shape)}"
        )
    shared = [("weight", weight)]
    if bias is not None:
        shared.append(("bias", floating(f"bias of {name}", bias)))
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias of {name} must be [{weight.shape[0]}], got {list(bias.shape)}")
    for part, tensor in shared:
        if tensor.device != hidden.device:
            raise ValueError(
                f"{part} of {name} must be on the hidden states' device {hidden.device}, got {tensor.device}"
            )
        # autocast makes one dtype of all but float64
        is_cast = autocast is not None and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.dtype != hidden.dtype and not is_cast:
            raise TypeError(f"{part} of {name} must have the hidden states' dtype {hidden.dtype}, got {tensor.dtype}")
    return weight.shape[0]


def softcap(name: str, value: object) -> None:
    found = number(name, value)
    if not 2.0**-126 <= found <= 2.0**126:  # float32 must hold it and its inverse
        raise ValueError(f"{name} must be positive and finite, got {value}: float32 has to hold it and its inverse")


def scale(name: str, value: object, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        number(name, value)
        return
    floating(name, value)
    if value.dim() and value.shape != shape:
        raise ValueError(f"{name} must have shape [] or {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the target's device {device}, got {value.device}")


def classes(value: object) -> Tensor:
    tensor = plain_tensor("target", value)
    if tensor.dtype not in (torch.int64, torch.int32):
        hint = ": class probabilities are not supported" if tensor.is_floating_point() else ""
        raise TypeError(f"target must be int32 or int64, got {tensor.dtype}{hint}")
    return tensor


def class_weight(value: object, vocab_size: int, device: torch.device) -> None:
    tensor = floating("weight", value)
    if tuple(tensor.shape) != (vocab_size,):
        raise ValueError(f"weight must have shape [{vocab_size}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"weight must be on the target's device {device}, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError("weight must not require a gradient: none is computed for it")


def common_width(widths: list[tuple[str, int]], vocab_size: int | None) -> int:
    """The number of classes: the sources' common width, or the leading `vocab_size` columns of each."""
    if vocab_size is None:
        vocab_size = widths[0][1]
        for _, width in widths:
            if width != vocab_size:
                listed = ", ".join(f"{name} {width}" for name, width in widths)
                raise ValueError(f"the sources must be equally wide, or vocab_size must be given, got widths {listed}")
    else:
        vocab_size = integer("vocab_size", vocab_size)
    if vocab_size < 1:
        raise ValueError(f"vocab_size: there must be at least one class, got {vocab_size}")
    for name, width in widths:
        if vocab_size > width:
            raise ValueError(f"vocab_size must be at most the width of {name}, {width}, got {vocab_size}")
    return vocab_size


def flat_sources(
    leaves: Sequence[Tensor | None],
    softcaps: Sequence[float],
    num_base: int,
    autocast: torch.dtype | None,
    needs: Sequence[bool] | None,
) -> None:
    """Sources as an operator takes them."""
    num_leaves = len(Leaves._fields) * len(softcaps)
    is_complete = len(leaves) == num_leaves and all(one.values is not None for one in by_source(leaves))
    if not is_complete or not 1 <= num_base <= len(softcaps):
        raise ValueError(
            "leaves must hold four entries for each softcap, the first of them given, and num_base be in "
            f"[1, {len(softcaps)}], got {len(leaves)} leaves and num_base={num_base}"
        )
    if autocast is not None and autocast not in FLOATING:
        raise TypeError(f"autocast must be a floating dtype, got {autocast}")
    if needs is None:
        return
    if len(needs) != num_leaves:
        raise ValueError(f"needs must have an entry for each of the {num_leaves} leaves, got {len(needs)}")
    if any(need and leaf is None for need, leaf in zip(needs, leaves, strict=True)):
        raise ValueError("needs must ask for gradients of what is given")


def source_tensors(
    name: str, given: SourceTensors, shape: torch.Size, device: torch.device, autocast: torch.dtype | None
) -> tuple[int, torch.dtype]:
    """`source` for one as the operators take it."""
    scale = 1.0 if given.scale is None else given.scale
    if given.weight is None:
        return source(name, Logits(given.values, scale=scale, softcap=given.softcap), shape, device, autocast)
    head = Head(given.values, given.weight, bias=given.bias, scale=scale, softcap=given.softcap)
    return source(name, head, shape, device, autocast)


def cross_entropy_request(request: CrossEntropyRequest) -> None:
    """A request by itself, so that a raw call of an operator is as safe as the public function."""
    if request.first().dim() == 0:
        raise ValueError("source 0 must be [*, V] or [*, D], got a 0-d tensor")
    shape, device = request.shape(), request.first().device
    widths = [
        (f"source {i}", source_tensors(f"source {i}", one, shape, device, request.autocast)[0])
        for i, one in enumerate(request.sources)
    ]
    common_width(widths, request.vocab_size)
    target_of(shape, device, request.target)
    if request.weight is not None:
        class_weight(request.weight, request.vocab_size, device)


def row_numbers(name: str, values: Tensor | None, shape: torch.Size) -> None:
    if values is not None and values.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}")


def target_of(shape: torch.Size, device: torch.device, target: Tensor | None) -> None:
    if target is None:
        return
    classes(target)
    if target.shape != shape or target.device != device:
        raise ValueError(
            f"target must have shape {list(shape)} and be on {device}, got {list(target.shape)} on {target.device}"
        )


def rescaled(grad: Tensor, factor: Tensor, target: Tensor | None) -> None:
    """The arguments of the op that rescales a gradient in place."""
    floating("grad", grad)
    if not grad.is_contiguous():
        raise ValueError(f"grad must be contiguous, got strides {grad.stride()}")
    if grad.dim() == 0:
        raise ValueError("grad must be [*, V], got a 0-d tensor")
    target_of(grad.shape[:-1], grad.device, target)
    if factor.dim() or factor.device != grad.device:
        raise ValueError(f"factor must be 0-d and on {grad.device}, got {list(factor.shape)} on {factor.device}")


def _is_bool(value: object) -> bool:
    """Whether it is a truth value: a bool, one of NumPy's, or a tensor or array of them."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def integer(name: str, value: Any) -> int:
    """What torch takes for an int, as one: whatever Python takes for an index (NumPy's integers, 0-d integer tensors),
    but no bool. A symbolic one as it is."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not _is_bool(value) and not (isinstance(value, Tensor) and value.dim()):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def int64(name: str, value: object) -> int:
    found = integer(name, value)
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return found


def boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if not _is_bool(value) or isinstance(value, Tensor) or getattr(value, "ndim", False):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def reduction(value: object, normalizer: object) -> float | Tensor | None:
    """The normalizer, if it is a number as a float."""
    if value not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {value!r}")
    if normalizer is None:
        return None
    if value != "mean":
        raise ValueError(f"normalizer needs reduction='mean', got reduction={value!r}")
    if isinstance(normalizer, Tensor):
        plain_tensor("normalizer", normalizer)
        if normalizer.dim() or normalizer.is_complex():
            raise ValueError(f"normalizer must be a real 0-d tensor, got {normalizer.dtype} {list(normalizer.shape)}")
        return normalizer
    return real_number("normalizer", normalizer)


def in_range_message(shape: torch.Size, row: int, value: int, vocab_size: int, ignore_index: int) -> str:
    """The text of the IndexError for a target that names no class."""
    index = []
    rest = row
    for size in reversed(shape):
        index.append(rest % size)
        rest //= size
    where = ", ".join(map(str, reversed(index)))
    return (
        f"target must be in [0, {vocab_size}) or ignore_index={ignore_index}, got target[{where}] = {value} (row {row})"
    )


# -- soft_embedding ----------------------------------------------------------------------------------------------------


def tables(value: object, may_lack_labels: bool = False) -> Tensor:
    tensor = floating("table", value)
    if tensor.dim() not in (2, 3):
        raise ValueError(f"table must be [K, D] or [L, K, D], got {list(tensor.shape)}")
    needed = tensor.shape[:-2] + tensor.shape[-1:] if may_lack_labels else (tensor.shape[0], tensor.shape[-1])
    if 0 in needed:
        raise ValueError(f"table must have at least one table and one column, got {list(tensor.shape)}")
    return tensor


def table_of(table: Tensor, num_labels: int, device: torch.device) -> None:
    if table.shape[-2] != num_labels:
        raise ValueError(f"table must have a row for each of the {num_labels} labels, got {list(table.shape)}")
    if table.device != device:
        raise ValueError(f"table must be on the scores' device {device}, got {table.device}")


class LookupOptions(NamedTuple):
    """Options of soft_embedding: numbers as floats and ints, top_k 0 for all labels."""

    temperature: float | Tensor
    hard: bool
    gumbel: float | Tensor
    seed: int | Tensor | None
    top_k: int


def lookup_options(
    temperature: object,
    hard: object,
    gumbel: object,
    seed: object,
    mask: object,
    top_k: object,
    shape: torch.Size,
    num_labels: int,
    device: torch.device,
) -> LookupOptions:
    """Options of soft_embedding; tensors are not looked into."""
    if isinstance(temperature, Tensor):
        scale("temperature", temperature, shape, device)
    else:
        temperature = number("temperature", temperature)
        if not isinstance(temperature, torch.SymFloat) and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
    hard = boolean("hard", hard)
    if isinstance(gumbel, Tensor):
        scale("gumbel", gumbel, torch.Size(), device)
    else:
        gumbel = real_number("gumbel", gumbel, minimum=0.0)
    if isinstance(seed, Tensor):
        plain_tensor("seed", seed)
        if seed.dim() or seed.dtype != torch.int64:
            raise ValueError(f"seed must be a 0-d int64 tensor, got {seed.dtype} {list(seed.shape)}")
    elif seed is not None:
        seed = int64("seed", seed)
    label_mask(mask, shape, num_labels, device)
    if top_k is not None:
        top_k = integer("top_k", top_k)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
    return LookupOptions(temperature, hard, gumbel, seed, top_k or 0)


def gradient_option(clean_gradient: object, hard: bool) -> bool:
    clean_gradient = boolean("clean_gradient", clean_gradient)
    if clean_gradient and not hard:
        raise ValueError("clean_gradient needs hard=True: a mixture's gradient is that of its own probabilities")
    return clean_gradient


def label_mask(mask: object, shape: torch.Size, num_labels: int, device: torch.device) -> None:
    if mask is None:
        return
    mask = plain_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape not in ((num_labels,), (*shape, num_labels)):
        raise ValueError(f"mask must be [{num_labels}] or {[*shape, num_labels]}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask must be on the scores' device {device}, got {mask.device}")


def lookup(given: LookupRequest) -> None:
    """A request of soft_embedding by itself."""
    shape, device, K = given.shape(), given.first().device, tables(given.table).shape[-2]
    widths = [
        (f"source {i}", source_tensors(f"source {i}", one, shape, device, given.autocast)[0])
        for i, one in enumerate(given.sources)
    ]
    table_of(given.table, common_width(widths, None), device)
    if (given.gumbel is None) != (given.seed is None):
        raise ValueError("gumbel and seed must be given together")
    temperature = 1.0 if given.temperature is None else given.temperature
    gumbel = 0.0 if given.gumbel is None else given.gumbel
    lookup_options(temperature, given.hard, gumbel, given.seed, given.mask, given.top_k or None, shape, K, device)


def lookup_gradients(
    given: LookupRequest,
    state: LookupState,
    grad: Tensor | None,
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> None:
    """What the backward operator takes beside the request."""
    dtypes = {"max": given.compute(), "log_denom": given.compute(), "argmax": torch.int64}
    for name, dtype in dtypes.items():
        values = getattr(state, name)
        row_numbers(name, values, given.shape())
        if values.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {values.dtype}")
    labels = state.labels
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    there = [leaf for one in given.sources for leaf in (one.values, one.weight, one.bias, one.scale)]
    there += [given.temperature, given.table]
    if len(needs) != len(there):
        raise ValueError(f"needs must have {len(there)} entries, got {len(needs)}")
    if any(need and part is None for need, part in zip(needs, there, strict=True)):
        raise ValueError("needs must ask for gradients of what is given")
    if grad is not None and tuple(grad.shape) != given.out_shape():
        raise ValueError(f"grad must have shape {list(given.out_shape())}, got {list(grad.shape)}")
    if (labels is not None) != bool(given.top_k) or (
        labels is not None and labels.shape != (*given.shape(), given.kept())
    ):
        raise ValueError("labels must be given with top_k, [*, k] of them")
    if len(upstream) != 4:
        raise ValueError(f"upstream must have 4 entries, got {len(upstream)}")
    for name, values in zip(("entropy", "max_prob", "sum_squares"), upstream, strict=False):
        row_numbers(f"upstream of {name}", values, given.shape())
    row_numbers("upstream of usage", upstream[3], torch.Size((given.num_labels(),)))


# -- sample_logits -----------------------------------------------------------------------------------------------------


def row_parameter(
    name: str,
    value: object,
    shape: torch.Size,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    minimum: float,
    maximum: float,
) -> Any:
    """A number, or a tensor of one for each row or all, [] or `shape`; of a tensor on CPU the values, too.

    dtypes: of a tensor, and by their kind whether a number has to be an integer. Those on a GPU are looked at by the
    kernel alone, which has an answer for what is out of range: the host would have to wait for them.
    """
    is_integer = not dtypes[0].is_floating_point
    if not isinstance(value, Tensor):
        found = int64(name, value) if is_integer else number(name, value)
        if isinstance(found, (int, float)) and not minimum <= found <= maximum:
            raise ValueError(f"{name} must be {_bounds(minimum, maximum)}, got {value}")
        return found
    plain_tensor(name, value)
    if value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        allowed = f"{', '.join(names)} or {last}" if names else last
        raise TypeError(f"{name} must be {allowed}, got {value.dtype}")
    if value.dim() and value.shape != shape:
        raise ValueError(f"{name} must have shape [] or {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the sources' device {device}, got {value.device}")
    return value


def row_parameter_values(name: str, value: object, minimum: float, maximum: float) -> None:
    """The values of a tensor on CPU; not while something traces, where they are not known."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return
    value = value.detach().double() if value.is_floating_point() else value.long()
    outside = ~((value >= minimum) & (value <= maximum))
    if bool(outside.any()):
        row = int(outside.flatten().nonzero()[0])
        where = f"{name}, row {row}" if value.dim() else name
        raise ValueError(f"{where} must be {_bounds(minimum, maximum)}, got {value.flatten()[row].item()}")


def _bounds(minimum: float, maximum: float) -> str:
    if maximum in (math.inf, 2**63 - 1):
        return f"at least {minimum:g}"
    return f"at least {minimum:g} and finite" if maximum == FLOAT_MAX else f"in [{minimum:g}, {maximum:g}]"


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def segments(rows: object, segment_ids: object) -> None:
    """Rows of segments and the segment of each token."""
    tensor = floating("rows", rows)
    if tensor.dim() not in (2, 3):
        raise ValueError(f"rows must be [S, D] or [L, S, D], got {list(tensor.shape)}")
    segment_numbers(segment_ids, tensor.device)


def segment_numbers(segment_ids: object, device: torch.device) -> Tensor:
    segment_ids = plain_tensor("segment_ids", segment_ids)
    if segment_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"segment_ids must be int32 or int64, got {segment_ids.dtype}")
    if segment_ids.device != device:
        raise ValueError(f"segment_ids must be on {device}, got {segment_ids.device}")
    return segment_ids


def segment_tokens(tokens: object, segment_ids: object, num_segments: int) -> None:
    """Rows of tokens, [*, D] or [L, *, D], and the segment of each."""
    tensor = floating("tokens", tokens)
    of_tokens = segment_numbers(segment_ids, tensor.device)
    num_leading = tensor.dim() - of_tokens.dim() - 1
    if num_leading not in (0, 1) or tensor.shape[num_leading:-1] != of_tokens.shape:
        raise ValueError(
            f"tokens must be [*, D] or [L, *, D] with segment_ids' shape {list(of_tokens.shape)}, "
            f"got {list(tensor.shape)}"
        )
    if num_segments < 0:
        raise ValueError(f"num_segments must not be negative, got {num_segments}")
