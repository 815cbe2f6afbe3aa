"""The contract: every argument rule has an error that names argument, rule and value; every promise has a test.

Values, non-finite rows, autograd, torch.compile, processes and memory have files of their own.
"""

import copy
import importlib.metadata
import pickle
import platform
import subprocess
import sys

import pytest
import torch
from inputs import logits, targets
from oracle import Case, check
from refusals import refuses

import auxkernels
from auxkernels import Logits, aux_cross_entropy, logit_stats, show_config


class Arguments:
    """A correct call, of which a test changes one thing."""

    def __init__(self, device="cpu"):
        self.base, self.aux = (logits(3, 8, device=device) for _ in range(2))
        self.target = torch.tensor([0, 7, -100], device=device)

    def call(self, impl, **changes):
        given = {"base": self.base, "aux": self.aux, "target": self.target, "backend": impl.backend} | changes
        return aux_cross_entropy(given.pop("base"), given.pop("aux"), given.pop("target"), **given)


@pytest.fixture
def arguments(impl):
    return Arguments(impl.device)


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("side", ["base", "aux"])
@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(3, 8, dtype=torch.int64), "must be float32, bfloat16, float16 or float64, got torch.int64"),
        (
            torch.zeros(3, 8, dtype=torch.complex64),
            "must be float32, bfloat16, float16 or float64, got torch.complex64",
        ),
        (torch.zeros(3, 8, dtype=torch.float8_e5m2), "must be float32, bfloat16, float16 or float64, got torch.float8"),
        ([[0.0] * 8] * 3, "must be a tensor, Logits, Head or a sequence of these, got float"),
        (3.0, "must be a tensor, Logits, Head or a sequence of these, got float"),
        (Logits(None), "must be a tensor, got NoneType"),
        (torch.zeros(3, 8).to_sparse(), "must be a dense tensor, got layout torch.sparse_coo"),
        (
            lambda: torch.quantize_per_tensor(torch.zeros(3, 8), 0.1, 0, torch.qint8),
            "must not be quantised, got torch.q",
        ),
    ],
)
def test_a_source_of_another_type_is_a_type_error(arguments, impl, side, value, message):
    value = value() if callable(value) else value
    refuses(TypeError, f"{side} {message}", arguments.call, impl, **{side: value})


def test_base_is_not_optional(arguments, impl):
    refuses(
        TypeError,
        "base must be a tensor, Logits, Head or a sequence of these, got NoneType",
        arguments.call,
        impl,
        base=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int16])
def test_a_target_that_is_not_int32_or_int64_is_a_type_error(arguments, impl, dtype):
    message = f"target must be int32 or int64, got {dtype}"
    refuses(TypeError, message, arguments.call, impl, target=arguments.target.to(dtype))
    refuses(TypeError, message, logit_stats, arguments.base, None, arguments.target.to(dtype), backend=impl.backend)


def test_class_probabilities_are_refused_rather_than_misread(arguments, impl):
    refuses(
        TypeError, "target must be int32 or int64, got torch.float32", arguments.call, impl, target=torch.rand(3, 8)
    )


@pytest.mark.parametrize("value", [None, 3, [0, 1, 2]])
def test_a_target_that_is_no_tensor_is_a_type_error(arguments, impl, value):
    refuses(TypeError, "target must be a tensor, got", arguments.call, impl, target=value)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
@pytest.mark.parametrize("value", ["0.1", None, True, torch.tensor(0.1), 1j])
def test_a_number_that_is_none_is_a_type_error(arguments, impl, name, value):
    refuses(TypeError, f"{name} must be a number, got {type(value).__name__}", arguments.call, impl, **{name: value})


@pytest.mark.parametrize("name", ["ignore_index", "vocab_size"])
@pytest.mark.parametrize("value", [1.0, "1", True, torch.tensor([1]), torch.tensor(True)])
def test_an_integer_that_is_none_is_a_type_error(arguments, impl, name, value):
    refuses(TypeError, f"{name} must be an int, got {type(value).__name__}", arguments.call, impl, **{name: value})


@pytest.mark.parametrize("value", ["1.0", None, True])
def test_a_scale_that_is_neither_number_nor_tensor_is_a_type_error(arguments, impl, value):
    source = Logits(arguments.aux, scale=value)
    refuses(TypeError, f"scale of aux must be a number, got {type(value).__name__}", arguments.call, impl, aux=source)


@pytest.mark.parametrize("value", ["7", [7], True])
def test_a_normalizer_that_is_no_number_is_a_type_error(arguments, impl, value):
    refuses(
        TypeError, f"normalizer must be a number, got {type(value).__name__}", arguments.call, impl, normalizer=value
    )


