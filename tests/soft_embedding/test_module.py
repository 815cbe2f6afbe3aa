"""nn.SoftEmbedding: what it owns, when it adds noise, and segments."""

import copy
import io
import pickle

import pytest
import torch
from inputs import head, logits
from soft_oracle import Case, check_results
from tolerance import assert_alike

from auxkernels import nn, soft_embedding
from auxkernels.soft_embedding.segments import segments_to_tokens


def module_of(impl, *args, **options):
    return nn.SoftEmbedding(*args, backend=impl.backend, device=impl.device, **options)


def scores_of(impl, *shape, K=20):
    return logits(*shape, K, device=impl.device, requires_grad=True)


@pytest.fixture(params=[1, 3], ids=["one table", "three tables"])
def num_tables(request):
    return request.param


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"top_k": 3}, {"temperature": 0.4}], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 4)], ids=str)
def test_it_is_the_function_with_its_own_tables(impl, num_tables, shape, options):
    module, scores = module_of(impl, 20, 6, num_tables, **options), scores_of(impl, *shape)
    assert module.weight.shape == ((20, 6) if num_tables == 1 else (num_tables, 20, 6))
    mask = torch.rand(20, device=impl.device) < 0.3
    out, stats = module(scores, mask=mask, return_stats=True)
    want, other = soft_embedding(scores, module.weight, **options, mask=mask, return_stats=True, backend=impl.backend)
    assert torch.equal(out, want) and torch.equal(stats.entropy, other.entropy)
    assert torch.equal(module(scores, mask=mask), want)
    upstream = torch.randn_like(out)
    leaves = scores, module.weight
    for got, exact in zip(*(torch.autograd.grad(o, leaves, upstream) for o in (out, want)), strict=True):
        assert torch.equal(got, exact)


def test_it_takes_a_head(impl, num_tables):
    module, given = module_of(impl, 20, 6, num_tables), head(5, vocab_size=20, device=impl.device)
    module(given).square().sum().backward()
    assert given.hidden.grad.any() and given.weight.grad.any() and module.weight.grad.any()


def test_noise_is_added_in_training_mode_only(impl):
    module, scores = module_of(impl, 20, 6, gumbel=1.0, hard=True), scores_of(impl, 50)
    plain = soft_embedding(scores, module.weight, hard=True, backend=impl.backend)
    assert not torch.equal(module(scores), plain) and not torch.equal(module(scores, seed=3), plain)
    noisy = soft_embedding(scores, module.weight, hard=True, gumbel=1.0, seed=3, backend=impl.backend)
    assert torch.equal(module(scores, seed=3), noisy)
    module.eval()
    assert torch.equal(module(scores), plain) and torch.equal(module(scores, seed=3), plain)
    module.train()
    torch.manual_seed(1)
    first, second = module(scores), module(scores)
    torch.manual_seed(1)
    assert torch.equal(module(scores), first) and not torch.equal(first, second)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("shape", [(20, 6), (3, 20, 6), (1, 20, 6)], ids=str)
def test_from_codebook_copies_the_tables_and_freezes_them_if_asked(impl, shape, freeze):
    codebook = logits(*shape, device=impl.device)
    module = nn.SoftEmbedding.from_codebook(codebook, freeze=freeze, hard=True, backend=impl.backend)
    assert torch.equal(module.weight, codebook) and module.weight.data_ptr() != codebook.data_ptr()
    assert module.weight.requires_grad != freeze and isinstance(module.weight, torch.nn.Parameter)
    scores = scores_of(impl, 5)
    out = module(scores)
    assert out.shape == (*shape[:-2], 5, 6), "what the codebook's form says"
    out.square().sum().backward()
    assert (module.weight.grad is None) == freeze and scores.grad.any()
    assert module.weight.device == codebook.device and module.hard


def test_a_codebook_keeps_its_dtype_unless_another_is_asked_for(impl):
    codebook = logits(20, 6, dtype=torch.bfloat16, device=impl.device, requires_grad=True)
    module = nn.SoftEmbedding.from_codebook(codebook, backend=impl.backend)
    assert module.weight.dtype == torch.bfloat16 and module(scores_of(impl, 5)).dtype == torch.bfloat16
    assert codebook.grad_fn is None and module.weight.is_leaf
    wide = nn.SoftEmbedding.from_codebook(codebook, dtype=torch.float32, backend=impl.backend)
    assert wide.weight.dtype == torch.float32 and torch.equal(wide.weight, codebook.float())


@pytest.mark.parametrize("shape", [(20,), (1, 2, 20, 6), ()], ids=str)
def test_a_codebook_of_another_form_is_refused(shape):
    with pytest.raises(ValueError, match="codebook"):
        nn.SoftEmbedding.from_codebook(torch.zeros(shape))


def test_its_state_moves_is_saved_and_copied(impl, num_tables):
    T = torch.tensor(0.5, device=impl.device)
    module, scores = module_of(impl, 20, 6, num_tables, temperature=T), scores_of(impl, 5)
    want = module(scores)
    assert set(module.state_dict()) == {"weight", "temperature"}
    other = module_of(impl, 20, 6, num_tables, temperature=torch.tensor(9.0, device=impl.device))
    assert not torch.equal(other(scores), want)
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(copied(scores), want)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and (half.temperature == 0.5).all()
    check_results(Case(scores.detach(), half.weight.detach(), {"temperature": 0.5}), {"out": half(scores)}, {})
    plain = module_of(impl, 20, 6)
    assert set(plain.state_dict()) == {"weight"} and len(list(plain.buffers())) == 0


