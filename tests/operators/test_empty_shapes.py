"""Operators and compiled functions on tensors without elements: an empty result or a Python error, never a signal."""

import itertools

import pytest
import torch
from interpreter import run

from auxkernels import Head, Logits, aux_cross_entropy, dispatch, logit_stats, soft_embedding
from auxkernels.soft_embedding.segments import segments_to_tokens

missing = dispatch.native_missing()
native_only = pytest.mark.skipif(missing is not None, reason=f"native on cpu: {missing}")

# Calls each function with every combination of these sizes, and prints how many were made. A signal ends the process.
SIZES = """
import itertools, torch
import auxkernels
from auxkernels.cross_entropy import native as cross_entropy, ops, request
from auxkernels.cross_entropy.request import Coefficients, Gradients, LossTerms, Problem, RowState
from auxkernels.native import DTYPE_CODES, cpu
from auxkernels.soft_embedding import native as kernels
from auxkernels.soft_embedding.request import OUTPUTS, ROW_FIELDS, SoftRows
from auxkernels.soft_embedding.segments import _sum, _to_tokens
from auxkernels.sources import Matrix

made = 0
def attempt(function, *args):
    global made
    made += 1
    try:
        function(*args)
    except (ValueError, TypeError, RuntimeError, IndexError):
        pass

EMPTY = list(itertools.product((0, 3), repeat=3))
"""


def calls_made(code: str) -> int:
    return int(run(code + "\nprint(made)", SIZES))


@native_only
def test_raw_operators_of_cross_entropy_survive_every_empty_shape():
    code = """
for N, V, D in EMPTY:
    base, target = torch.zeros(N, V), torch.zeros(N, dtype=torch.int64)
    weight, rows = torch.zeros(V), torch.zeros(N)
    leading = ([base, None, None, None] * 2, [0.0, 0.0], 1, None, target, weight, -100, V)
    needs = [True, False, False, False] * 2
    state = (rows, rows, rows, rows, rows)
    coefficients = [rows] * len(request.COEFFICIENTS)
    for V_given in {V, 0, 1}:
        leading = (*leading[:-1], V_given)
        attempt(torch.ops.auxkernels.cross_entropy_scan, *leading, request.mask_of(*request.FIELDS), "native")
        for mean in (True, False):
            attempt(torch.ops.auxkernels.cross_entropy_loss, *leading, None, 0.1, 0.1, mean, 0, needs, "native")
        attempt(torch.ops.auxkernels.cross_entropy_backward, *leading, *state, coefficients, needs, "native")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((N, V), (V,), (N, V, D)):
            grad, rows = torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=torch.int64)
            for of_rows in (None, rows):
                attempt(ops.rescale_, grad, torch.tensor(2.0), of_rows, -100, "native")
    attempt(ops.check_target, target, V, -100)
    parts = [torch.zeros(N, D), torch.zeros(V, D), weight, None, base, None, None, torch.zeros(N)]
    sources = (parts, [0.0, 2.0], 1, None, target, None, -100, V)
    needs = [part is not None for part in parts]
    attempt(ops.scan_op, *sources, request.mask_of(*request.FIELDS), "native")
    attempt(ops.loss_op, *sources, None, 0.0, 0.0, True, 0, needs, "native")
    attempt(ops.backward_op, *sources, *state, coefficients, needs, "native")
"""
    assert calls_made(code) > 150