@pytest.mark.parametrize("value", [[1.0] * 8, torch.ones(8, dtype=torch.int64)], ids=["list", "int64"])
def test_a_weight_of_another_type_is_a_type_error(arguments, impl, value):
    refuses(TypeError, "weight must be", arguments.call, impl, weight=value)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["base", "aux"])
@pytest.mark.parametrize("shape", [(4, 8), (1, 8), (8,), (3, 1, 8), (3, 8, 1)], ids=str)
def test_a_source_must_have_the_targets_shape_and_is_not_broadcast(arguments, impl, side, shape):
    message = f"{side} must be [*, V] with leading shape [3], got {list(shape)}"
    refuses(ValueError, message, arguments.call, impl, **{side: torch.zeros(shape, device=impl.device)})


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()], ids=str)
def test_a_target_of_another_shape_is_a_value_error(arguments, impl, shape):
    target = torch.zeros((*shape, 2), dtype=torch.int64, device=impl.device)
    refuses(ValueError, f"with leading shape {[*shape, 2]}, got [3, 8]", arguments.call, impl, target=target)


def test_logits_without_a_class_dimension_are_a_value_error(impl):
    refuses(
        ValueError, "base must be [*, V], got a 0-d tensor", logit_stats, torch.ones(()), None, backend=impl.backend
    )


def test_sources_of_unequal_width_are_a_value_error_that_lists_them(arguments, impl):
    wide = torch.zeros(3, 9, device=impl.device)
    message = "the sources must be equally wide, or vocab_size must be given, got widths base 8, aux[0] 8, aux[1] 9"
    refuses(ValueError, message, arguments.call, impl, aux=[arguments.aux, wide])


def test_vocab_size_may_not_pass_a_sources_width(arguments, impl):
    message = "vocab_size must be at most the width of base, 8, got 9"
    refuses(ValueError, message, arguments.call, impl, vocab_size=9, aux=torch.zeros(3, 9, device=impl.device))


@pytest.mark.parametrize("size", [0, -1])
def test_there_must_be_at_least_one_class(arguments, impl, size):
    message = f"vocab_size: there must be at least one class, got {size}"
    refuses(ValueError, message, arguments.call, impl, vocab_size=size)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_vocabulary_of_zero_is_a_value_error(impl, num_rows):
    empty, target = torch.zeros(num_rows, 0, device=impl.device), torch.zeros(num_rows, dtype=torch.int64)
    refuses(ValueError, "at least one class, got 0", aux_cross_entropy, empty, None, target, backend=impl.backend)


@pytest.mark.parametrize(
    "make", [lambda t: t.t().contiguous().t(), lambda t: t[:, :1].expand(3, 8), lambda t: t[:, ::2]]
)
def test_a_class_dimension_with_gaps_is_a_value_error(arguments, impl, make):
    message = "base must be contiguous in its last dimension, got stride"
    base = make(arguments.base)
    aux = arguments.aux[:, : base.shape[1]].contiguous()
    refuses(ValueError, message, arguments.call, impl, base=base, aux=aux, target=arguments.target.clamp(max=3))


@pytest.mark.slow
def test_a_class_dimension_of_one_may_have_any_stride(impl):
    base = torch.zeros(3, 4, device=impl.device)[:, 2:3].as_strided((3, 1), (4, 7))
    target = torch.zeros(3, dtype=torch.int64, device=impl.device)
    assert aux_cross_entropy(base, None, target, backend=impl.backend) == 0.0


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (3, 8)], ids=str)
def test_a_scale_is_one_number_or_one_per_row(arguments, impl, shape):
    source = Logits(arguments.aux, scale=torch.ones(shape, device=impl.device))
    message = f"scale of aux must have shape [] or [3], got {list(shape)}"
    refuses(ValueError, message, arguments.call, impl, aux=source)


@pytest.mark.parametrize("shape", [(), (7,), (9,), (1, 8)], ids=str)
def test_a_weight_has_one_number_per_class(arguments, impl, shape):
    weight = torch.ones(shape, device=impl.device)
    refuses(ValueError, f"weight must have shape [8], got {list(shape)}", arguments.call, impl, weight=weight)


def test_a_weight_counts_the_classes_of_vocab_size(arguments, impl):
    loss = arguments.call(
        impl, vocab_size=7, target=arguments.target.clamp(max=6), weight=torch.ones(7, device=impl.device)
    )
    assert loss.isfinite()


