"""The same tokens, kept counts and ranks from every implementation, for any instruction set and number of threads."""

import pytest
import torch

import auxkernels
from auxkernels import Logits, sample_logits

BF16 = torch.bfloat16
OPTIONS = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "greedy": {"temperature": 0},
    "top-k": {"top_k": 50},
    "top-k of many": {"top_k": 3000},
    "top-p": {"top_p": 0.9},
    "top-p of few": {"top_p": 0.2, "temperature": 0.7},
    "top-p of nearly all": {"top_p": 0.9999, "temperature": 5.0},
    "min-p": {"min_p": 0.02},
    "plausibility": {"plausibility": 0.01},
    "all": {"temperature": 0.8, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "plausibility": 1e-4},
    "all, vllm": {"temperature": 1.5, "top_k": 600, "top_p": 0.7, "min_p": 0.05, "order": "vllm"},
    "top-p and min-p, vllm": {"top_p": 0.9, "min_p": 1e-3, "order": "vllm"},
    "nearly infinite temperature": {"temperature": 1e30, "top_p": 0.5},
}


def assert_same(one, other):
    token, stats = one
    want, of_reference = other
    assert torch.equal(token.cpu(), want.cpu())
    assert torch.equal(stats.num_kept.cpu(), of_reference.num_kept.cpu())
    assert torch.equal(stats.base_rank.cpu(), of_reference.base_rank.cpu())
    for name in ("log_prob", "kept_log_prob"):
        ours, theirs = (getattr(each, name).cpu() for each in (stats, of_reference))
        torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6, equal_nan=True)


def sources(kind, num_rows, width, device):
    generator = torch.Generator().manual_seed(num_rows * width)
    base, aux = (torch.randn(num_rows, width, generator=generator) * 3 for _ in range(2))
    if kind == "bfloat16":
        return base.to(device, BF16), aux.to(device, BF16)
    if kind == "ties":
        return base.mul(2).round().div(2).to(device), None
    if kind == "masked":
        base = base.masked_fill(torch.rand(base.shape, generator=generator) < 0.9, -torch.inf)
        base[:, 0] = 0.0
        return base.to(device), aux.to(device, torch.float16)
    if kind == "scaled":
        scale = torch.rand(num_rows, generator=generator).to(device)
        return Logits(base.to(device, BF16), scale=0.7), Logits(aux.to(device), scale=scale)
    if kind == "sums":
        more = torch.randn(num_rows, width, generator=generator).to(device)
        return [base.to(device), Logits(more, scale=-0.3)], [aux.to(device), more, more.to(BF16)]
    if kind == "subnormal":
        return base.to(device) * 1e-39, None
    return base.to(device), aux.to(device)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "ties", "masked", "scaled", "sums", "subnormal"])
@pytest.mark.parametrize("width", [1, 63, 300, 4096, 20_000])
def test_tokens_are_those_of_the_reference(fused, kind, width):
    num_rows = 6 if width < 5000 else 3
    base, aux = sources(kind, num_rows, width, fused.device)
    for i, options in enumerate(OPTIONS.values()):
        given = {"seed": i, "return_stats": True} | options
        expected = sample_logits(base, aux, backend="reference", **given)
        assert_same(sample_logits(base, aux, backend=fused.backend, **given), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_float64_tokens_are_those_of_the_reference(options):
    if reason := auxkernels.dispatch.native_missing():
        pytest.skip(reason)
    base, aux = (torch.randn(4, 5000, dtype=torch.float64) * 3 for _ in range(2))
    given = {"seed": 1, "return_stats": True} | options
    expected = sample_logits(base, aux.float(), backend="reference", **given)
    assert_same(sample_logits(base, aux.float(), backend="native", **given), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_neither_threads_nor_instruction_sets_change_a_token(native, options):
    base, aux = torch.randn(1, 100_000).bfloat16(), torch.randn(1, 100_000)
    aux = Logits(aux, scale=0.3)
    before, threads = native.instruction_set(), torch.get_num_threads()
    found = []
    try:
        for name in native.instruction_sets():
            native.set_instruction_set(name)
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                token, stats = sample_logits(base, aux, seed=3, return_stats=True, backend="native", **options)
                found.append((token.item(), stats.num_kept.item(), stats.base_rank.item()))
    finally:
        native.set_instruction_set(before)
        torch.set_num_threads(threads)
    assert len(found) >= 3 and len(set(found)) == 1
    assert found[0][0] == sample_logits(base, aux, seed=3, backend="reference", **options).item()


def test_flushing_subnormals_changes_nothing(native):
    s = torch.randn(3, 500) * 1e-39
    want = sample_logits(s, temperature=0, backend="native")
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(sample_logits(s, temperature=0, backend="native"), want)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(want, s.argmax(-1))