@native_only
def test_raw_operators_of_lookups_survive_every_empty_shape():
    code = """
for N, K, D in EMPTY:
    for L, top_k, hard in itertools.product((None, 0, 2), (0, 2), (False, True)):
        table = torch.zeros(K, D) if L is None else torch.zeros(L, K, D)
        scores, mask, rows = torch.zeros(N, K), torch.zeros(K, dtype=torch.bool), torch.zeros(N)
        leading = ([scores, None, None, None], [0.0], None, table, None, None, None, mask, top_k, hard)
        attempt(torch.ops.auxkernels.soft_embedding, *leading, (1 << len(OUTPUTS)) - 1 - 128, "native")
        labels = torch.zeros(N, min(top_k, K), dtype=torch.int64) if top_k else None
        grad = torch.zeros(*table.shape[:-2], N, D)
        upstream, needs = [rows, rows, rows, torch.zeros(K)], [True, False, False, False, False, True]
        state = (rows, rows, rows.long(), labels, grad, upstream, needs)
        attempt(torch.ops.auxkernels.soft_embedding_backward, *leading, *state, "native")
    ids = torch.full((N,), -1)
    for backend in ("native", "reference"):
        attempt(_to_tokens, torch.zeros(K, D), ids, backend)
        attempt(_to_tokens, torch.zeros(0, K, D), ids, backend)
        attempt(_sum, torch.zeros(N, D), ids, K, backend)
        attempt(_sum, torch.zeros(0, N, D), ids, K, backend)
"""
    assert calls_made(code) > 200


@native_only
def test_compiled_functions_survive_every_empty_shape_and_number_of_threads():
    code = """
for (N, K, D), threads in itertools.product(EMPTY, (0, 1, 4)):
    torch.get_num_threads = lambda: threads
    base, target = torch.zeros(N, K), torch.zeros(N, dtype=torch.int64)
    problem, room = Problem(Matrix(base), None, target, None, -100, K), Gradients(base=base.clone())
    rows = torch.zeros(N)
    attempt(cross_entropy.scan, problem, request.mask_of(*request.FIELDS))
    attempt(cross_entropy.loss, problem, None, LossTerms(0.1, 0.1, True), 0, room)
    attempt(cross_entropy.backward, problem, RowState(*[rows] * 5), Coefficients(*[rows] * 8), room)
    attempt(cross_entropy.rescale_, base, torch.tensor(2.0), target, -100)
    given = SoftRows(base, torch.float32, 0, 0.5, None, None, None)
    fields = {name: rows if name != "argmax" else rows.long() for name in ROW_FIELDS}
    labels, weights = torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1)
    attempt(kernels.softmax, given, fields, base)
    attempt(kernels.softmax_backward, given, fields, base, None, base.clone(), rows, base.clone())
    attempt(kernels.select, given, fields, labels, weights)
    attempt(kernels.select_backward, given, fields, labels, weights, weights, None, base.clone(), rows)
    for L, k in itertools.product((0, 2), (0, 1)):
        tables, out = torch.zeros(L, K, D), torch.zeros(L, N, D)
        labels = torch.full((N, k), K - 1)
        attempt(kernels.gather, tables, labels, None, out if L else torch.zeros(1, N, D), False)
        attempt(kernels.products, tables, labels, out if L else torch.zeros(1, N, D), torch.zeros(N, k), False)
        attempt(kernels.scatter, tables, labels, None, out if L else torch.zeros(1, N, D), False)
    table, state = torch.zeros(K, D), torch.zeros(2, N)
    for dtype in (torch.float32, torch.bfloat16):
        scores, table, mixture, grads = base.to(dtype), table.to(dtype), torch.zeros(N, D, dtype=dtype), []
        grads = [torch.empty_like(scores), torch.empty_like(table)]
        small = (scores.data_ptr(), table.data_ptr(), *[DTYPE_CODES[dtype]] * 2, N, K, D, 0.5, threads)
        attempt(cpu().small_lookup, *small, state.data_ptr(), mixture.data_ptr())
        rows_of_all = scores, 0, 0.5, state
        attempt(kernels.plain_softmax, *rows_of_all, grads[0])
        attempt(kernels.plain_softmax_backward, *rows_of_all, scores.clone(), grads[0], scores.clone(), N)
        addresses = (mixture.data_ptr(), *(grad.data_ptr() for grad in grads))
        attempt(cpu().small_lookup_backward, *small, *addresses)
    of_loss, value = cross_entropy.cpu().small_loss, torch.zeros(())
    matrix, rest = (base.data_ptr(), 0, K, 0, False, 1.0, 0.0), (room.base.data_ptr(), 0, value.data_ptr())
    fields = [torch.zeros(len(request.FIELDS), N, dtype=dtype) for dtype in (torch.float32, torch.int64)]
    places = [field.data_ptr() for field in fields]
    classes = (N, K, target.data_ptr(), False, -100, 0, threads)
    wanted = request.mask_of(*request.FIELDS)
    attempt(of_loss, *classes, *matrix, *[0] * 4, False, 1.0, 0.0, wanted, *places, *rest, False, 1.0, 0.1, 0.1, True)
    empty = (base.data_ptr(), 0)
    attempt(cpu().add, empty, empty, empty, 0, threads)
    attempt(cpu().bring_in, base.data_ptr(), 0, threads)
"""
    assert calls_made(code) > 400


