"""Lists that Python and C++ pass by number have the same order on both sides, or nothing is called."""

from types import SimpleNamespace

import emulated_cuda
import pytest
import torch

import auxkernels
from auxkernels import aux_cross_entropy, sample_logits, soft_embedding
from auxkernels.cross_entropy import compiled_arguments
from auxkernels.cross_entropy import cuda as cuda_cross_entropy
from auxkernels.cross_entropy import native as cpu_cross_entropy
from auxkernels.cross_entropy.request import COEFFICIENTS, FIELDS, RowState
from auxkernels.sampling import native as cpu_sampling
from auxkernels.sampling import request as sampling
from auxkernels.soft_embedding import native as cpu_soft_embedding
from auxkernels.soft_embedding.request import ROW_FIELDS, Upstream

needs_native = pytest.mark.skipif(auxkernels.native.missing() is not None, reason=f"{auxkernels.native.missing()}")
ORDERS = {"field_names": FIELDS, "coefficient_names": COEFFICIENTS, "state_names": RowState._fields}
SOFT_ORDERS = {"soft_field_names": ROW_FIELDS, "soft_upstream_names": Upstream._fields}
SAMPLE_ORDERS = {"sample_parameter_names": sampling.Parameters._fields, "sample_field_names": sampling.FIELDS}
ALL_ORDERS = ORDERS | SOFT_ORDERS | SAMPLE_ORDERS


@needs_native
def test_the_cpu_module_has_the_orders_of_the_package():
    module = auxkernels.native.cpu()
    for function, names in ALL_ORDERS.items():
        assert getattr(module, function)() == list(names)


def test_the_cuda_module_has_the_orders_of_the_package():
    if reason := emulated_cuda.missing():
        pytest.skip(reason)
    module = emulated_cuda.module()
    assert compiled_arguments.checked(module) is module
    for function, names in ORDERS.items():
        assert getattr(module, function)() == list(names)


def other_module(**orders) -> SimpleNamespace:
    """A module of other sources, whose kernels must not be called."""
    functions = {name: lambda names=names: list(names) for name, names in (ALL_ORDERS | orders).items()}
    return SimpleNamespace(__name__="auxkernels.native._other", **functions)


@pytest.fixture
def load(monkeypatch):
    """Makes another module the compiled one, as if it had just been loaded."""
    fetched = (cpu_cross_entropy.cpu, cuda_cross_entropy.cuda, cpu_soft_embedding.cpu, cpu_sampling.cpu)

    def use(module):
        for function in fetched:
            function.cache_clear()
        monkeypatch.setattr(auxkernels.native, "cpu", lambda: module)
        monkeypatch.setattr(auxkernels.native, "cuda", lambda: module)

    yield use
    for function in fetched:
        function.cache_clear()


def swapped(names) -> list[str]:
    return [names[1], names[0], *names[2:]]


@pytest.mark.parametrize("fetch", [cpu_cross_entropy.cpu, cuda_cross_entropy.cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("function", ORDERS)
def test_another_order_is_refused_with_both_and_the_way_out(load, fetch, function):
    names = ORDERS[function]
    load(other_module(**{function: swapped(names)}))
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError) as error:
            fetch()
        message = str(error.value)
        assert function in message and str(swapped(names)) in message and str(list(names)) in message
        assert "auxkernels.native._other" in message and "rebuild it" in message


@pytest.mark.parametrize("function", SOFT_ORDERS)
def test_another_order_of_soft_embedding_is_refused(load, function):
    load(other_module(**{function: swapped(SOFT_ORDERS[function])}))
    with pytest.raises(RuntimeError, match=f"its {function} are .*rebuild it"):
        cpu_soft_embedding.cpu()
    assert cpu_cross_entropy.cpu()  # which that list does not concern


def test_a_module_from_before_there_were_names_is_refused(load):
    load(SimpleNamespace(__name__="auxkernels.native._other"))
    for fetch in (cpu_cross_entropy.cpu, cpu_soft_embedding.cpu):
        with pytest.raises(RuntimeError, match=r"are \[\], the package has"):
            fetch()


@needs_native
def test_a_public_call_says_so_and_runs_no_kernel(load):
    load(other_module(field_names=swapped(FIELDS), soft_field_names=swapped(ROW_FIELDS)))
    base, target = torch.zeros(2, 5), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="rebuild it"):
        aux_cross_entropy(base, base.clone(), target, backend="native")
    with pytest.raises(RuntimeError, match="rebuild it"):
        soft_embedding(base, torch.zeros(5, 3), backend="native", return_stats=True)


@needs_native
def test_a_module_is_asked_once(load, monkeypatch):
    module, asked = auxkernels.native.cpu(), []
    counting = SimpleNamespace(**{name: getattr(module, name) for name in dir(module) if not name.startswith("__")})
    counting.__name__ = "counting"
    counting.field_names = lambda: asked.append(0) or module.field_names()
    load(counting)
    base, target = torch.zeros(2, 5), torch.tensor([1, 2])
    for _ in range(3):
        aux_cross_entropy(base, base.clone(), target, backend="native")
    assert len(asked) == 1


@pytest.mark.parametrize("function", SAMPLE_ORDERS)
def test_another_order_of_sampling_is_refused(load, function):
    load(other_module(**{function: swapped(SAMPLE_ORDERS[function])}))
    with pytest.raises(RuntimeError, match=function):
        sample_logits(torch.zeros(2, 5), seed=1, backend="native")