def test_a_temperature_that_is_a_parameter_is_trained(impl):
    T = torch.nn.Parameter(torch.tensor(1.0, device=impl.device))
    module = module_of(impl, 20, 6, temperature=T)
    assert dict(module.named_parameters()).keys() == {"weight", "temperature"}
    module(scores_of(impl, 5)).square().sum().backward()
    assert T.grad.shape == () and T.grad != 0


def test_a_planner_learns_through_it(impl):
    """Scores and tables train together: the loss falls to a twentieth."""
    torch.manual_seed(0)
    module = module_of(impl, 12, 4, gumbel=0.1)
    scores = torch.nn.Parameter(torch.zeros(30, 12, device=impl.device))
    goal = logits(3, 4, scale=1.0, device=impl.device)[torch.arange(30) % 3]
    optimizer = torch.optim.Adam([scores, *module.parameters()], lr=0.1)
    losses = []
    for _ in range(60):
        loss = (module(scores) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20


def test_it_says_what_it_is():
    text = repr(nn.SoftEmbedding(20, 6, 3, hard=True, gumbel=0.5, top_k=4))
    assert all(part in text for part in ("SoftEmbedding", "20", "6", "3", "hard=True", "gumbel=0.5", "top_k=4"))


# -- segments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (17,), (2, 9)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_every_token_gets_its_segments_mixture(impl, num_tables, shape, tokens):
    module, scores = module_of(impl, 20, 6, num_tables), scores_of(impl, *shape)
    num_segments = scores[..., 0].numel()
    ids = torch.randint(-1, num_segments, tokens).to(impl.device)
    out = module(scores, segment_ids=ids)
    tables = () if num_tables == 1 else (num_tables,)
    rows = module(scores).reshape(*tables, num_segments, 6)
    assert out.shape == (*tables, *tokens, 6)
    want = torch.where(ids.unsqueeze(-1) < 0, 0.0, rows[..., ids.clamp(min=0), :])
    assert torch.equal(out, want)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (scores, module.weight), upstream)
    exact = torch.autograd.grad(want, (scores, module.weight), upstream, allow_unused=True)
    for one, two in zip(got, exact, strict=True):
        assert_alike(one, torch.zeros_like(one) if two is None else two)


def test_the_gradient_of_a_segment_is_the_sum_of_its_tokens_and_repeats(fused, num_tables):
    module, scores = module_of(fused, 20, 6, num_tables), scores_of(fused, 5)
    ids = torch.tensor([0, 0, 3, -1, 3, 3, 4, -7], device=fused.device)
    out = module(scores, segment_ids=ids)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, (scores, module.weight), upstream, retain_graph=True)
    again = torch.autograd.grad(module(scores, segment_ids=ids), (scores, module.weight), upstream)
    assert all(map(torch.equal, first, again))
    assert not first[0][[1, 2]].any() and first[0][[0, 3, 4]].any(-1).all()  # empty segments
    rows = module(scores)
    summed = torch.zeros_like(rows)
    for token, segment in enumerate(ids.tolist()):
        if segment >= 0:
            summed[..., segment, :] += upstream[..., token, :]
    for got, want in zip(first, torch.autograd.grad(rows, (scores, module.weight), summed), strict=True):
        assert_alike(got, want)


def test_statistics_are_of_segments_and_not_of_tokens(impl):
    module, scores = module_of(impl, 20, 6), scores_of(impl, 5)
    ids = torch.zeros(100, dtype=torch.int64, device=impl.device)
    out, stats = module(scores, segment_ids=ids, return_stats=True)
    assert out.shape == (100, 6) and stats.entropy.shape == (5,)
    assert_alike(stats.usage, torch.softmax(scores, -1).mean(0))


def test_segments_of_no_rows_and_no_tokens(impl, num_tables):
    module = module_of(impl, 20, 6, num_tables)
    tables = () if num_tables == 1 else (num_tables,)
    none = torch.zeros(0, dtype=torch.int64, device=impl.device)
    assert module(scores_of(impl, 5), segment_ids=none).shape == (*tables, 0, 6)
    out = module(scores_of(impl, 0), segment_ids=torch.full((3,), -1, device=impl.device))
    assert out.shape == (*tables, 3, 6) and not out.any()


def test_an_unknown_segment_is_an_index_error_on_cpu(on_cpu):
    module = nn.SoftEmbedding(20, 6, backend=on_cpu.backend)
    with pytest.raises(IndexError, match="segment_ids must be below 5, got 5"):
        module(torch.randn(5, 20), segment_ids=torch.tensor([0, 5]))


def test_one_softmax_serves_many_layers(impl):
    """What a planner's conditioned layers do: one call for all tables, broadcast last."""
    module, scores = module_of(impl, 20, 6, 10), scores_of(impl, 4)
    ids = torch.arange(4, device=impl.device).repeat_interleave(5)
    together = module(scores, segment_ids=ids)
    for layer, table in enumerate(module.weight):
        apart = segments_to_tokens(soft_embedding(scores, table, backend=impl.backend), ids, impl.backend)
        assert_alike(together[layer], apart)