@native_only
def test_rows_that_are_numbered_by_no_inner_dimension_are_refused():
    code = """
try:
    base, aux = ([1, 0, 3, 0, 0, 3, 0, 0], [1.0, 0.0]), ([0, 0, 0, 1, 0, 0, 0, 0], [1.0, 0.0])
    cpu().scan([1, 3, 0, 0, -100, 0, 0, 1, 0, 0], *base, *aux, [0] * (len(cpu().field_names()) + 6))
except ValueError as error:
    print(error)
"""
    assert "num_inner must be at least 1" in run(code, SIZES)


@pytest.mark.parametrize("grads", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_head_of_width_0_adds_zeros_and_gets_empty_gradients_through_a_scaled_loss(impl, dtype, grads):
    if impl.backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64")
    base, target = torch.randn(4, 9, device=impl.device), torch.randint(9, (4,), device=impl.device)
    tensors = {"hidden": torch.zeros(4, 0), "weight": torch.zeros(9, 0)}
    tensors = {k: t.to(impl.device, dtype).requires_grad_(k in grads) for k, t in tensors.items()}
    head = Head(*tensors.values())
    for aux in (head, [head, head]):
        loss = aux_cross_entropy(base, aux, target, backend=impl.backend)
        torch.testing.assert_close(loss.detach().float(), torch.nn.functional.cross_entropy(base, target))
        (loss / 4).backward()
        for name in grads:
            assert tensors[name].grad.shape == tensors[name].shape
    assert logit_stats(base, head, target, backend=impl.backend).kl_to_base.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_no_rows_pass_through_every_source_and_reduction(impl, shape):
    target = torch.zeros(shape[:-1], dtype=torch.int64, device=impl.device)
    leaf = torch.zeros(shape, device=impl.device, requires_grad=True)
    weight = torch.zeros(5, 5, device=impl.device, requires_grad=True)
    scale = torch.ones(shape[:-1], device=impl.device, requires_grad=True)
    for aux, reduction in itertools.product((leaf, Head(leaf, weight), Logits(leaf, scale=scale)), ("mean", "none")):
        loss = aux_cross_entropy(leaf.detach(), aux, target, reduction=reduction, backend=impl.backend)
        (loss.sum() * 3).backward()
    assert leaf.grad.shape == shape and not weight.grad.any() and scale.grad.shape == shape[:-1]


def test_segments_without_rows_columns_or_tokens_are_empty(impl):
    for S, D, L, tokens in itertools.product((0, 2), (0, 3), ((), (0,), (2,)), ((0,), (4,), (2, 0))):
        rows = torch.zeros(*L, S, D, device=impl.device, requires_grad=True)
        ids = torch.full(tokens, -1, device=impl.device)
        out = segments_to_tokens(rows, ids, impl.backend)
        assert out.shape == (*L, *tokens, D)
        (out.sum() * 2).backward()
        assert rows.grad.shape == rows.shape and not rows.grad.any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 3), (2, 4, 0), (2, 0, 3)], ids=str)
def test_a_table_without_elements_is_refused(impl, shape):
    with pytest.raises(ValueError, match=r"table|class"):
        soft_embedding(torch.zeros(2, shape[-2], device=impl.device), torch.zeros(shape), backend=impl.backend)
