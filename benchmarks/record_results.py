"""``python -m benchmarks.record_results FILE``: results of some hundred seeded calls, bit for bit.

A change that shall not touch any result is shown by two files that are equal: `--compare OTHER` says where they differ.
Operators, options, dtypes and the backends that run here, values and gradients; bits differ from machine to machine.
Triton is interpreted with TRITON_INTERPRET=1 (`--backend triton`).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from auxkernels import Head, Logits, aux_cross_entropy, chunk_settings, logit_stats, segments_to_tokens, soft_embedding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SHAPES = ((1, 32), (7, 33), (2, 3, 130), (0, 5), (5, 1000))


def digest(value) -> str:
    if value is None:
        return "none"
    if not isinstance(value, Tensor):
        value = torch.tensor(value)
    data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return f"{str(value.dtype)[6:]}{list(value.shape)}:{hashlib.sha256(data).hexdigest()[:16]}"


def tensor(generator, *shape: int, dtype=torch.float32, grad: bool = False, size: float = 2.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * size).to(dtype).requires_grad_(grad)


def targets(generator, shape, vocab: int, dtype=torch.int64) -> Tensor:
    y = torch.randint(0, vocab, shape, generator=generator, dtype=dtype)
    return y.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)


class Results(dict):
    def add(self, name: str, call: Callable, leaves: list[Tensor] = ()) -> None:
        """What a call returns and the gradients of its leaves, or the type of its error."""
        leaves = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        try:
            outputs = flat(call())
            made = [digest(output) for output in outputs]
            differentiable = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
            if differentiable and leaves:
                total = sum((output.double() * (1 + i)).sum() for i, output in enumerate(differentiable))
                made += [digest(g) for g in torch.autograd.grad(total, leaves, allow_unused=True)]
        except Exception as error:
            made = [type(error).__name__]
        self[name] = made


def flat(value) -> list:
    if isinstance(value, (tuple, list)):
        return [item for one in value for item in flat(one)]
    if hasattr(value, "__dataclass_fields__"):
        return [item for name in value.__dataclass_fields__ for item in flat(getattr(value, name))]
    return [value]


LOSS_OPTIONS: tuple[dict, ...] = (
    {},
    {"return_stats": True},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 1e-3},
    {"recompute": True, "label_smoothing": 0.1, "z_loss": 1e-3},
    {"normalizer": 7.0, "z_loss": 1e-3, "return_stats": True},
    {"weight": True, "label_smoothing": 0.1, "return_stats": True},
    {"weight": True, "reduction": "none"},
)


def of_logits(results: Results, backend: str, dtypes: list[str]) -> None:
    for (dtype, shape), (i, options) in itertools.product(itertools.product(dtypes, SHAPES), enumerate(LOSS_OPTIONS)):
        generator = torch.Generator().manual_seed(i)
        *lead, vocab = shape
        base = tensor(generator, *shape, dtype=DTYPES[dtype], grad=i % 2 == 0)
        aux = tensor(generator, *shape, dtype=DTYPES[dtype], grad=True)
        y = targets(generator, lead, vocab, torch.int32 if i % 3 else torch.int64)
        scale = tensor(generator, *lead, grad=True).to(torch.float64 if dtype == "fp64" else torch.float32)
        scale = scale.detach().requires_grad_()
        options = dict(options, backend=backend)
        if "weight" in options:
            options["weight"] = torch.rand(vocab, generator=generator)
        sources: dict[str, tuple] = {
            "plain": (base, aux),
            "alone": (aux, None),
            "scaled": (Logits(base, scale=0.5), Logits(aux, scale=1.5, softcap=3.0)),
            "per row": (Logits(base, softcap=2.0), Logits(aux, scale=scale)),
            "sum": ([base, Logits(base.detach(), scale=0.1)], [aux, Logits(aux, scale=scale)]),
        }
        for name, (one, other) in sources.items():
            key = f"loss {backend} {dtype} {shape} {name} {i}"
            call = partial(aux_cross_entropy, one, other, y, **options)
            results.add(key, call, [base, aux, scale])
        if i == 0:
            for name, (one, other) in sources.items():
                for at in (None, y):
                    call = partial(logit_stats, one, other, at, backend=backend)
                    results.add(f"stats {backend} {dtype} {shape} {name} {at is None}", call, [base, aux, scale])
                    without = f"stats without gradient {backend} {dtype} {shape} {name} {at is None}"
                    results.add(without, partial(no_grad, call))


def no_grad(call: Callable):
    with torch.no_grad():
        return call()


def of_heads(results: Results, backend: str, dtypes: list[str]) -> None:
    for dtype, (i, options), small in itertools.product(dtypes, enumerate(LOSS_OPTIONS), (False, True)):
        generator = torch.Generator().manual_seed(100 + i)
        kind, lead, vocab = DTYPES[dtype], (2, 9), 70
        h, g = (tensor(generator, *lead, width, dtype=kind, grad=True, size=0.5) for width in (16, 32))
        W, U = (tensor(generator, vocab, width, dtype=kind, grad=True, size=0.5) for width in (16, 32))
        frozen, bias = W.detach(), tensor(generator, vocab, dtype=kind, grad=True)
        z = tensor(generator, *lead, vocab, dtype=kind, grad=True)
        scale = tensor(generator, *lead).to(torch.float64 if dtype == "fp64" else torch.float32).requires_grad_()
        y = targets(generator, lead, vocab)
        options = dict(options, backend=backend)
        if "weight" in options:
            options["weight"] = torch.rand(vocab, generator=generator)
        sources = {
            "two heads": (Head(h.detach(), frozen), Head(g, U, bias=bias)),
            "logits and head": (z, Head(g, U, scale=scale, softcap=4.0)),
            "head alone": (Head(h, W), None),
            "shared weight": (Head(h, W), Head(h.detach(), W, scale=0.5)),
            "three": (Head(h, W), [Head(g, U, scale=scale), z]),
        }
        before = chunk_settings.num_bytes
        chunk_settings.num_bytes = 4096 if small else None
        try:
            for name, (one, other) in sources.items():
                leaves = [h, g, W, U, bias, z, scale]
                key = f"{backend} {dtype} {name} {i} {small}"
                call = partial(aux_cross_entropy, one, other, y, **options)
                results.add(f"heads {key}", call, leaves)
                if i == 0:
                    call = partial(logit_stats, one, other, y, backend=backend)
                    results.add(f"stats of heads {key}", call, leaves)
                    results.add(f"stats of heads without gradient {key}", partial(no_grad, call))
        finally:
            chunk_settings.num_bytes = before


LOOKUPS: tuple[dict, ...] = (
    {},
    {"return_stats": True},
    {"temperature": 0.7},
    {"hard": True, "return_stats": True},
    {"top_k": 3},
    {"top_k": 3, "hard": True, "temperature": 2.0},
    {"gumbel": 1.0, "seed": 5},
    {"gumbel": 0.5, "seed": 5, "hard": True, "clean_gradient": True},
)


def of_lookups(results: Results, backend: str, dtypes: list[str]) -> None:
    shapes = ((64, 32, 16), (3, 5, 4), (0, 5, 4), (40, 300, 24))
    for dtype, (N, K, D), (i, options) in itertools.product(dtypes, shapes, enumerate(LOOKUPS)):
        generator = torch.Generator().manual_seed(200 + i)
        scores = tensor(generator, N, K, dtype=DTYPES[dtype], grad=True)
        table = tensor(generator, K, D, dtype=DTYPES[dtype], grad=True)
        hidden, weight = (tensor(generator, n, 8, dtype=DTYPES[dtype], grad=True) for n in (N, K))
        for name, one in {"scores": scores, "head": Head(hidden, weight), "scaled": Logits(scores, scale=2.0)}.items():

            def call(one=one, options=options, table=table):
                torch.manual_seed(7)
                return soft_embedding(one, table, **options, backend=backend)

            key = f"lookup {backend} {dtype} {(N, K, D)} {name} {i}"
            results.add(key, call, [scores, table, hidden, weight])
            results.add(f"{key} without gradient", partial(no_grad, call))
    values = tensor(torch.Generator().manual_seed(3), 2, 3, 4, grad=True)
    ids = torch.tensor([[0, 0, 1, -1], [2, 2, -1, 0]])
    results.add("segments", lambda: segments_to_tokens(values, ids), [values])


def record(backends: list[str]) -> Results:
    torch.set_num_threads(1)
    results = Results()
    for backend in backends:
        # interpreted bfloat16 is wrong; double is no dtype of Triton
        dtypes = ["fp32", "fp16"] if backend == "triton" else list(DTYPES)
        for kind in (of_logits, of_heads, of_lookups):
            kind(results, backend, dtypes)
            print(f"{backend}: {kind.__name__}, {len(results)} results", file=sys.stderr)
    return results


def differences(one: dict, other: dict) -> Iterator[str]:
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"{name}\n    {one.get(name)}\n    {other.get(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_results", description=__doc__)
    parser.add_argument("file", type=Path, help="JSON, written")
    parser.add_argument("--backend", action="append", help="native, reference, triton; default: the first two")
    parser.add_argument("--compare", type=Path, help="a file of an earlier run")
    arguments = parser.parse_args()
    results = record(arguments.backend or ["native", "reference"])
    arguments.file.write_text(json.dumps(results, indent=0))
    if arguments.compare is not None:
        found = list(differences(json.loads(arguments.compare.read_text()), results))
        print("\n".join(found) or f"{len(results)} results are equal")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
