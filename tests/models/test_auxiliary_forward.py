"""What one call of `AuxiliaryForCausalLM` computes: sums, losses, statistics, prefixes, trunks."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from network import assert_same_in_16_bits, assert_same_network  # noqa: E402
from tiny import PAIRS, VOCAB_SIZE, tiny_config, tiny_model, tiny_pair  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM, PairedCache  # noqa: E402

PREFIX = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)


def shifted_loss(logits, labels, **kwargs):
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), **kwargs)


def quiet(model):
    """Training mode without dropout, so that it can be compared with eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, aux", PAIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_step_zero_is_the_base(base, aux, tied, tokens):
    model = tiny_pair(base, aux, zero_init=True, aux_options={"tie_word_embeddings": tied})
    assert torch.equal(model(tokens).logits, model.base(tokens).logits)
    assert model.aux.get_input_embeddings().weight.abs().max() > 0


def test_joining_leaves_replaced_layers_as_they_are():
    base, aux = tiny_model("llama"), tiny_model("llama", seed=1)
    for model in (base, aux):
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 32, bias=False)
    weights = [model.model.layers[0].mlp.up_proj.weight.clone() for model in (base, aux)]
    AuxiliaryForCausalLM.from_base_and_aux(base, aux)
    for model, weight in zip((base, aux), weights, strict=True):
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


@pytest.mark.parametrize("capped", ["base", "aux"])
def test_softcapped_heads_and_sliding_windows(capped, tokens):
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    options = {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    config = transformers.Gemma2Config(vocab_size=VOCAB_SIZE, hidden_size=16, pad_token_id=0, **sizes, **options)
    torch.manual_seed(0)
    models = [transformers.Gemma2ForCausalLM(config).eval(), tiny_model("llama")]
    for parameter in models[0].parameters():
        parameter.data.mul_(5.0 if parameter.dim() > 1 else 1.0)
    base, aux = models if capped == "base" else models[::-1]
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False)
    want = base(tokens).logits + aux(tokens).logits
    output = model(tokens, labels=tokens)
    assert_same_network(output.logits, want)
    assert_same_network(output.loss, shifted_loss(want, tokens))
    generated = [model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*generated)


def test_logits_are_the_sum(pair, tokens):
    assert_same_network(pair(tokens).logits, pair.base(tokens).logits + pair.aux(tokens).logits)


