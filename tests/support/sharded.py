"""Cases whose vocabulary is sharded over processes, what a process does with its share, and how shares become whole."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from oracle import Case, assert_close, expected, sources_of
from processes import Place
from tolerance import check_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auxkernels import Head, Logits, VocabShard, aux_cross_entropy, chunk_settings, logit_stats

# -- who holds which columns -------------------------------------------------------------------------------------------


def even(vocab_size: int, world: int) -> list[tuple[int, int]]:
    """As torch.chunk: the last ones may hold less, or nothing."""
    step = -(-vocab_size // world)
    return [(min(i * step, vocab_size), min((i + 1) * step, vocab_size)) for i in range(world)]


def uneven(vocab_size: int, world: int) -> list[tuple[int, int]]:
    """In the opposite order: the first process holds nothing, the second one column if there is a third."""
    rest = vocab_size if world == 2 else vocab_size - 1
    others = max(world - 2, 1)
    cuts = [i * rest // others for i in range(others + 1)]
    found = [(vocab_size, vocab_size), *([(rest, vocab_size)] if world > 2 else [])]
    return found + list(itertools.pairwise(cuts))[::-1]


LAYOUTS = {"even": even, "uneven": uneven}


# -- a process's share -------------------------------------------------------------------------------------------------


def cut(tensor: Tensor | None, columns: slice, dim: int) -> Tensor | None:
    if tensor is None:
        return None
    own = tensor.detach()[columns] if dim == 0 else tensor.detach()[..., columns]
    return own.clone().requires_grad_(tensor.requires_grad)


def share_of(case: Case, start: int, stop: int, whole: tuple[str, ...] = ()) -> Case:
    """The case with the sources' columns [start, stop). whole: sources, "base[0]", that keep all columns."""
    columns = slice(start, stop)

    def own(side: str, given):
        if given is None:
            return None
        found = []
        for i, source in enumerate(sources_of(given)):
            if f"{side}[{i}]" in whole:
                found.append(source)
            elif isinstance(source, Logits):
                found.append(replace(source, values=cut(source.values, columns, -1)))
            else:
                weight, bias = cut(source.weight, columns, 0), cut(source.bias, columns, 0)
                found.append(replace(source, weight=weight, bias=bias))
        return found if isinstance(given, (list, tuple)) else found[0]

    return Case(own("base", case.base), own("aux", case.aux), case.target, case.options)


def run_share(place: Place, case: Case, bounds: list[tuple[int, int]], whole: tuple[str, ...] = (), upstream=None):
    """Loss and gradients by name, as `Case.run` gives them, of a process's share."""
    start, stop = bounds[place.rank]
    own = share_of(case, start, stop, whole)
    size = max(stop for _, stop in bounds)
    shard = VocabShard(start, stop, size, place.group)
    loss = aux_cross_entropy(own.base, own.aux, own.target, shard=shard, **own.options)
    found = {}
    if isinstance(loss, tuple):
        loss, stats = loss
        found["stats"] = stats
    leaves = own.leaves()
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream) if leaves else ()
    return {"loss": loss.detach(), **found, **dict(zip(leaves, grads, strict=True))}


def run_shares(place: Place, cases: list[tuple]) -> list[dict]:
    return [run_share(place, *case) for case in cases]


def stats_of_share(place: Place, case: Case, bounds: list[tuple[int, int]], whole: tuple[str, ...] = ()):
    """The statistics, and the gradients of their sum."""
    start, stop = bounds[place.rank]
    own = share_of(case, start, stop, whole)
    shard = VocabShard(start, stop, max(stop for _, stop in bounds), place.group)
    stats = logit_stats(own.base, own.aux, own.target, shard=shard)
    return {"stats": detached(stats), **stats_gradients(stats, own)}


def detached(stats):
    return replace(stats, **{name: value.detach() for name, value in vars(stats).items() if value is not None})


def stats_gradients(stats, case: Case) -> dict[str, Tensor]:
    """Of a sum of all statistics that have one, each with a weight of its own."""
    leaves = case.leaves()
    if not leaves:
        return {}
    floats = [value for value in vars(stats).values() if value is not None and value.requires_grad]
    total = sum((i + 1) * value.sum() for i, value in enumerate(floats))
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


# -- the whole ---------------------------------------------------------------------------------------------------------


def is_of_columns(name: str, case: Case, whole: tuple[str, ...]) -> int | None:
    """Along which dimension a leaf of this name is cut; None: every process has all of it."""
    place = name.split(" of ")[-1]
    if place in whole or name.startswith(("hidden", "scale")):
        return None
    return 0 if " of " in name else -1