@pytest.mark.parametrize("value", [torch.ones(1), torch.ones(3), torch.tensor(1j)], ids=str)
def test_a_normalizer_is_a_real_0d_tensor(arguments, impl, value):
    refuses(ValueError, "normalizer must be a real 0-d tensor, got", arguments.call, impl, normalizer=value)


# -- values of options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_label_smoothing_is_a_share(arguments, impl, value):
    refuses(ValueError, f"label_smoothing must be in [0, 1], got {value}", arguments.call, impl, label_smoothing=value)


@pytest.mark.parametrize("value", [-1e-4, float("nan")])
def test_z_loss_is_not_negative(arguments, impl, value):
    refuses(ValueError, f"z_loss must be at least 0, got {value}", arguments.call, impl, z_loss=value)


@pytest.mark.parametrize("value", [0, -30.0, float("nan"), float("inf")])
def test_a_softcap_is_positive_and_finite(arguments, impl, value):
    source = Logits(arguments.base, softcap=value)
    refuses(ValueError, f"softcap of base must be positive and finite, got {value}", arguments.call, impl, base=source)


@pytest.mark.parametrize("value", ["average", None, "Mean", 0])
def test_a_reduction_is_one_of_three(arguments, impl, value):
    message = f"reduction must be one of 'mean', 'sum', 'none', got {value!r}"
    refuses(ValueError, message, arguments.call, impl, reduction=value)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_normalizer_belongs_to_the_mean(arguments, impl, reduction):
    message = f"normalizer needs reduction='mean', got reduction={reduction!r}"
    refuses(ValueError, message, arguments.call, impl, reduction=reduction, normalizer=3)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_ignore_index_fits_in_64_bits(arguments, impl, value):
    refuses(ValueError, f"ignore_index must fit in 64 bits, got {value}", arguments.call, impl, ignore_index=value)


def test_an_empty_sequence_of_sources_is_a_value_error(arguments, impl):
    refuses(ValueError, "aux must hold at least one source, got an empty list", arguments.call, impl, aux=[])
    refuses(ValueError, "base must hold at least one source, got an empty tuple", arguments.call, impl, base=())


def test_a_weight_that_wants_a_gradient_is_a_value_error(arguments, impl):
    weight = torch.ones(8, device=impl.device, requires_grad=True)
    refuses(ValueError, "weight must not require a gradient", arguments.call, impl, weight=weight)


def test_one_bad_source_of_a_sequence_is_named_by_its_place(arguments, impl):
    sources = [arguments.aux, Logits(arguments.aux, softcap=-1.0)]
    refuses(ValueError, "softcap of aux[1] must be positive and finite, got -1.0", arguments.call, impl, aux=sources)


def test_options_are_keyword_only(arguments):
    with pytest.raises(TypeError, match="positional"):
        aux_cross_entropy(arguments.base, arguments.aux, arguments.target, -100)
    with pytest.raises(TypeError, match="positional"):
        Logits(arguments.base, 2.0)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "aux", "weight", "scale"])
def test_tensors_on_another_device_are_a_value_error(name):
    meta = {"base": torch.zeros(3, 8), "aux": torch.zeros(3, 8), "weight": torch.ones(8), "scale": torch.ones(3)}
    meta[name] = meta[name].to("meta")
    source = Logits(meta["aux"], scale=meta["scale"])
    argument = "scale of aux" if name == "scale" else name
    message = f"{argument} must be on the target's device cpu, got meta"
    target = torch.zeros(3, dtype=torch.int64)
    refuses(ValueError, message, aux_cross_entropy, meta["base"], source, target, weight=meta["weight"])


@pytest.mark.gpu
def test_a_cpu_normalizer_goes_with_gpu_sources(on_gpu):
    arguments = Arguments("cuda")
    on_device = arguments.call(on_gpu, normalizer=torch.tensor(5, device="cuda"))
    assert torch.equal(arguments.call(on_gpu, normalizer=torch.tensor(5)), on_device)


# -- backends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["cuda", "cpp", "", "Reference", None])
def test_an_unknown_backend_is_a_value_error(value):
    message = f"backend must be one of 'auto', 'reference', 'native', 'triton', got {value!r}"
    arguments = Arguments()
    refuses(ValueError, message, aux_cross_entropy, arguments.base, None, arguments.target, backend=value)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_an_unavailable_backend_is_an_error_that_says_why(monkeypatch, backend):
    arguments = Arguments()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(auxkernels.dispatch, "native_missing", lambda: "the CPU module was not built: no compiler")
    reason = {
        "native": "the CPU module was not built: no compiler",
        "triton": "Triton kernels run on CUDA or ROCm devices",
    }
    with pytest.raises(RuntimeError) as caught:
        aux_cross_entropy(arguments.base, None, arguments.target, backend=backend)
    assert f"backend='{backend}' cannot be used: {reason[backend]}" in str(caught.value)
    assert aux_cross_entropy(arguments.base, None, arguments.target).isfinite()  # auto takes what there is


