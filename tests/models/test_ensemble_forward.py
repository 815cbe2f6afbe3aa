"""What one call of `AuxiliaryEnsembleForCausalLM` computes, against plain sums of the models' logits."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

transformers = pytest.importorskip("transformers")

from ensembles import (  # noqa: E402
    KINDS,
    PREFIX,
    PREFIX_MASK,
    eager_sum,
    part,
    tiny_base,
    tiny_ensemble,
    tiny_member,
)
from network import assert_same_network  # noqa: E402
from tiny import VOCAB_SIZE, tiny_model  # noqa: E402

from auxkernels.models import AuxiliaryEnsembleForCausalLM, AuxiliaryForCausalLM  # noqa: E402

MIXED = [("own", "trunk"), ("own", "own", "trunk"), ("shared", "own"), ("low_rank", "factored", "shared")]


def shifted_loss(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())


def softcapped_base():
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    options = {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(vocab_size=VOCAB_SIZE, hidden_size=16, pad_token_id=0, **sizes, **options)
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", MIXED, ids="-".join)
@pytest.mark.parametrize("base_scale", [1.0, 2.5, -0.5, torch.tensor([1.0, 0.0, 3.0])], ids=str)
def test_logits_and_loss_are_those_of_the_sum(kinds, base_scale, tokens):
    model = tiny_ensemble(kinds)
    want = eager_sum(model, tokens, list(model.config.aux_scales.values()), base_scale)
    got = model(tokens, labels=tokens, base_scale=base_scale)
    assert_same_network(got.logits, want)
    assert_same_network(got.loss, shifted_loss(want, tokens))
    assert_same_network(got.base_loss, shifted_loss(model.base(tokens).logits, tokens))
    assert got.token_accuracy == (want[:, :-1].argmax(-1) == tokens[:, 1:]).double().mean().float()
    assert_same_network(model(tokens, base_scale=base_scale, logits_to_keep=2).logits, want[:, -2:])
    kept = torch.tensor([0, 4])
    assert_same_network(model(tokens, base_scale=base_scale, logits_to_keep=kept).logits, want[:, kept])


@pytest.mark.parametrize("base_scale", [1.0, 2.5, torch.tensor([1.0, 0.0, 3.0])], ids=str)
def test_a_shared_head_under_a_softcap_adds_what_it_adds_to_the_base_alone(base_scale, tokens):
    base = softcapped_base()
    model = tiny_ensemble(("shared", "own"), base=base, aux_scales={"a": 0.1, "b": -0.5})
    alone, other = model.members["a"], model.members["b"]
    of_row = base_scale[:, None, None] if isinstance(base_scale, torch.Tensor) else base_scale
    added = alone(tokens, aux_scale=0.1).logits - base(tokens).logits
    want = of_row * base(tokens).logits + added - 0.5 * other.aux(tokens).logits
    got = model(tokens, labels=tokens, base_scale=base_scale)
    assert_same_network(got.logits, want)
    assert_same_network(got.loss, shifted_loss(want, tokens))


@pytest.mark.parametrize(
    "scales, given",
    [
        ([1.0, -0.5], None),
        ([0.25, -0.5], {"a": 0.25}),
        ([0.0, -2.0], {"b": torch.tensor(-2.0), "a": 0}),
        ([torch.tensor([0.0, 1.0, 2.0]), -0.5], {"a": torch.tensor([0.0, 1.0, 2.0])}),
        ([0.5, 3.0], torch.tensor([0.5, 3.0])),
        ([torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-1.0, 0.5, 0.0])], "rows"),
    ],
    ids=["config", "one", "numbers", "rows of one", "tensor", "rows"],
)
def test_dials_of_a_call(scales, given, tokens):
    model = tiny_ensemble()
    given = torch.stack(scales, dim=1) if isinstance(given, str) else given
    want = eager_sum(model, tokens, scales)
    got = model(tokens, labels=tokens, aux_scale=given)
    assert_same_network(got.logits, want)
    assert_same_network(got.loss, shifted_loss(want, tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [-0.7, torch.tensor([0.0, 1.0, 2.5])], ids=str)
def test_one_member_has_the_bits_of_the_auxiliary_alone(kind, scale, tokens):
    base = tiny_base()
    alone = tiny_member(base, kind)
    model = AuxiliaryEnsembleForCausalLM.from_members(base, {"only": alone})
    outputs = []
    for one, given in ((alone, scale), (model, {"only": scale})):
        torch.manual_seed(0)  # of dropout
        outputs.append(one.train()(tokens, labels=tokens, skip_logits=False, aux_scale=given))
    want, got = outputs
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)
    assert (got.base_loss is None) == (want.base_loss is None) == (kind in ("shared", "factored"))
    gradients = []
    for output in (want, got):
        model.zero_grad()
        output.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None})
    assert gradients[0] and all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    want, got = alone.eval()(tokens, labels=tokens), model.eval()(tokens, labels=tokens)
    assert all(torch.equal(got[name], want[name]) for name in want if name != "past_key_values")


def test_tuned_and_untuned_that_are_equal_cancel_out(tokens):
    base, tuned = tiny_base(), tiny_model("gpt2", seed=3)
    members = {"tuned": tuned, "untuned": copy.deepcopy(tuned)}
    model = AuxiliaryEnsembleForCausalLM.from_members(base, members, aux_scales={"tuned": 1.0, "untuned": -1.0})
    assert_same_network(model(tokens).logits, base(tokens).logits)
    with torch.no_grad():
        model.members["tuned"].aux.lm_head.weight.mul_(1.5)
    want = base(tokens).logits + model.members["tuned"].aux(tokens).logits - members["untuned"](tokens).logits
    assert_same_network(model(tokens).logits, want)


def test_zeros_of_all_scales_are_the_base(tokens):
    model = tiny_ensemble(("shared", "own", "low_rank"))
    assert torch.equal(model(tokens, aux_scale=torch.zeros(3)).logits, model.base(tokens).logits)


def test_the_base_runs_once(tokens):
    model, calls = tiny_ensemble(("own", "trunk", "shared")), []
    model.base.model.register_forward_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens)
    assert len(calls) == 1


def test_narrower_members_leave_the_rest_out(tokens):
    base, narrow = tiny_model("llama", seed=1, vocab_size=64), tiny_model("gpt2", seed=2)
    members = {"wide": tiny_model("llama", seed=3, vocab_size=64), "narrow": narrow}
    model = AuxiliaryEnsembleForCausalLM.from_members(base, members, vocab_policy="pad")
    got = model(tokens, labels=tokens)
    want = sum(one(tokens).logits[..., :VOCAB_SIZE] for one in (base, *members.values()))
    assert_same_network(got.logits[..., :VOCAB_SIZE], want)
    assert got.logits.shape[-1] == 64 and got.logits[..., VOCAB_SIZE:].eq(-torch.inf).all()
    assert_same_network(got.loss, shifted_loss(want, tokens))


def test_a_16_bit_sum_is_not_rounded_to_16_bits(tokens):
    model = tiny_ensemble(("own", "own", "low_rank")).bfloat16()
    want = model.base(tokens).logits.float()
    for scale, member in zip((1.0, -0.5), list(model.members.values())[:2], strict=True):
        want = want + scale * member.aux(tokens).logits.float()
    got = model(tokens, aux_scale={"c": 0.0})
    assert got.logits.dtype == torch.float32
    assert_same_network(got.logits, want)


def test_hidden_states_are_the_bases(tokens):
    model = tiny_ensemble()
    want = model.base(tokens, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, model(tokens, output_hidden_states=True).hidden_states, want))
    assert model(tokens).hidden_states is None


# -- prefixes and padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_member_has_its_own_prefix(side, tokens):
    model = tiny_ensemble(("own", "trunk", "shared"))
    mask = torch.ones_like(tokens)
    mask[1, :3] = mask[2, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    text = tokens * mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    of_members = {
        "a": {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK},
        "b": {"aux_input_ids": PREFIX[:, 2:].flip(1), "aux_attention_mask": torch.ones(3, 2, dtype=torch.long)},
    }
    kwargs = {"attention_mask": mask, "position_ids": positions}
    want = eager_sum(model, text, (1.0, -0.5, 0.7), of_members=of_members, **kwargs)
    prefixes = {name: one["aux_input_ids"] for name, one in of_members.items()}
    masks = {name: one["aux_attention_mask"] for name, one in of_members.items()}
    got = model(text, aux_input_ids=prefixes, aux_attention_mask=masks, **kwargs).logits
    assert_same_network(got[mask.bool()], want[mask.bool()])
    without = model(text, **kwargs).logits
    assert not torch.allclose(got[mask.bool()], without[mask.bool()], atol=1e-2)


# -- floor -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("own",), ("shared", "own")], ids="-".join)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("base_scale", [1.0, 1.5])
def test_tokens_below_the_floor_are_impossible(kinds, alpha, base_scale, tokens):
    model = tiny_ensemble(kinds, aux_scales={"a": -0.5}, base_scale=base_scale)
    want = model(tokens)
    model.config.base_floor = alpha
    log_p = model.base(tokens).logits.double().log_softmax(-1)
    is_below = log_p < math.log(alpha) + log_p.amax(-1, keepdim=True) - (1e-12 if alpha == 1.0 else 0.0)
    got = model(tokens, labels=tokens)
    assert torch.equal(got.logits == -torch.inf, is_below)
    assert torch.equal(got.logits[~is_below], want.logits[~is_below])
    assert is_below.any() and not is_below.all(-1).any()
    assert torch.equal(model(tokens, base_floor=0).logits, want.logits)
    model.config.base_floor = None
    assert torch.equal(model(tokens, base_floor=alpha).logits, got.logits)
    assert_same_network(got.loss, shifted_loss(want.logits, tokens))


def test_contrastive_decoding(tokens):
    expert, amateur, beta, alpha = tiny_base(), tiny_model("gpt2", seed=5), 0.5, 0.1
    model = AuxiliaryEnsembleForCausalLM.from_members(
        expert, {"amateur": amateur}, aux_scales={"amateur": -beta}, base_scale=1 + beta, base_floor=alpha
    )
    log_p = expert(tokens).logits.log_softmax(-1)
    scores = (1 + beta) * expert(tokens).logits - beta * amateur(tokens).logits
    want = scores.masked_fill(log_p < math.log(alpha) + log_p.amax(-1, keepdim=True), -torch.inf)
    got = model(tokens).logits
    assert torch.equal(got.isinf(), want.isinf())
    assert_same_network(got[got.isfinite()], want[want.isfinite()])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_members_on_another_base_are_refused():
    base = tiny_base()
    with pytest.raises(ValueError, match=r"share the base as one object, members\['b'\] has another: .* base=base"):
        AuxiliaryEnsembleForCausalLM.from_members(base, {"a": tiny_member(base), "b": tiny_member(tiny_base())})


def test_one_model_twice_is_refused():
    base, aux = tiny_base(), tiny_model("gpt2")
    member = tiny_member(base)
    for one in (member, aux):
        with pytest.raises(ValueError, match="'x' and 'y' are one: give it once, with the sum of their scales"):
            AuxiliaryEnsembleForCausalLM.from_members(base, {"x": one, "y": one})
    with pytest.raises(ValueError, match="aux must be another model than base"):
        AuxiliaryEnsembleForCausalLM.from_members(base, {"x": base})


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "items", "training", 3])
def test_names_that_cannot_be_those_of_modules_and_folders_are_refused(name):
    with pytest.raises(ValueError, match="members must"):
        AuxiliaryEnsembleForCausalLM.from_members(tiny_base(), {name: tiny_model("gpt2")})


@pytest.mark.parametrize(
    "members, error, message",
    [
        ({}, ValueError, "members must hold at least one"),
        ([], TypeError, "members must be a dict"),
        ({"a": 3}, TypeError, r"members\['a'\] must be an AuxiliaryForCausalLM, a causal LM"),
        ({"a": None, "A": None}, ValueError, "differ beyond upper and lower case"),
    ],
    ids=["none", "list", "number", "case"],
)
def test_other_members_are_refused(members, error, message):
    with pytest.raises(error, match=message):
        AuxiliaryEnsembleForCausalLM.from_members(tiny_base(), members)


def test_ensembles_in_ensembles_are_refused():
    model = tiny_ensemble()
    with pytest.raises(TypeError, match="a causal LM of one piece, got AuxiliaryEnsembleForCausalLM"):
        AuxiliaryEnsembleForCausalLM.from_members(model.base, {"all": model})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"aux_scales": {"z": 1.0}}, r"aux_scales must name members \(a, b\), got 'z'"),
        ({"aux_scales": {"a": math.nan}}, r"aux_scales\['a'\] must not be NaN"),
        ({"frozen": ["z"]}, "frozen must name members"),
        ({"base_floor": -0.1}, r"base_floor must be in \[0, 1\]"),
        ({"base_floor": 1.5}, r"base_floor must be in \[0, 1\]"),
        ({"base_scale": math.nan}, "base_scale must not be NaN"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_ensemble(**options)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"aux_scale": 1.0}, TypeError, r"aux_scale must be a dict of scales by members' names \(a, b\), or a tensor"),
        ({"aux_scale": {"z": 1.0}}, ValueError, r"aux_scale must name members \(a, b\), got 'z'"),
        ({"aux_scale": {"a": "1"}}, TypeError, r"aux_scale\['a'\] must be a number or a tensor, got str"),
        ({"aux_scale": {"a": torch.ones(2)}}, ValueError, r"of shape \[\] or \[3\], got \[2\]"),
        (
            {"aux_scale": torch.ones(3)},
            ValueError,
            r"\[2\] or \[3, 2\], one for each member \(a, b\)",
        ),
        ({"aux_scale": torch.ones(1, 2)}, ValueError, r"aux_scale must be \[2\] or \[3, 2\]"),
        ({"aux_scale": torch.ones(())}, ValueError, r"aux_scale must be \[2\] or \[3, 2\]"),
        ({"base_scale": torch.ones(2)}, ValueError, r"base_scale must be a number or a tensor of shape \[\] or \[3\]"),
        ({"aux_input_ids": PREFIX}, TypeError, "aux_input_ids must be a dict of tensors by members' names"),
        ({"aux_input_ids": {"z": PREFIX}}, ValueError, "aux_input_ids must name members"),
        (
            {"aux_input_ids": {"b": PREFIX}},
            ValueError,
            "of the member 'b': aux_input_ids begin or end",
        ),
        ({"aux_attention_mask": {"b": PREFIX}}, ValueError, "of the member 'b': aux_attention_mask must come with"),
        ({"base_floor": 2.0}, ValueError, r"base_floor must be in \[0, 1\]"),
        ({"base_floor": "x"}, TypeError, "base_floor must be"),
        ({"aux_prefix": 1}, TypeError, "aux_prefix"),
        ({"num_items_in_batch": 3}, ValueError, "labels must be given where num_items_in_batch is"),
    ],
)
def test_invalid_arguments_are_refused(kwargs, error, message, tokens):
    with pytest.raises(error, match=message):
        tiny_ensemble()(tokens, **kwargs)


def test_a_configuration_alone_is_refused():
    with pytest.raises(ValueError, match="got a configuration alone: use from_members or from_pretrained"):
        AuxiliaryEnsembleForCausalLM(tiny_ensemble().config)


def test_parts_are_what_the_members_add(tokens):
    base = tiny_base()
    member = tiny_member(base)
    assert_same_network(part(member, tokens), member.aux(tokens).logits)
    assert isinstance(member, AuxiliaryForCausalLM)