def joined(case: Case, shares: list[dict], bounds: list[tuple[int, int]], whole: tuple[str, ...] = ()) -> dict:
    """What one process would give; what all have is the same on all of them, bit for bit."""
    found = {}
    order = sorted(range(len(bounds)), key=lambda rank: bounds[rank])
    for name in shares[0]:
        parts = [share[name] for share in shares]
        dim = None if name in ("loss", "stats") else is_of_columns(name, case, whole)
        if dim is not None:
            found[name] = torch.cat([parts[rank] for rank in order], dim)
            continue
        for part in parts:
            assert_same_bits(part, parts[0])
        found[name] = parts[0]
    return found


def check_case(case: Case, got: dict, upstream=None) -> None:
    """As one process's results are held against float64."""
    if any(name.startswith("weight") for name in case.leaves()):
        check_results(case, got, upstream)
        return
    for name, (want, error) in expected(case, upstream, confident=True).items():
        assert_close(name, got[name], want, error)


def assert_same_bits(one, two) -> None:
    """Tensors, or statistics."""
    if not isinstance(one, Tensor):
        for name, value in vars(one).items():
            if value is not None:
                assert_same_bits(value, vars(two)[name])
        return
    assert one.dtype == two.dtype and one.shape == two.shape
    bits = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, two)]
    assert torch.equal(*bits)


def head(shape, vocab_size: int, width: int, dtype: torch.dtype, **options) -> Head:
    hidden = torch.randn(*shape, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width) * 2 * width**-0.5).to(dtype).requires_grad_()
    return Head(hidden, weight, **options)


# -- functions for processes -------------------------------------------------------------------------------------------


def run_in_chunks(place: Place, case: Case, bounds: list[tuple[int, int]]) -> dict:
    """In the smallest chunks that there are."""
    chunk_settings.num_bytes = 1
    try:
        return run_share(place, case, bounds)
    finally:
        chunk_settings.num_bytes = None


def run_backward_twice(place: Place, case: Case, bounds: list[tuple[int, int]]) -> bool:
    """Whether both give the same bits."""
    start, stop = bounds[place.rank]
    own = share_of(case, start, stop)
    shard = VocabShard(start, stop, max(stop for _, stop in bounds), place.group)
    loss = aux_cross_entropy(own.base, own.aux, own.target, shard=shard, **own.options)
    leaves = list(own.leaves().values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    return all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


class Collectives(TorchDispatchMode):
    """What has been sent, as (operation, bytes that this process gave)."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func.__name__.split(".")[0].strip("_")
            if not name.startswith(("wait", "wrap")):
                given = args[1] if name == "allgather_base" else args[0]
                given = given[0] if isinstance(given, (list, tuple)) else given
                self.seen.append((name, given.numel() * given.element_size()))
        return func(*args, **(kwargs or {}))


def count_collectives(place: Place, case: Case, bounds: list[tuple[int, int]], whole: tuple[str, ...] = ()):
    """(of the forward pass, of the backward pass)."""
    start, stop = bounds[place.rank]
    own = share_of(case, start, stop, whole)
    shard = VocabShard(start, stop, max(stop for _, stop in bounds), place.group)
    with Collectives() as forward:
        loss = aux_cross_entropy(own.base, own.aux, own.target, shard=shard, **own.options)
        loss = loss[0] if isinstance(loss, tuple) else loss
    with Collectives() as backward:
        loss.backward()
    return forward.seen, backward.seen


def call(place: Place, function: str, arguments: dict, shard: tuple[int, int, int] | None) -> str:
    given = {} if shard is None else {"shard": VocabShard(*shard, place.group)}
    {"loss": aux_cross_entropy, "stats": logit_stats}[function](**arguments, **given)
    return "no error"


def refusal(place: Place, function, *arguments) -> tuple[type[Exception], str, list[tuple[str, int]]] | None:
    """The error of a wrong call by its type and text, and what was sent before it was raised."""
    with Collectives() as sent:
        try:
            function(place, *arguments)
        except Exception as error:
            return type(error), str(error), sent.seen
    return None


def gradients_of_whole_sources(place: Place, arguments: dict, bounds: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    shard = VocabShard(*bounds[place.rank], bounds[-1][1], place.group)
    head, values = arguments["base"], arguments["aux"].values
    loss = aux_cross_entropy(**arguments, shard=shard)
    return torch.autograd.grad(loss, (head.hidden, head.weight, values))


def count_in_chunks(place: Place, case: Case, bounds: list[tuple[int, int]]):
    chunk_settings.num_bytes = 1
    try:
        return count_collectives(place, case, bounds)
    finally:
        chunk_settings.num_bytes = None
