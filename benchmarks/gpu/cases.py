"""Sixty small calls of every operator, for what has to be seen on a device: values, repetition, graphs, streams.

`python -m benchmarks.gpu.cases` runs them all and compares each with the reference: what a sanitizer is put around.
Several processes can share the cases (`--first`, `--every`): each has kernels to compile and an interpreter to wait
for, and what takes one process's device context away leaves the others theirs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import auxkernels as ak
from auxkernels import dispatch, native
from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from benchmarks.timing import machine_info

NUM_ROWS = 37
NUM_REPEATS = 250
IGNORE_INDEX = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of ours, those that are checked by name where they can be used
BY_NAME = ("triton", "native")
# of the cases that are called hundreds of times or captured: every so many-th
THIN = 3
PLANNED_WIDTHS = (32000, 50257, 128256, 151936, 262144)
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}  # norm-relative, against the reference on the same inputs


class Case(NamedTuple):
    """`call(inputs, backend)` gives the result that is differentiated and further outputs."""

    name: str
    dtype: str
    make: Callable[[torch.device, torch.Generator], dict[str, Tensor]]
    call: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]
    backends: tuple[str, ...] = ("auto",)

    def usable(self, device: torch.device) -> tuple[str, ...]:
        """The implementations that are checked: on a GPU each that can be used there, by name."""
        named = unusable(device) if device.type == "cuda" else {}
        return tuple(name for name in self.backends if named.get(name, "") is None) or ("auto",)

    def inputs(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """The leaves; equal seeds give equal values on every device."""
        drawn = self.make(torch.device("cpu"), torch.Generator().manual_seed(seed))
        return {
            name: t.to(device).requires_grad_(t.is_floating_point() and not name.startswith("frozen"))
            for name, t in drawn.items()
        }

    def run(self, inputs: dict[str, Tensor], backend: str = "auto") -> dict[str, Tensor]:
        """Every output and the gradient of every leaf, by name."""
        first, *others = self.call(inputs, backend)
        leaves = {name: t for name, t in inputs.items() if t.requires_grad}
        upstream = torch.linspace(0.5, 1.5, first.numel(), device=first.device).view(first.shape).to(first.dtype)
        grads = torch.autograd.grad(first, list(leaves.values()), upstream)
        outputs = {f"output {i}": t.detach() for i, t in enumerate((first, *others))}
        return {**outputs, **{f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}}

    def check(self, device: torch.device, backend: str = "auto") -> str | None:
        """What differs from the reference, or None."""
        inputs = self.inputs(device)
        got, want = self.run(inputs, backend), self.run(inputs, "reference")
        for name, value in got.items():
            exact = want[name]
            if value.dtype == torch.int64:
                if not torch.equal(value, exact):
                    return f"{name} differs"
                continue
            error = ((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()
            if not error <= TOLERANCE[self.dtype]:
                return f"{name} is off by {error:.1e}, allowed {TOLERANCE[self.dtype]:.0e}"
        return None


def unusable(device: torch.device) -> dict[str, str | None]:
    """Why each of BY_NAME cannot be used on the device; None where it can."""
    found = {}
    for name in BY_NAME:
        try:
            # by cross-entropy, the only operator that every one of them has
            dispatch.resolve(name, device, torch.float32, has_cuda_kernels=True)
            found[name] = None
        except RuntimeError as error:
            found[name] = str(error)
    return found


def describe(device: torch.device) -> dict:
    """The machine, why an implementation cannot be used there, and which file the compiled CUDA module is."""
    cannot = unusable(device)
    plans = None if cannot["native"] else _plans_text()
    return machine_info.describe(device) | {"unusable": cannot, "module": _module_text(), "plans": plans}


def _plans_text() -> str:
    """How CUDA C++ shares rows out here: what a device lets run at once depends on how its processors are grouped."""
    said = []
    try:
        for V in PLANNED_WIDTHS:
            plan = cuda_cross_entropy.plan(8192, V, torch.bfloat16, torch.bfloat16)
            said.append(f"{V}: {plan['clusters_at_once']} of {plan['cluster']}, {plan['num_slots']} slots")
    except Exception as error:  # whatever it is, the check goes on without
        return f"no plan was told: {type(error).__name__}: {error}"
    return f"clusters at once for 8192 rows of bfloat16, of so many blocks: {'; '.join(said)}"


def _module_text() -> str | None:
    found = importlib.util.find_spec("auxkernels.native._cuda")
    if found is None:
        return None
    path, said = Path(found.origin), native.build_record().get("cuda", "without a record of its build")
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}, {said}"


def _draw(generator: torch.Generator, *shape: int, dtype: str, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator)).to(DTYPES[dtype])


def _targets(generator: torch.Generator, V: int) -> Tensor:
    target = torch.randint(V, (NUM_ROWS,), generator=generator)
    target[::7] = IGNORE_INDEX
    return target


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def _make_logits(V: int, dtype: str, device, generator) -> dict[str, Tensor]:
    base, aux = (_draw(generator, NUM_ROWS, V, dtype=dtype) for _ in range(2))
    weight, scale = torch.rand(V, generator=generator) + 0.5, torch.rand(NUM_ROWS, generator=generator) + 0.5
    target = _targets(generator, V)
    return {"frozen base": base, "aux": aux, "target": target, "frozen weight": weight, "frozen scale": scale}


def _loss(t: dict[str, Tensor], backend: str, **options) -> tuple[Tensor, ...]:
    return (ak.aux_cross_entropy(t["frozen base"], t["aux"], t["target"], backend=backend, **options),)


def _bent_loss(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    base = ak.Logits(t["frozen base"], softcap=20.0)
    return (ak.aux_cross_entropy(base, ak.Logits(t["aux"], scale=t["frozen scale"]), t["target"], backend=backend),)


def _weighted_loss(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    return _loss(t, backend, weight=t["frozen weight"], label_smoothing=0.1, z_loss=1e-3)


def _statistics(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    stats = ak.logit_stats(t["frozen base"], t["aux"], t["target"], backend=backend)
    return stats.entropy + stats.kl_to_base, stats.log_prob.detach(), stats.argmax, stats.base_argmax


def _cross_entropy_cases() -> list[Case]:
    cases = []
    for dtype, V, reduction in itertools.product(DTYPES, (33, 1025, 4097, 50257), ("mean", "none")):
        call = functools.partial(_loss, reduction=reduction)
        make = functools.partial(_make_logits, V, dtype)
        cases.append(Case(f"loss, {reduction}, V {V}", dtype, make, call, BY_NAME))
    forms = {"softcap and scale": _bent_loss, "weight, smoothing, z-loss": _weighted_loss, "statistics": _statistics}
    forms["one source"] = lambda t, backend: (ak.aux_cross_entropy(t["aux"], None, t["target"], backend=backend),)
    for dtype, (name, call) in itertools.product(DTYPES, forms.items()):
        make = functools.partial(_make_logits, 4097, dtype)
        cases.append(Case(f"{name}, V 4097", dtype, make, call, BY_NAME))
    return cases


def _make_heads(dtype: str, device, generator) -> dict[str, Tensor]:
    V, widths = 1025, (48, 32)
    made = {"target": _targets(generator, V)}
    for name, width in zip(("frozen base", "aux"), widths, strict=True):
        made[name] = _draw(generator, NUM_ROWS, width, dtype=dtype, scale=1.0)
        made[f"{name} head"] = _draw(generator, V, width, dtype=dtype, scale=0.3)
    return made


def _heads(t: dict[str, Tensor]) -> tuple[ak.Head, ak.Head]:
    return ak.Head(t["frozen base"], t["frozen base head"]), ak.Head(t["aux"], t["aux head"])


def _head_loss(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    return (ak.aux_cross_entropy(*_heads(t), t["target"], backend=backend),)


def _head_statistics(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    return (ak.logit_stats(*_heads(t), t["target"], backend=backend).log_prob,)


# -- soft_embedding ----------------------------------------------------------------------------------------------------


def _make_lookup(K: int, num_tables: tuple[int, ...], dtype: str, device, generator) -> dict[str, Tensor]:
    scores, table = _draw(generator, NUM_ROWS, K, dtype=dtype), _draw(generator, *num_tables, K, 40, dtype=dtype)
    # neighbours differ by more than rounding does, so that no tie decides what is selected
    order = torch.rand(NUM_ROWS, K, generator=generator).argsort(-1).argsort(-1)
    scores = scores.float() * 0.1 + order * (8.0 / K)
    temperature = torch.rand(NUM_ROWS, generator=generator) + 0.5
    mask = torch.rand(NUM_ROWS, K, generator=generator) < 0.3
    segment_ids = torch.randint(-1, NUM_ROWS, (211,), generator=generator).sort().values
    tensors = {"scores": scores.to(DTYPES[dtype]), "table": table, "temperature": temperature}
    return {**tensors, "mask": mask, "segments": segment_ids}


def _lookup(t: dict[str, Tensor], backend: str, **options) -> tuple[Tensor, ...]:
    given = {"temperature": t["temperature"], "backend": backend, **options}
    return (ak.soft_embedding(t["scores"], t["table"], **given),)


def _masked_lookup(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    return _lookup(t, backend, mask=t["mask"])


def _planned_tokens(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    (mixture,) = _lookup(t, backend)
    return (ak.segments_to_tokens(mixture, t["segments"], backend=backend),)


LOOKUPS = {
    "soft": _lookup,
    "straight-through": functools.partial(_lookup, hard=True),
    "Gumbel": functools.partial(_lookup, gumbel=1.0, seed=7),
    "top 5": functools.partial(_lookup, top_k=5),
    "mask": _masked_lookup,
    "tables, segments": _planned_tokens,
}


def _lookup_cases() -> list[Case]:
    cases = []
    for dtype, (name, call) in itertools.product(("fp32", "bf16"), LOOKUPS.items()):
        tables = (3,) if call is _planned_tokens else ()
        make = functools.partial(_make_lookup, 257, tables, dtype)
        cases.append(Case(f"lookup, {name}, K 257", dtype, make, call))
    for dtype, name in itertools.product(DTYPES, ("soft", "mask")):
        make = functools.partial(_make_lookup, 5003, (), dtype)
        cases.append(Case(f"lookup, {name}, K 5003", dtype, make, LOOKUPS[name]))
    return cases


def all_cases() -> list[Case]:
    heads = [
        Case(f"heads, {name}", dtype, functools.partial(_make_heads, dtype), call)
        for dtype, (name, call) in itertools.product(DTYPES, {"loss": _head_loss, "log_prob": _head_statistics}.items())
    ]
    return [*_cross_entropy_cases(), *heads, *_lookup_cases()]


# -- what is checked of a call -----------------------------------------------------------------------------------------


def _values(case: Case, backend: str, device: torch.device) -> str | None:
    return case.check(device, backend)


def _same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> Tensor:
    """0-d bool on the device: the host does not wait. NaN equals NaN."""
    same = [((a == b) | ((a != a) & (b != b))).all() for a, b in zip(got.values(), want.values(), strict=True)]
    return torch.stack(same).all()


def _repeats_alike(case: Case, backend: str, device: torch.device, num_repeats: int = NUM_REPEATS) -> str | None:
    inputs = case.inputs(device)
    first = case.run(inputs, backend)
    same = torch.stack([_same_bits(case.run(inputs, backend), first) for _ in range(num_repeats)])
    return None if same.all().item() else f"{int((~same).sum())} of {num_repeats} runs differ"


def _works_in_graphs_and_streams(case: Case, backend: str, device: torch.device) -> str | None:
    inputs, others = case.inputs(device, seed=0), case.inputs(device, seed=1)
    want = case.run(others, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_side = case.run(others, backend)
        case.run(inputs, backend)  # compiles what a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    if not _same_bits(on_side, want).item():
        return "another result on a side stream"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(inputs, backend)
    with torch.no_grad():
        for name, tensor in inputs.items():
            tensor.copy_(others[name])
    graph.replay()
    return None if _same_bits(captured, want).item() else "another result from a replayed graph"


CHECKS = {"values": _values, "repeats": _repeats_alike, "graphs": _works_in_graphs_and_streams}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases", description=__doc__.partition(":")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--check", nargs="+", choices=CHECKS, default=["values"], help="what is checked of each call (values)"
    )
    parser.add_argument("--every", type=int, default=1, help="only every n-th case (1)")
    parser.add_argument("--first", type=int, default=0, help="from this case on (0)")
    parser.add_argument("--only", nargs="+", choices=(*BY_NAME, "auto"), help="by these implementations (all)")
    parser.add_argument("--repeats", type=int, default=NUM_REPEATS, help=f"runs that must be alike ({NUM_REPEATS})")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further call begins (none)")
    parser.add_argument("--describe", action="store_true", help="only say, as JSON, what the machine is and can use")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    if options.describe:
        print(json.dumps(describe(device)))
        return 0
    deadline = time.perf_counter() + options.seconds
    found = []
    for name in options.check:
        # the first of several processes takes the first of the kept cases, whatever is kept
        cases = all_cases()[:: THIN if name != "values" else 1][options.first :: options.every]
        check = functools.partial(CHECKS[name], device=device)
        if name == "repeats":
            check = functools.partial(check, num_repeats=options.repeats)
        found += each(name, calls_of(cases, device, options.only), device, check, deadline, _print_line)
        if not is_alive(device):
            break
    return int(any(problem is not None for _, problem in found))


def _print_line(line: str) -> None:
    print(line, flush=True)


def calls_of(cases: list[Case], device: torch.device, only: list[str] | None = None) -> list[tuple[Case, str]]:
    """The cases with each implementation that serves them.

    CUDA C++ comes first: it needs no compiling, and whatever guards its memory accesses was written by hand.
    """
    calls = [(case, backend) for case in cases for backend in case.usable(device) if not only or backend in only]
    return sorted(calls, key=lambda call: call[1] != "native")


def is_alive(device: torch.device) -> bool:
    """Whether the device still answers: an illegal access ends every later call of its process too."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def each(
    name: str,
    calls: list[tuple[Case, str]],
    device: torch.device,
    check: Callable[[Case, str], str | None],
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[str, str | None]]:
    """Yields a line and the problem, if any, for each call; says the lines, and how it ended.

    The last line is "done", or why calls are missing: after `deadline` no further call begins, and none where the
    device no longer answers, which would only repeat the last finding.
    """
    ending = "done"
    num_begun = 0
    for case, backend in calls:
        if time.perf_counter() > deadline:
            ending = "time is over"
            break
        num_begun += 1
        try:
            problem = check(case, backend)
        except Exception as error:  # what does not compile or launch is this case's finding, not the end
            if backend != "auto" and "cannot be used" in str(error):  # with this case's options
                continue
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        called = f"{name}: {case.dtype} {case.name}{'' if backend == 'auto' else f' ({backend})'}"
        line = f"ok   {called}" if problem is None else f"FAIL {called}: {problem}"
        say(line)
        yield line, problem
        if problem is not None and not is_alive(device):
            ending = "device lost"
            break
    say(f"{ending} {name}: {num_begun} of {len(calls)} calls")


if __name__ == "__main__":
    sys.exit(main())
