"""Where in a layer labels are added: its input, that of its attention's output projection, that of its feed-forward."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from planner_models import (
    NUM_LAYERS,
    SEGMENT_IDS,
    VOCAB,
    TinyPlanner,
    label_weights,
    scores,
    tiny_lm,
    tiny_model,
    tokens,
)
from torch.nn.functional import cross_entropy, gelu, layer_norm
from transformers import AutoConfig, AutoModelForCausalLM

from auxkernels.models import planner_checkpointing
from auxkernels.models.conditioning import decoder_layers, predicted_segments
from auxkernels.models.places import modules_at, width_at
from auxkernels.models.planner import PlannerForCausalLM

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# of each family: its own options, and the names in a layer of the two modules
FAMILIES = {
    "gpt2": ({"n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 2}, "attn.c_proj", "mlp"),
    "llama": ({"intermediate_size": 24, "num_key_value_heads": 1}, "self_attn.o_proj", "mlp"),
    # heads that are wider than the hidden states together
    "qwen3": ({"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 12}, "self_attn.o_proj", "mlp"),
    "gpt_neox": ({"intermediate_size": 24}, "attention.dense", "mlp"),  # both parts in parallel
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}, "self_attn.out_proj", "fc1"),  # no part
    "bloom": ({"n_layer": NUM_LAYERS, "n_head": 2}, "self_attention.dense", "mlp"),
    "falcon": ({"new_decoder_architecture": False, "multi_query": True}, "self_attention.dense", "mlp"),
    "cpmant": ({"dim_head": 8, "dim_ff": 24}, "self_att.self_attention.attention_out", "ffn.ffn"),
    "bert": ({"intermediate_size": 24, "is_decoder": True}, "attention.output.dense", "intermediate"),
    "mixtral": ({"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 2}, "self_attn.o_proj", "mlp"),
}
# of these a head is refused, or experts are not computed in double precision
NOT_CHECKED = ("cpmant", "bert", "mixtral")
PLACES = ("attention_output", "feed_forward_input")
CHECKED = [(family, place) for family in FAMILIES if family not in NOT_CHECKED for place in PLACES]


def lm_of(family: str, dtype=torch.float32, **options):
    own = FAMILIES[family][0] if family in FAMILIES else {}
    config = AutoConfig.for_model(family, **{**SIZES, **own, **options})
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(4.0) if weight.dim() == 2 else None
    return lm.eval()


class Added(torch.nn.Module):
    """A module behind an addition to its input."""

    def __init__(self, module, added):
        super().__init__()
        self.module, self.added = module, added

    def forward(self, hidden, *args):
        return self.module(hidden + self.added.reshape(hidden.shape), *args)


def by_hand(model, family, place, input_ids, weights):
    """Logits of a copy of the language model in which modules, by their names, are replaced by ones that add."""
    lm, table = copy.deepcopy(model.lm), model.conditioning
    segments = predicted_segments(SEGMENT_IDS)
    rows = torch.einsum("lhe,lse->lsh", table.weight, weights @ table.codebooks) + table.bias.unsqueeze(1)
    name = FAMILIES[family][1 + PLACES.index(place)]
    for n, i in enumerate(model.config.layers):
        added = torch.where(segments.unsqueeze(-1) < 0, 0.0, rows[n][segments.clamp(min=0)])
        layer = decoder_layers(lm)[i]
        layer.set_submodule(name, Added(layer.get_submodule(name), added))
    return lm(input_ids).logits


@pytest.mark.parametrize(("family", "place"), CHECKED)
def test_labels_are_added_in_front_of_the_named_modules(family, place):
    model, ids = tiny_model(lm=lm_of(family, torch.float64), place=place, temperature=0.7), tokens()
    given = scores(dtype=torch.float64).requires_grad_()
    inputs = [given, *model.conditioning.parameters()]
    out = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids)
    want = by_hand(model, family, place, ids, label_weights("soft", given, 0.7))
    torch.testing.assert_close(out.logits, want, rtol=1e-10, atol=1e-10)
    want_loss = cross_entropy(want[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    got = torch.autograd.grad(out.loss, inputs)
    for a, b in zip(got, torch.autograd.grad(want_loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        assert b.abs().max() > 1e-6
    assert (want - model.lm(ids).logits).abs().max() > 1e-3


def test_the_attentions_output_is_what_the_papers_equations_say_in_gpt2():
    """One GPT-2 layer in torch's own functions: heads are merged, the label is added, then comes the projection."""
    lm = tiny_lm("gpt2", torch.float64)
    model, ids, given = tiny_model(lm=lm, place="attention_output", layers=[3]), tokens(), scores(dtype=torch.float64)
    before = lm(ids, output_hidden_states=True).hidden_states[3]
    layer, table = lm.transformer.h[3], model.conditioning
    embedding = torch.softmax(given, -1) @ table.codebooks[0] @ table.weight[0].T + table.bias[0]
    segments = predicted_segments(SEGMENT_IDS)
    added = embedding[segments.clamp(min=0)] * (segments >= 0).unsqueeze(-1)
    norm = lambda x, one: layer_norm(x, (16,), one.weight, one.bias, one.eps)  # noqa: E731
    q, k, v = (
        t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.attn.c_attn(norm(before, layer.ln_1)).split(16, -1)
    )
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    merged = heads.transpose(1, 2).flatten(-2) + added
    hidden = before + merged @ layer.attn.c_proj.weight + layer.attn.c_proj.bias
    inner = gelu(norm(hidden, layer.ln_2) @ layer.mlp.c_fc.weight + layer.mlp.c_fc.bias, approximate="tanh")
    hidden = hidden + inner @ layer.mlp.c_proj.weight + layer.mlp.c_proj.bias
    want = norm(hidden, lm.transformer.ln_f) @ lm.lm_head.weight.T
    got = model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_each_family_has_its_modules(family, place):
    lm = lm_of(family)
    layers, name = decoder_layers(lm), FAMILIES[family][1 + PLACES.index(place)]
    assert modules_at(place, lm, layers, [0, 3]) == [[layers[i].get_submodule(name)] for i in (0, 3)]