@pytest.mark.parametrize("scale", [0.0, -1.5, torch.tensor(0.5), torch.tensor([0.0, 1.0, 2.5])], ids=str)
def test_aux_scale_multiplies_the_auxiliarys_logits(pair, tokens, scale):
    of_row = scale[:, None, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale
    want = pair.base(tokens).logits + of_row * pair.aux(tokens).logits
    got = pair(tokens, labels=tokens, aux_scale=scale)
    assert_same_network(got.logits, want)
    assert_same_network(got.loss, shifted_loss(want, tokens))
    assert_same_network(pair(tokens, aux_scale=scale, logits_to_keep=2).logits, want[:, -2:])


def test_configured_aux_scale_is_the_default(tokens):
    model = tiny_pair(aux_scale=0.25)
    assert_same_network(model(tokens).logits, model(tokens, aux_scale=0.25).logits)
    assert not torch.allclose(model(tokens).logits, model(tokens, aux_scale=1.0).logits)


def test_logits_to_keep(pair, tokens):
    want = pair(tokens).logits
    assert_same_network(pair(tokens, logits_to_keep=1).logits, want[:, -1:])
    assert_same_network(pair(tokens, logits_to_keep=torch.tensor([0, 4])).logits, want[:, [0, 4]])
    assert pair(tokens, logits_to_keep=1, labels=tokens).loss == pair(tokens, labels=tokens).loss


def test_sum_of_16_bit_models_is_not_rounded_to_16_bits(tokens):
    model = tiny_pair().bfloat16()
    want = model.base(tokens).logits.float() + model.aux(tokens).logits.float()
    assert model(tokens).logits.dtype == torch.float32
    assert_same_network(model(tokens).logits, want)


def test_tuple_output(tokens):
    model = tiny_pair()
    loss, logits, *_ = model(tokens, labels=tokens, return_dict=False)
    want = model(tokens, labels=tokens)
    assert torch.equal(loss, want.loss) and torch.equal(logits, want.logits)


def test_hidden_states_are_the_bases(tokens):
    model = tiny_pair()
    want = model.base(tokens, output_hidden_states=True).hidden_states
    got = model(tokens, output_hidden_states=True).hidden_states
    assert len(got) == len(want) and all(map(torch.equal, got, want))
    assert model(tokens).hidden_states is None


# -- loss and statistics -----------------------------------------------------------------------------------------------


def test_training_loss_and_gradient_are_those_of_the_summed_logits(pair, tokens):
    labels = tokens.clone()
    labels[0, :5] = -100
    quiet(pair)
    output = pair(tokens, labels=labels)
    assert output.logits is None
    output.loss.backward()
    got = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
    pair.zero_grad()
    want = cross_entropy(
        (pair.base(tokens).logits.detach() + pair.aux(tokens).logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    want.backward()
    assert_same_network(output.loss, want)
    wanted = {name: p.grad for name, p in pair.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and all(name.startswith("aux.") for name in got)
    for name in got:
        assert_same_network(got[name], wanted[name])


def test_shift_labels_are_taken_as_they_are(tokens):
    model = tiny_pair()
    shifted = torch.cat([tokens[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert model(tokens, shift_labels=shifted).loss == model(tokens, labels=tokens).loss


def test_num_items_in_batch_divides_the_sum(tokens):
    model = tiny_pair()
    mean = model(tokens, labels=tokens)
    for count in (48, torch.tensor(48)):
        output = model(tokens, labels=tokens, num_items_in_batch=count)
        assert_same_network(output.loss, mean.loss * 24 / 48)
        assert_same_network(output.base_loss, mean.base_loss * 24 / 48)


def test_statistics(pair, tokens):
    labels = tokens.clone()
    labels[:, 3] = -100
    output = pair(tokens, labels=labels)
    rows, classes = pair(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    rows, base = rows[classes >= 0].double(), pair.base(tokens).logits[:, :-1].flatten(0, 1)[classes >= 0].double()
    classes = classes[classes >= 0]
    entropy = torch.distributions.Categorical(logits=rows).entropy()
    correct = (rows.argmax(-1) == classes).sum()
    assert output.num_valid_tokens == len(classes) == 21 and output.num_correct_tokens == correct
    assert_same_network(output.token_accuracy, correct / 21)
    assert_same_network(output.entropy, entropy.mean())
    assert_same_network(output.entropy_sum, entropy.sum())
    assert_same_network(output.base_loss, cross_entropy(base, classes))


def test_skip_logits_defaults_to_training_with_labels(tokens):
    model = tiny_pair()
    assert model(tokens, labels=tokens).logits is not None
    assert model(tokens, labels=tokens, skip_logits=True).logits is None
    model.train()
    assert model(tokens).logits is not None
    assert model(tokens, labels=tokens).logits is None
    assert model(tokens, labels=tokens, skip_logits=False).logits is not None


def test_label_smoothing_is_of_the_training_loss_alone(tokens):
    model = quiet(tiny_pair())
    model.config.label_smoothing = 0.1
    want = shifted_loss(model(tokens).logits, tokens, label_smoothing=0.1)
    assert_same_network(model(tokens, labels=tokens).loss, want)
    want = shifted_loss(model(tokens).logits, tokens)
    assert_same_network(model.eval()(tokens, labels=tokens).loss, want)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest floating tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return result


def test_training_makes_no_tensor_of_all_logits():
    from auxkernels import chunk_settings

    vocab_size, rows = 256, 3072
    base = tiny_model("llama", vocab_size=vocab_size, width=8)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("llama", vocab_size=vocab_size, width=8)).train()
    tokens = torch.randint(2, vocab_size, (rows // 32, 32))
    budget, chunk_settings.num_bytes = chunk_settings.num_bytes, 1
    try:
        with LargestTensor() as training:
            model(tokens, labels=tokens).loss.backward()
        with LargestTensor() as evaluation:
            model(tokens)
    finally:
        chunk_settings.num_bytes = budget
    assert training.largest < rows * vocab_size // 2
    assert evaluation.largest >= rows * vocab_size  # that such a tensor would be seen


# -- prefix ------------------------------------------------------------------------------------------------------------


def test_prefix_is_read_by_the_auxiliary_alone_and_bears_no_loss(pair, tokens):
    joined = torch.cat([PREFIX, tokens], dim=1)
    want = pair.base(tokens).logits + pair.aux(joined).logits[:, 4:]
    output = pair(tokens, labels=tokens, aux_input_ids=PREFIX)
    assert_same_network(output.logits, want)
    assert_same_network(output.loss, shifted_loss(want, tokens))
    assert not torch.allclose(output.logits, pair(tokens).logits, atol=1e-2)


def test_all_padding_and_masks_of_other_types_are_taken(tokens):
    model = tiny_pair()
    mask = torch.tensor([[0, 0, 1, 1]]).expand(3, 4)
    want = model(tokens, aux_input_ids=PREFIX, aux_attention_mask=mask).logits
    assert_same_network(model(tokens, aux_input_ids=PREFIX, aux_attention_mask=mask.bool()).logits, want)
    text = torch.ones_like(tokens)
    got = model(tokens, attention_mask=text, aux_input_ids=PREFIX, aux_attention_mask=mask.bool()).logits
    assert_same_network(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("trunk_layer", [None, 1])
def test_padded_prefixes_equal_the_rows_alone(side, trunk_layer, tokens):
    model = tiny_pair("gpt2", "gpt2", trunk_layer=trunk_layer)
    lengths = [4, 2, 0]
    prefix, mask = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = slice(4 - length, 4) if side == "left" else slice(0, length)
        prefix[row, columns], mask[row, columns] = PREFIX[row, :length], 1
    got = model(tokens, aux_input_ids=prefix, aux_attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = {"aux_input_ids": PREFIX[row : row + 1, :length]} if length else {}
        assert_same_network(got[row : row + 1], model(tokens[row : row + 1], **alone).logits)


@pytest.mark.parametrize("base, aux", PAIRS)
def test_padded_texts_behind_prefixes_equal_the_rows_alone(base, aux, tokens):
    model = tiny_pair(base, aux)
    text, mask = tokens.clone(), torch.ones_like(tokens)
    text[1, :3], mask[1, :3] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(text, attention_mask=mask, position_ids=positions, aux_input_ids=PREFIX).logits
    want = model(tokens[1:2, 3:], aux_input_ids=PREFIX[:1]).logits
    assert_same_network(got[1:2, 3:], want)


@pytest.mark.parametrize("use_cache", [False, True])
def test_prefix_positions_do_not_depend_on_how_the_text_is_split(pair, tokens, use_cache):
    want = pair(tokens, aux_input_ids=PREFIX, use_cache=False).logits
    cache = pair(tokens[:, :4], aux_input_ids=PREFIX, use_cache=True).past_key_values
    assert isinstance(cache, PairedCache) and cache.get_seq_length() == 4 and cache.prefix_length == 4
    assert cache.aux.get_seq_length() == 8
    assert_same_network(pair(tokens[:, 4:], past_key_values=cache).logits, want[:, 4:])


def test_prefix_gets_no_loss_but_passes_a_gradient(tokens):
    model = tiny_pair()
    model(tokens, labels=tokens, aux_input_ids=torch.full((3, 1), 60)).loss.backward()
    used = model.aux.get_input_embeddings().weight.grad.abs().sum(-1) > 0
    assert used[60]


# -- trunk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, aux", PAIRS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_trunk_feeds_the_bases_hidden_states_to_the_auxiliary(base, aux, layer, tokens):
    model = tiny_pair(base, aux, trunk_layer=layer)
    states = model.base(tokens, output_hidden_states=True).hidden_states[layer]
    want = model.base(tokens).logits + model.aux(inputs_embeds=model.trunk_projection(states)).logits
    assert_same_network(model(tokens).logits, want)


def test_prefix_runs_through_the_trunk_on_its_own(tokens):
    model = tiny_pair(trunk_layer=1)
    states = [model.base(ids, output_hidden_states=True).hidden_states[1] for ids in (PREFIX, tokens)]
    embeds = model.trunk_projection(torch.cat(states, dim=1))
    want = model.base(tokens).logits + model.aux(inputs_embeds=embeds).logits[:, 4:]
    assert_same_network(model(tokens, aux_input_ids=PREFIX).logits, want)


def test_trunk_trains_the_projection_and_not_the_unread_embeddings(tokens):
    model = tiny_pair(trunk_layer=1, aux_options={"tie_word_embeddings": False})
    model.train()(tokens, labels=tokens).loss.backward()
    assert model.trunk_projection.weight.grad.abs().max() > 0
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    tied = tiny_pair(trunk_layer=1, aux_options={"tie_word_embeddings": True})
    assert tied.aux.get_output_embeddings().weight.requires_grad


# -- vocabularies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_width, aux_width", [(64, 61), (61, 64)])
def test_padded_vocabularies_count_what_both_have(base_width, aux_width, tokens):
    base, aux = tiny_model("llama", vocab_size=base_width), tiny_model("gpt2", vocab_size=aux_width)
    with pytest.raises(ValueError, match=f"equally wide heads .* got {base_width} and {aux_width}"):
        AuxiliaryForCausalLM.from_base_and_aux(base, aux)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False, vocab_policy="pad")
    want = base(tokens).logits[..., :61] + aux(tokens).logits[..., :61]
    output = model(tokens, labels=tokens)
    assert output.logits.shape[-1] == base_width == model.config.get_text_config().vocab_size
    assert_same_network(output.logits[..., :61], want)
    assert (output.logits[..., 61:] == -torch.inf).all()
    assert_same_network(output.loss, shifted_loss(want, tokens))
    assert model.generate(tokens, num_beams=3, max_new_tokens=4).max() < 61


@pytest.mark.parametrize("options", [{}, {"trunk_layer": 1}], ids=["tokens", "trunk"])
def test_base_and_auxiliary_may_differ_in_dtype(options, tokens):
    model = quiet(tiny_pair(**options))
    exact = copy.deepcopy(model)
    model.base.bfloat16()
    output = model(tokens, labels=tokens, skip_logits=False)
    output.loss.backward()
    assert_same_in_16_bits(output.loss, lambda m: m(tokens, labels=tokens).loss, exact, "base")
    assert output.logits.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_inference_mode_gives_loss_and_logits(tokens):
    model = tiny_pair()
    want = model(tokens, labels=tokens)
    with torch.inference_mode():
        got = model(tokens, labels=tokens)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_named(tokens):
    model = tiny_pair()
    cases = [
        ({"aux_attention_mask": torch.ones(3, 4)}, "aux_attention_mask must come with aux_input_ids"),
        ({"aux_input_ids": PREFIX[:2]}, r"aux_input_ids must be \[3, prefix\], got \[2, 4\]"),
        ({"aux_input_ids": PREFIX, "aux_attention_mask": torch.ones(3, 5)}, r"aux_attention_mask must be \[3, 4\]"),
        ({"aux_input_ids": PREFIX * 0}, "padding token 0: pass aux_attention_mask"),
        ({"aux_input_ids": PREFIX, "attention_mask": torch.ones(3, 1, 9, 9)}, r"attention_mask must be \[batch"),
        ({"aux_input_ids": PREFIX, "position_ids": torch.arange(9)[None] % 5, "use_cache": False}, "packed texts"),
        ({"aux_scale": torch.ones(2)}, r"aux_scale must be a number or a tensor of shape \[\] or \[3\], got \[2\]"),
        ({"labels": tokens[:, :5]}, r"labels must be \[3, 9\], as the tokens, got \[3, 5\]"),
        ({"inputs_embeds": torch.ones(3, 9, 16)}, "input_ids must be given"),
        ({"output_attentions": True}, "output_attentions must be False"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            model(tokens, **kwargs)
    for scale in ("1", True, [1.0]):
        with pytest.raises(TypeError, match="aux_scale must be a number or a tensor, got"):
            model(tokens, aux_scale=scale)
    with pytest.raises(TypeError, match=r"past_key_values must be a PairedCache .* got DynamicCache"):
        model(tokens, past_key_values=transformers.DynamicCache())
    cache = model(tokens, aux_input_ids=PREFIX).past_key_values
    with pytest.raises(ValueError, match="begun with, of 4 tokens, got 3"):
        model(tokens, aux_input_ids=PREFIX[:, :3], past_key_values=cache)


def test_wrong_models_are_named():
    base = tiny_model("llama")
    t5 = transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    cases = [
        ((base, base), {}, ValueError, "aux must be another model than base"),
        ((base, tiny_config("gpt2")), {"trunk_layer": 3}, ValueError, r"trunk_layer must be in \[-3, 2\].* got 3"),
        ((base, tiny_config("gpt2")), {"trunk_layer": -4}, ValueError, "got -4"),
        ((base, t5), {}, ValueError, "aux must be decoder-only, got the encoder-decoder t5"),
        ((transformers.T5ForConditionalGeneration(t5), base), {}, ValueError, "base must be decoder-only"),
        ((base.model, tiny_config("gpt2")), {}, TypeError, "base must be a causal LM .* got LlamaModel"),
        ((base, 3), {}, TypeError, "aux must be a PreTrainedModel or a name, or a configuration, got int"),
        ((base.config, tiny_config("gpt2")), {}, TypeError, "base must be a PreTrainedModel or a name, got Llama"),
        ((base, tiny_config("gpt2")), {"vocab_policy": "guess"}, ValueError, "vocab_policy must be one of strict, pad"),
        ((base, tiny_config("gpt2")), {"aux_scale": torch.ones(2)}, TypeError, "aux_scale must be a number"),
        ((base, tiny_config("gpt2")), {"base_kwargs": {"dtype": "auto"}}, ValueError, "base_kwargs must be empty"),
    ]
    for models, kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            AuxiliaryForCausalLM.from_base_and_aux(*models, **kwargs)
    with pytest.raises(ValueError, match="never make a base of random weights"):
        transformers.AutoModelForCausalLM.from_config(tiny_pair().config)
