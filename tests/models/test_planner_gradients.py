"""What the language model's loss says to scores, codebooks and projections; frozen parts; gradient checkpointing."""

import copy
import gc
import threading
import types
import weakref

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from network import assert_same_network
from planner_models import (
    ARCHITECTURES,
    LABEL_DIM,
    NUM_LABELS,
    NUM_SEGMENTS,
    SEGMENT_IDS,
    TinyPlanner,
    label_weights,
    reference_logits,
    scores,
    tiny_lm,
    tiny_model,
    tokens,
)
from tolerance import OF_A_ROW, unit
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from auxkernels.models import planner_checkpointing
from auxkernels.models.conditioning import is_folded


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_joint_gradient_equals_that_of_the_token_by_token_form(architecture, mode):
    model, ids = tiny_model(architecture, lm=tiny_lm(architecture, torch.float64), temperature=0.7), tokens()
    given = scores(dtype=torch.float64).requires_grad_()
    inputs = [given, *model.conditioning.parameters()]
    loss = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids, mode=mode).loss
    got = torch.autograd.grad(loss, inputs)
    logits = reference_logits(model, ids, SEGMENT_IDS, label_weights(mode, given, 0.7))
    want_loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_same_network(loss, want_loss)
    want = torch.autograd.grad(want_loss, inputs)
    assert_same_network(got, want)
    assert all(b.abs().max() > 1e-6 for b in want)


@pytest.mark.parametrize("segments", [NUM_SEGMENTS, 60])  # few: mixtures are projected; many: the codebooks
def test_joint_gradient_equals_finite_differences(segments):
    model, ids = tiny_model("gpt2", lm=tiny_lm("gpt2", torch.float64), layers=[1, 3]), tokens(2, 9)
    assert is_folded(segments, NUM_LABELS, LABEL_DIM, 16) == (segments == 60)
    given = scores(segments, torch.float64).requires_grad_()
    segment_ids = SEGMENT_IDS * (segments // NUM_SEGMENTS)

    def loss():
        return model(ids, segment_ids=segment_ids, label_scores=given, labels=ids).loss

    table = model.conditioning
    for weight in (given, table.codebooks, table.weight, table.bias):
        direction, step = torch.randn_like(weight), 1e-5
        (slope,) = torch.autograd.grad(loss(), weight)
        with torch.no_grad():
            start = weight.clone()
            weight.copy_(start + step * direction)
            above = loss()
            weight.copy_(start - step * direction)
            below = loss()
            weight.copy_(start)
        torch.testing.assert_close((slope * direction).sum(), (above - below) / (2 * step), rtol=1e-6, atol=1e-9)


def test_straight_through_takes_the_soft_gradient_and_the_chosen_rows_of_the_codebook():
    model, ids, given = tiny_model(), tokens(), scores().requires_grad_()
    model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids, mode="straight_through").loss.backward()
    used = set(given.argmax(-1)[[0, 1, 3, 4, 5]].tolist())  # segment 2 has no tokens
    touched = model.conditioning.codebooks.grad.abs().amax((0, 2)).nonzero().flatten().tolist()
    assert set(touched) <= used and len(touched) > 1
    assert (given.grad.abs().amax(1) > 0).tolist() == [True, True, False, True, True, True]
    roundings = OF_A_ROW * unit(torch.float32) * given.grad.abs().sum(1)
    assert (given.grad.sum(1).abs() <= roundings).all()  # of a softmax: zero but for them


def test_hard_labels_give_scores_no_gradient():
    model, ids, planner_inputs = tiny_model(), tokens(), {"features": torch.randn(NUM_SEGMENTS, 5)}
    out = model(ids, segment_ids=SEGMENT_IDS, planner_inputs=planner_inputs, labels=ids, mode="hard")
    out.loss.backward()
    assert not any(name.startswith("planner") for name in gradients(model))
    assert {"conditioning.codebooks", "conditioning.weight", "conditioning.bias"} <= gradients(model).keys()