def test_the_default_is_the_layers_input():
    lm, ids, given = tiny_lm("llama"), tokens(), scores()
    model = tiny_model(lm=lm)
    assert model.config.place == "layer_input"
    other = tiny_model(lm=lm, place="layer_input")
    other.load_state_dict(model.state_dict())
    one, two = (m(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits for m in (model, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "opt"])
def test_greedy_generation_with_a_cache_equals_that_without(family, place):
    model, prompt = tiny_model(lm=lm_of(family), place=place), tokens(2, 5)
    table = scores(VOCAB)
    options = {"planner_fn": lambda ids, mask: table[ids[:, -1]], "is_segment_end": range(3, 30), "max_new_tokens": 8}
    cached = model.generate(prompt, do_sample=False, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, do_sample=False, use_cache=False, **options))
    assert not torch.equal(cached, model.lm.generate(prompt, do_sample=False, max_new_tokens=8))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpoints_forward", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_gradient_checkpointing_changes_no_gradient(family, place, checkpoints_forward, monkeypatch):
    ids, given = tokens(), scores()
    if checkpoints_forward:  # as older versions do: hooks of modules inside run again all the same
        monkeypatch.setattr(planner_checkpointing, "HOOKS_RUN_AGAIN", False)

    def gradients(model):
        leaf = given.clone().requires_grad_()
        loss = model(ids, segment_ids=SEGMENT_IDS, label_scores=leaf, labels=ids).loss
        model(ids, segment_ids=SEGMENT_IDS, label_scores=-given, labels=ids)  # its rows are not the first call's
        return torch.autograd.grad(loss, [leaf, *model.conditioning.parameters()])

    model = tiny_model(lm=lm_of(family), place=place).train()
    want = gradients(model)
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_forward_and_gradient_equal_eager(family, place):
    model, ids = tiny_model(lm=lm_of(family), place=place).train(), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (scores(), scores()):
        results = []
        for call in (compiled, model):
            leaf = given.clone().requires_grad_()
            loss = call(ids, segment_ids=SEGMENT_IDS, label_scores=leaf, labels=ids).loss
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("place", PLACES)
def test_a_language_model_compiled_on_its_own_is_conditioned(place):
    model, ids, given = tiny_model(place=place), tokens(), scores()
    want = copy.deepcopy(model)(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits
    model.lm.model.forward = torch.compile(model.lm.model.forward, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_place_is_saved_and_loaded(family, place, tmp_path):
    model, ids, given = tiny_model(lm=lm_of(family), place=place), tokens(), scores()
    model.save_pretrained(tmp_path)
    loaded = PlannerForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner()).eval()
    assert loaded.config.place == place
    one, two = (m(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits for m in (model, loaded))
    assert torch.equal(one, two)


def test_unknown_places_are_refused():
    with pytest.raises(ValueError, match="place must be one of layer_input, attention_output, feed_forward_input"):
        tiny_model(place="attention")


@pytest.mark.parametrize("place", PLACES)
def test_families_without_such_modules_are_refused_by_name(place):
    lm = lm_of("mamba", state_size=4, expand=1, time_step_rank=2)
    with pytest.raises(ValueError, match=r"layers \[2, 3\] \(MambaBlock\) of MambaForCausalLM have not"):
        tiny_model(lm=lm, place=place)


def test_layers_without_attention_are_refused_and_others_served():
    options = {"layer_types": ["conv", "full_attention"] * 2, "intermediate_size": 24, "num_key_value_heads": 1}
    lm = lm_of("lfm2", block_auto_adjust_ff_dim=False, **options)
    with pytest.raises(ValueError, match=r"layers \[2\] .*Lfm2ForCausalLM"):
        tiny_model(lm=lm, place="attention_output")
    model, ids, given = tiny_model(lm=lm, place="attention_output", layers=[1, 3]), tokens(), scores()
    got = model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits
    assert (got - lm(ids).logits).abs().max() > 1e-3


def test_layers_of_unequal_attention_widths_are_refused():
    lm = lm_of("llama")
    lm.model.layers[2].self_attn.o_proj = torch.nn.Linear(24, 16)
    found = modules_at("attention_output", lm, decoder_layers(lm), [2, 3])
    with pytest.raises(ValueError, match=r"one attention width, LlamaForCausalLM has \{2: 24, 3: 16\}"):
        width_at("attention_output", lm, found, [2, 3])


def test_a_module_shared_by_layers_is_refused():
    lm = lm_of("llama")
    lm.model.layers[0].mlp = lm.model.layers[3].mlp
    with pytest.raises(ValueError, match=r"one feed-forward part of its own, which layers \[3\]"):
        tiny_model(lm=lm, place="feed_forward_input")


def test_a_projection_that_is_passed_by_is_no_silent_loss_of_the_labels():
    model, ids, given = tiny_model(lm=lm_of("bloom"), place="attention_output"), tokens(), scores()
    for layer in decoder_layers(model.lm):  # slices of the weight are multiplied, the module is not called
        layer.self_attention.pretraining_tp, layer.self_attention.slow_but_exact = 2, True
    with pytest.raises(RuntimeError, match=r"BloomForCausalLM .*place='attention_output' .*layers \[2, 3\]"):
        model(ids, segment_ids=SEGMENT_IDS, label_scores=given)
