"""Which implementation "auto" is on a CUDA device: the table of measured sizes, and what is looked up in it."""

import json

import pytest
import torch
from inputs import logits

from auxkernels import Head, Logits, choices, dispatch
from auxkernels.sources import as_sources

CUDA = torch.device("cuda")
BOX = {"pass": "training", "num_bytes": 2, "min_vocab": 50_000, "max_vocab": 130_000, "min_rows": 64, "max_rows": 8192}
INSIDE = choices.Workload("training", 2, 128256, 4096)


@pytest.fixture
def measured(monkeypatch):
    """A device of capability 9.0 with both implementations, and one box in which the compiled one was faster."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(choices, "_TABLE", {"9.0": {"faster": [BOX]}})
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", None)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)


def auto(workload, **options):
    return dispatch.resolve("auto", CUDA, torch.float32, **{"has_cuda_kernels": True, "workload": workload, **options})


def test_auto_is_the_compiled_module_inside_of_a_box(measured):
    assert auto(INSIDE) == "native"


@pytest.mark.parametrize(
    "change",
    [
        {"pass_name": "forward"},
        {"num_bytes": 4},
        {"vocab_size": 49_999},
        {"vocab_size": 130_001},
        {"num_rows": 63},
        {"num_rows": 8193},
    ],
)
def test_auto_is_triton_outside_of_the_boxes(measured, change):
    assert auto(INSIDE._replace(**change)) == "triton"


def test_auto_is_triton_on_other_devices_and_where_there_is_no_table(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert auto(INSIDE) == "triton"
    monkeypatch.setattr(choices, "_TABLE", {})
    assert auto(INSIDE) == "triton"


def test_auto_is_triton_where_the_compiled_module_is_missing(measured, monkeypatch):
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", "the CUDA module was not built")
    assert auto(INSIDE) == "triton"
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    assert auto(INSIDE) == "reference"


def test_auto_is_triton_for_calls_that_were_not_measured_and_for_other_operators(measured):
    assert auto(None) == "triton"
    assert auto(INSIDE, has_cuda_kernels=False) == "triton"


def test_named_native_on_cuda_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", "the CUDA module was not built: no nvcc")
    with pytest.raises(RuntimeError, match="backend='native' cannot be used: the CUDA module was not built: no nvcc"):
        dispatch.resolve("native", CUDA, torch.float32, has_cuda_kernels=True)
    with pytest.raises(RuntimeError, match="has aux_cross_entropy and logit_stats alone, use 'triton'"):
        dispatch.resolve("native", CUDA, torch.float32)


def workload(base, aux, has_statistics=False):
    return choices.workload_of(as_sources("base", base), as_sources("aux", aux), 50, has_statistics)


@pytest.mark.parametrize(
    "needs, has_statistics, pass_name",
    [
        ((False, False), False, "forward"),
        ((False, True), False, "training"),
        ((True, True), False, "both"),
        ((False, False), True, "stats"),
        ((False, True), True, "stats_training"),
    ],
)
def test_the_workload_of_plain_sources(needs, has_statistics, pass_name):
    base, aux = (logits(2, 3, 50, dtype=torch.bfloat16, requires_grad=need) for need in needs)
    assert workload(base, aux, has_statistics) == choices.Workload(pass_name, 2, 50, 6)


def test_without_grad_mode_a_call_is_a_forward_pass():
    with torch.no_grad():
        assert workload(logits(4, 50), logits(4, 50, requires_grad=True)).pass_name == "forward"


@pytest.mark.parametrize(
    "kind", ["base alone", "scale", "tensor scale", "softcap", "dtypes", "head", "two", "frozen aux"]
)
def test_what_is_not_measured_has_no_workload(kind):
    base, aux = logits(4, 50), logits(4, 50)
    sources = {
        "base alone": (base, ()),
        "scale": (Logits(base, scale=0.5), aux),
        "tensor scale": (base, Logits(aux, scale=torch.ones(()))),
        "softcap": (base, Logits(aux, softcap=30.0)),
        "dtypes": (base, aux.bfloat16()),
        "head": (base, Head(logits(4, 8), logits(50, 8))),
        "two": ([base, base], aux),
        "frozen aux": (base.requires_grad_(kind == "frozen aux"), aux),
    }[kind]
    aux_sources = [] if sources[1] == () else as_sources("aux", sources[1])
    assert choices.workload_of(as_sources("base", sources[0]), aux_sources, 50, False) is None


def test_the_table_is_read_from_the_file_that_the_benchmarks_write(tmp_path, monkeypatch):
    path = tmp_path / "cuda_choices.json"
    path.write_text(json.dumps({"9.0": {"device": "some", "commit": "some", "faster": [BOX]}}))
    monkeypatch.setattr(choices, "_TABLE", choices.read_table(path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert choices.prefers_cuda(CUDA, INSIDE)
    assert choices.read_table(tmp_path / "none.json") == {}


@pytest.mark.parametrize("vocab_size, chosen", [(128256, "native"), (1000, "triton")])
def test_the_choice_is_a_constant_of_a_compiled_graph(measured, vocab_size, chosen):
    """Of whatever number of rows: it changes from step to step."""
    seen = []

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def choose(base, aux):
        call = choices.workload_of(as_sources("base", base), as_sources("aux", aux), vocab_size, False)
        return base + (1 if auto(call) == "native" else 2)

    for rows in (2, 3, 70):
        base = torch.zeros(rows, vocab_size, dtype=torch.bfloat16)
        aux = torch.zeros_like(base).requires_grad_()
        seen.append(choose(base, aux)[0, 0].item())
    assert seen == [1 if chosen == "native" else 2] * 3