def test_triton_says_that_it_has_no_float64():
    arguments = Arguments()
    base = arguments.base.double()
    message = "backend='triton' cannot be used: the Triton kernels have no float64"
    refuses(RuntimeError, message, aux_cross_entropy, base, None, arguments.target, backend="triton")


def test_auto_is_native_where_it_is_built(native):
    base, aux, target = logits(4, 50), logits(4, 50), targets(4, vocab_size=50)
    base.mul_(7)
    results = [aux_cross_entropy(base, aux, target, reduction="none", backend=name) for name in ("auto", "native")]
    assert torch.equal(*results)


def _release_of(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_show_config_says_of_every_backend_whether_it_exists_or_why_not():
    first, *rest = show_config().splitlines()
    assert f"auxkernels {auxkernels.__version__}, torch {torch.__version__}" in first
    lines = {line[:12].strip(): line for line in rest}
    missing = {"native CPU": auxkernels.dispatch.native_missing(), "native CUDA": auxkernels.dispatch.cuda_missing()}
    for name in ("native CPU", "native CUDA", "triton"):
        assert "available" in lines[name]
        if missing.get(name):
            assert f"unavailable: {missing[name]}" in lines[name]
    assert "available (plain PyTorch)" in lines["reference"]
    assert platform.machine() in lines["machine"] and f"{torch.get_num_threads()} threads" in lines["machine"]
    for name in ("numpy", "transformers", "vllm"):
        release = _release_of(name)
        assert (f"no {name}" if release is None else f"{name} {release}") in lines["beside it"]
    command = subprocess.run([sys.executable, "-m", "auxkernels"], capture_output=True, text=True, timeout=1200)

    def lasting(text):  # what waits in the cache is each process's own
        return [line for line in text.strip().splitlines() if not line.startswith("CPU cache")]

    assert lasting(command.stdout) == lasting(show_config())


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("value", [-1, 8, -101])
def test_a_target_out_of_range_names_row_index_and_value(on_cpu, value, dtype):
    base = logits(2, 3, 8)
    target = torch.tensor([[0, 1, 2], [3, value, value]], dtype=dtype)
    message = f"target must be in [0, 8) or ignore_index=-100, got target[1, 1] = {value} (row 4)"
    for reduction in ("mean", "none"):
        for aux in (logits(2, 3, 8), logits(2, 3, 8, requires_grad=True)):
            refuses(
                IndexError, message, aux_cross_entropy, base, aux, target, reduction=reduction, backend=on_cpu.backend
            )
    refuses(IndexError, message, logit_stats, base, aux, target, backend=on_cpu.backend)
    several = [base, aux]
    refuses(IndexError, message, aux_cross_entropy, several, aux, target, backend=on_cpu.backend)


def test_a_target_past_vocab_size_is_out_of_range_although_the_column_exists(on_cpu):
    target = torch.tensor([0, 5, 1])
    message = "target must be in [0, 5) or ignore_index=-100, got target[1] = 5 (row 1)"
    call = (aux_cross_entropy, logits(3, 8), None, target)
    refuses(IndexError, message, *call, vocab_size=5, backend=on_cpu.backend)


def test_a_0d_target_out_of_range_is_named_too(on_cpu):
    message = "target must be in [0, 8) or ignore_index=-100, got target[] = 9 (row 0)"
    refuses(IndexError, message, aux_cross_entropy, logits(8), None, torch.tensor(9), backend=on_cpu.backend)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_on_gpu_a_target_out_of_range_poisons_its_row_alone(on_gpu, reduction):
    base, aux = logits(3, 100, device="cuda"), logits(3, 100, device="cuda", requires_grad=True)
    target = torch.tensor([1, 100, 3], device="cuda")
    loss = aux_cross_entropy(base, aux, target, reduction=reduction, backend=on_gpu.backend)
    (grad,) = torch.autograd.grad(loss, aux, torch.ones_like(loss))
    assert grad[1].isnan().all() and grad[::2].isfinite().all()
    assert loss.isnan().tolist() == ([False, True, False] if reduction == "none" else True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 8, -1, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_any_integer_may_be_ignore_index(impl, ignore_index, dtype):
    """An int32 target cannot hold 2**40; comparing in 32 bits would ignore class 0 instead."""
    target = torch.tensor([0, 3, 7, 5], dtype=dtype, device=impl.device)
    if -(2**31) <= ignore_index < 2**31 or dtype == torch.int64:
        target[1] = ignore_index
    base, aux = (logits(4, 8, device=impl.device, requires_grad=True) for _ in range(2))
    options = {"ignore_index": ignore_index, "reduction": "none"}
    got = check(Case(base, aux, target, options), impl, torch.rand(4, device=impl.device))
    assert got["loss"].eq(0).tolist() == target.long().eq(ignore_index).tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [2**31, 2**40])
def test_a_wide_ignore_index_leaves_an_int32_target_alone_in_every_path(impl, reduction, ignore_index):
    target = torch.tensor([0, 3, 0], dtype=torch.int32, device=impl.device)
    base = logits(3, 8, device=impl.device)
    weight = torch.rand(8, device=impl.device)
    for recompute in (False, True):
        aux = [logits(3, 8, device=impl.device, requires_grad=True), base]
        options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight, "recompute": recompute}
        check(Case(base, aux, target, options), impl, torch.tensor(0.5, device=impl.device))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_wide_ignore_index_does_not_excuse_the_int32_target_it_would_wrap_to(on_cpu, recompute):
    target = torch.tensor([0, -1, 2], dtype=torch.int32)
    aux = [logits(3, 8, requires_grad=True), logits(3, 8)]
    for sources in ((logits(3, 8), logits(3, 8)), (logits(3, 8), aux)):
        call = (aux_cross_entropy, *sources, target)
        options = {"ignore_index": 2**32 - 1, "recompute": recompute, "backend": on_cpu.backend}
        refuses(IndexError, "got target[1] = -1 (row 1)", *call, **options)