@pytest.mark.parametrize("gumbel_hard", [False, True])
def test_gumbel_noise_comes_in_training_mode_only(gumbel_hard):
    model, ids, given = tiny_model(mode="gumbel", gumbel_hard=gumbel_hard), tokens(), scores() / 4

    def logits():
        return model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits

    quiet = model(
        ids, segment_ids=SEGMENT_IDS, label_scores=given, mode="straight_through" if gumbel_hard else "soft"
    ).logits
    assert torch.equal(logits(), quiet)
    model.train()
    assert not torch.equal(logits(), logits())
    torch.manual_seed(3)
    first = logits()
    torch.manual_seed(3)
    assert torch.equal(first, logits())


def test_a_noisy_choice_may_have_the_gradient_without_noise():
    options = {"mode": "gumbel", "gumbel_hard": True, "gumbel_clean_gradient": True}
    model, ids, given = tiny_model(**options).train(), tokens(), (scores() / 4).requires_grad_()
    upstream = None

    def rows_and_slope(seed, **mode):
        nonlocal upstream
        torch.manual_seed(seed)
        rows, _ = model._rows(mode.get("mode", "gumbel"), {"label_scores": given})
        upstream = torch.randn_like(rows) if upstream is None else upstream
        return rows, torch.autograd.grad(rows, given, upstream)[0]

    (first, slope), (second, other), (soft, want) = rows_and_slope(1), rows_and_slope(2), rows_and_slope(3, mode="soft")
    assert not torch.equal(first, second) and not torch.allclose(first, soft)
    torch.testing.assert_close(slope, want)
    torch.testing.assert_close(other, want)
    with pytest.raises(ValueError, match="gumbel_clean_gradient needs gumbel_hard=True"):
        tiny_model(mode="gumbel", gumbel_clean_gradient=True)
    assert model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids).loss.isfinite()


def test_loss_alone_reaches_the_planner_and_never_the_frozen_language_model():
    model, ids = tiny_model("gpt2").train(), tokens()
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    out = model(ids, segment_ids=SEGMENT_IDS, planner_inputs={"features": torch.randn(6, 5)}, labels=ids)
    out.loss.backward()
    optimizer.step()
    assert model.planner.head.weight.grad.abs().max() > 0
    assert not any(name.startswith("lm.") for name in gradients(model))
    assert all(torch.equal(value, before[name]) for name, value in model.lm.state_dict().items())


def test_frozen_language_model_stays_in_eval_mode_and_without_dropout():
    model, ids, given = tiny_model("gpt2"), tokens(), scores()
    want = model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits
    model.train()
    assert model.training and model.planner.training and not any(m.training for m in model.lm.modules())
    assert torch.equal(model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits, want)
    model.freeze_lm(False)
    assert all(m.training for m in model.lm.modules()) and all(w.requires_grad for w in model.lm.parameters())
    assert not torch.equal(model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits, want)


def test_unfreezing_leaves_what_was_frozen_before():
    planner = TinyPlanner()
    planner.head.bias.requires_grad_(False)
    model = tiny_model(planner=planner)
    for _ in range(2):
        model.freeze_planner()
        assert not any(w.requires_grad for w in planner.parameters()) and not planner.training
        assert not model.train().planner.training
    model.freeze_planner(False)
    assert planner.head.weight.requires_grad and not planner.head.bias.requires_grad and planner.training


# -- gradient checkpointing --------------------------------------------------------------------------------------------


def two_losses(model, ids, given):
    """Two forward passes before one backward pass: the second must not change what the first recomputes."""
    first = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids).loss
    second = model(ids.flip(1), segment_ids=SEGMENT_IDS, label_scores=-given, labels=ids).loss
    (first + 2 * second).backward()
    return gradients(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("freeze_lm", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, freeze_lm):
    lm = tiny_lm(
        architecture, **({"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0} if architecture == "gpt2" else {})
    )
    model, ids, given = tiny_model(lm=lm, freeze_lm=freeze_lm).train(), tokens(), scores()
    runs = []
    lm_layer = model._decoder_layers()[3]
    norm = lm_layer.ln_1 if architecture == "gpt2" else lm_layer.input_layernorm
    norm.register_forward_hook(lambda *_: runs.append(1))
    want = two_losses(copy.deepcopy(model), ids, given)
    assert len(runs) == 2
    model.gradient_checkpointing_enable()
    assert any(layer.gradient_checkpointing for layer in model._decoder_layers())
    got = two_losses(model, ids, given)
    assert len(runs) == 6  # both recomputed
    assert got.keys() == want.keys()
    for name in want:
        assert_same_network(got[name], want[name])
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model._decoder_layers())


def test_hooks_that_run_again_in_the_recomputation_add_the_same(monkeypatch):
    """Versions of transformers that checkpoint a layer's __call__ run its hooks twice; here this one is made to."""
    monkeypatch.setattr(planner_checkpointing, "HOOKS_RUN_AGAIN", True)
    model, ids, given = tiny_model("llama").train(), tokens(), scores()
    want = two_losses(copy.deepcopy(model), ids, given)
    of_lm = copy.deepcopy(model)
    of_lm.lm.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="not on its language model"):
        two_losses(of_lm.train(), ids, given)
    contexts = []

    def enable(self, options, **kwargs):
        contexts.append(options)

    monkeypatch.setattr(transformers.PreTrainedModel, "gradient_checkpointing_enable", enable)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})

    class Checkpointed(type(model._decoder_layers()[0])):
        def __call__(self, hidden, **kwargs):
            return checkpoint(types.MethodType(super().__call__.__func__, self), hidden, **kwargs, **contexts[0])

    for layer in model._decoder_layers():
        layer.__class__ = Checkpointed
    got = two_losses(model, ids, given)
    for name in want:
        assert_same_network(got[name], want[name])
    assert model._active.rows is None
    model.zero_grad()
    loss = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids).loss
    loss = loss + 2 * model(ids.flip(1), segment_ids=SEGMENT_IDS, label_scores=-given, labels=ids).loss
    backward = threading.Thread(target=loss.backward)  # as on a GPU, where autograd has threads of its own
    backward.start()
    backward.join()
    for name, gradient in gradients(model).items():
        assert_same_network(gradient, want[name])
    assert len(gradients(model)) == len(want)
    alive = weakref.ref(model)
    lm = model.lm
    del model, loss, backward
    gc.collect()
    assert alive() is None and lm.training is False


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [9, 1])
def test_frozen_checkpointed_models_take_padding_and_single_tokens(architecture, length):
    model, ids, given = tiny_model(architecture, mode="soft").train(), tokens(2, length), scores().requires_grad_()
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    call = {"attention_mask": mask, "segment_ids": SEGMENT_IDS[:, -length:].clamp(min=0), "label_scores": given}

    def gradient(model):
        out = model(ids, **call, skip_logits=False)
        assert out.past_key_values is None
        return torch.autograd.grad(out.logits[mask.bool()].logsumexp(-1).sum(), given)[0]

    want = gradient(model)
    model.gradient_checkpointing_enable()
    assert want.abs().max() > 1e-4
    assert_same_network(gradient(model), want)


def test_a_cache_is_made_outside_training_and_where_asked_for():
    model, ids, given = tiny_model("gpt2"), tokens(), scores()
    call = {"segment_ids": SEGMENT_IDS, "label_scores": given}
    assert model(ids, **call).past_key_values is not None
    assert model.train()(ids, **call, use_cache=True).past_key_values is not None
    assert model(ids, **call).past_key_values is None


def tiny_opt(**options):
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=4, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, **options,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def test_frozen_layers_that_drop_out_themselves_are_not_checkpointed():
    model, ids, given = tiny_model(lm=tiny_opt(dropout=0.5)).train(), tokens(), scores().requires_grad_()
    with pytest.raises(ValueError, match=r"cannot be checkpointed with dropout.*dropout=0\.0"):
        model.gradient_checkpointing_enable()
    model.freeze_lm(False)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be checkpointed with dropout"):
        model.freeze_lm()
    assert not model.config.freeze_lm
    model = tiny_model(lm=tiny_opt(dropout=0.0)).train()
    want = two_losses(copy.deepcopy(model), ids, given)
    model.gradient_checkpointing_enable()
    got = two_losses(model, ids, given)
    for name in want:
        assert_same_network(got[name], want[name])