# -- what is returned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_float32_and_have_the_targets_shape(impl, dtype, lead):
    base = logits(*lead, 8, dtype=dtype, device=impl.device)
    target = targets(*lead, vocab_size=8, device=impl.device)
    for reduction, shape in (("none", lead), ("sum", ()), ("mean", ())):
        loss = aux_cross_entropy(base, base, target, reduction=reduction, backend=impl.backend)
        assert (loss.dtype, loss.shape, loss.device) == (torch.float32, shape, base.device)
    stats = logit_stats(base, base, target, backend=impl.backend)
    assert all(value.shape == lead for value in vars(stats).values())
    assert stats.lse.dtype == torch.float32 and stats.argmax.dtype == torch.int64


def test_without_gradients_nothing_is_recorded(impl):
    arguments = Arguments(impl.device)
    assert not arguments.call(impl).requires_grad
    assert not logit_stats(arguments.base, arguments.aux, backend=impl.backend).lse.requires_grad


def test_sources_survive_deepcopy_and_pickle(impl):
    scale = torch.tensor([0.5, 1.0, 2.0])
    source = Logits(logits(3, 8), scale=scale, softcap=3.0)
    target = torch.tensor([0, 7, -100])
    stats = logit_stats(source, None, target)
    for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        copied = again(source)
        assert copied.softcap == 3.0 and torch.equal(copied.scale, scale) and torch.equal(copied.values, source.values)
        assert copied.values is not source.values
        assert torch.equal(again(stats).lse, stats.lse)


def test_a_source_is_frozen():
    source = Logits(logits(3, 8))
    with pytest.raises(AttributeError):
        source.scale = 2.0


def test_the_public_names_are_these():
    for name in auxkernels.__all__:
        assert hasattr(auxkernels, name)
    assert {"aux_cross_entropy", "logit_stats", "Logits", "LogitStats", "nn", "show_config"} <= set(auxkernels.__all__)


# -- checks outlive -O -------------------------------------------------------------------------------------------------

OPTIMISED = """
import torch
from auxkernels import aux_cross_entropy
assert False, "-O removes this"
for arguments, error in (
    ((torch.zeros(3, 8), None, torch.tensor([0, 8, 1])), IndexError),
    ((torch.zeros(3, 8), None, torch.zeros(3)), TypeError),
    ((torch.zeros(3, 8), torch.zeros(3, 9), torch.zeros(3, dtype=torch.int64)), ValueError),
):
    for backend in BACKENDS:
        try:
            aux_cross_entropy(*arguments, backend=backend)
        except error as caught:
            print(type(caught).__name__)
"""


@pytest.mark.slow
def test_bad_input_is_refused_under_python_O_too():
    backends = ["reference"] if auxkernels.dispatch.native_missing() else ["reference", "native"]
    code = f"BACKENDS = {backends}\n{OPTIMISED}"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=1200)
    names = ("IndexError", "TypeError", "ValueError")
    assert done.stdout.split() == [name for name in names for _ in backends], done.stderr
