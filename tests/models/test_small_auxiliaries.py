"""Auxiliaries without vocabulary matrices: shared and low-rank heads, configurations derived from the base."""

import os

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from network import assert_same_network  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny import ARCHITECTURES, VOCAB_SIZE, tiny_config, tiny_model  # noqa: E402

from auxkernels.heads import products as product_module  # noqa: E402
from auxkernels.models import AuxiliaryForCausalLM  # noqa: E402
from auxkernels.models.small import small_config  # noqa: E402

HEADS = {
    "shared": {"head": "shared"},
    "shared, low rank": {"head": "shared", "head_rank": 3},
    "shared, own embeddings": {"head": "shared", "aux": "model"},
    "low rank": {"head": "low_rank", "head_rank": 3},
    "low rank, trunk": {"head": "low_rank", "head_rank": 3, "trunk_layer": 1},
    "own": {"head": "own"},
    "own, trunk": {"head": "own", "trunk_layer": 1},
}
NEW = [name for name in HEADS if not name.startswith("own")]


def gemma(**options):
    """A tiny base with a softcap, which bends logits of this size."""
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_SIZE, num_key_value_heads=2, pad_token_id=0, final_logit_softcapping=3.0, **sizes, **options
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return model.eval()


def phi():
    """A tiny base whose head has a bias."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=VOCAB_SIZE, pad_token_id=0, **sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    return model.eval()


def granite():
    """A tiny base whose head is scaled."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.GraniteConfig(
        vocab_size=VOCAB_SIZE, num_key_value_heads=1, logits_scaling=0.25, pad_token_id=0, **sizes
    )
    return transformers.GraniteForCausalLM(config).eval()


BASES = {
    "llama": lambda: tiny_model("llama", seed=1, width=24),
    "tied gpt2": lambda: tiny_model("gpt2", seed=1, width=24),
    "softcap": gemma,
    "bias": phi,
    "scale": granite,
}


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def joined(name="shared", base="llama", *, moved=True, **options):
    """In eval mode; moved: with a head that is not zero any more."""
    given = {**HEADS[name], **options}
    aux = given.pop("aux", None) or tiny_config("gpt2", **NO_DROPOUT)
    aux = tiny_model("gpt2", seed=2, **NO_DROPOUT) if isinstance(aux, str) and aux == "model" else aux
    base = BASES[base]() if isinstance(base, str) and base in BASES else base
    torch.manual_seed(6)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, **given).eval()
    if moved:
        with torch.no_grad():
            head = getattr(model, "aux_head", None) or model.aux.get_output_embeddings()
            for weight in head.parameters():
                weight.normal_(std=0.3)
    return model


def by_hand(model, tokens, scale=1.0, dtype=torch.float64):
    """Summed logits [*, V] in float64 from the two models' last hidden states, as a user would write it."""
    with torch.no_grad():
        outputs = model.base.base_model(tokens, output_hidden_states=True)
        states = {"input_ids": tokens}
        if model.config.trunk_layer is not None:
            states = {"inputs_embeds": model.trunk_projection(outputs.hidden_states[model.config.trunk_layer])}
        h_aux = model.aux.base_model(**states).last_hidden_state.to(dtype)
        h_base, head = outputs.last_hidden_state.to(dtype), model.base.get_output_embeddings()
        weights = [weight.to(dtype) for weight in model.aux_head.parameters()]
        for weight in weights:
            h_aux = h_aux @ weight.T
        config = model.base.config
        is_shared = model.config.head == "shared"
        h = h_base + scale * h_aux if is_shared else h_base
        z = F.linear(h, head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
        z = z / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        z = z if cap is None else cap * torch.tanh(z / cap)
        return z if is_shared else z + scale * h_aux


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NEW)
def test_logits_and_loss_are_those_of_the_formula(name, base, tokens):
    model = joined(name, base)
    for scale in (1.0, -0.5):
        want = by_hand(model, tokens, scale)
        assert_same_network(model(tokens, aux_scale=scale).logits, want)
        target = tokens[:, 1:].flatten()
        loss = F.cross_entropy(want[:, :-1].flatten(0, 1), target)
        for mode in (True, False):
            assert_same_network(model.train(mode)(tokens, labels=tokens, aux_scale=scale).loss, loss)
    output, alone = model.eval()(tokens, labels=tokens), model.base(tokens).logits[:, :-1].flatten(0, 1)
    assert_same_network(output.base_loss, F.cross_entropy(alone, target))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NEW)
def test_the_untrained_model_is_the_base_and_learns(name, base, tokens):
    model = joined(name, base, moved=False)
    assert torch.equal(model(tokens).logits, model.base(tokens).logits.float())
    before = {key: value.clone() for key, value in model.base.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-2), []
    model.train()
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(weight.grad is not None and weight.grad.any() for weight in trained if weight.dim() > 1)
    assert all(torch.equal(value, before[key]) for key, value in model.base.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.base.parameters())


@pytest.mark.parametrize("name", ["shared", "shared, own embeddings", "low rank"])
def test_gradients_are_those_of_the_formula(name, tokens):
    model = joined(name, "softcap").train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad and p.numel()}
    got = torch.autograd.grad(model(tokens, labels=tokens, aux_scale=0.7).loss, list(trained.values()))
    model.eval()  # with logits, which plain torch differentiates
    logits = model(tokens, aux_scale=0.7).logits[:, :-1].flatten(0, 1)
    want = torch.autograd.grad(F.cross_entropy(logits, tokens[:, 1:].flatten()), list(trained.values()))
    assert_same_network(dict(zip(trained, got, strict=True)), dict(zip(trained, want, strict=True)))


@pytest.mark.parametrize("name", NEW)
def test_each_text_has_its_scale_and_its_prefix(name, tokens):
    model = joined(name)
    scale, prefix = torch.tensor([0.0, 1.0, -0.5]), torch.tensor([[7, 9, 11]]).expand(3, 3)
    together = model(tokens, aux_scale=scale, aux_input_ids=prefix, labels=tokens, skip_logits=False)
    assert_same_network(together.logits[0], model.base(tokens[:1]).logits[0])
    for i, one in enumerate(scale.tolist()):
        row = model(tokens[i : i + 1], aux_scale=one, aux_input_ids=prefix[:1])
        assert_same_network(together.logits[i], row.logits[0])
    logits = together.logits[:, :-1].flatten(0, 1)
    assert_same_network(together.loss, F.cross_entropy(logits, tokens[:, 1:].flatten()))


@pytest.mark.parametrize("name", HEADS)
def test_generation_with_a_cache_is_greedy_search_without_one(name, tokens):
    model = joined(name)
    got = model.generate(tokens, max_new_tokens=6, do_sample=False, aux_scale=0.8)
    want = tokens
    for _ in range(got.shape[1] - tokens.shape[1]):
        want = torch.cat([want, model(want, aux_scale=0.8).logits[:, -1:].argmax(-1)], dim=1)
    ended = (got == 1).cumsum(-1) > 0  # behind the end of a text there is padding
    assert torch.equal(got.masked_fill(ended, 1), want.masked_fill(ended, 1))
    beams = model.generate(tokens, max_new_tokens=3, num_beams=2, aux_scale=torch.tensor([0.5, 1.0, 0.0]))
    assert beams.shape[0] == 3


@pytest.mark.parametrize("name", ["shared", "low rank, trunk", "low rank"])
def test_padded_vocabularies(name, tokens):
    """The narrower vocabulary counts where the auxiliary has one: its embeddings, or its head."""
    config = tiny_config("gpt2", vocab_size=VOCAB_SIZE - 4)
    if name == "low rank":
        with pytest.raises(ValueError, match="vocab_policy"):
            joined(name, aux=config)
        model = joined(name, aux=config, vocab_policy="pad")
        assert model.config.num_valid_tokens == VOCAB_SIZE - 4
        assert torch.equal(model(tokens % 50).logits[..., -4:], torch.full((3, 9, 4), -torch.inf))
    else:
        model = joined(name, aux=config)
        assert model.config.num_valid_tokens == VOCAB_SIZE and model(tokens).logits.isfinite().all()


def test_a_sum_in_bfloat16_is_that_of_the_base_s_head(tokens):
    """lm_head(h_base + delta), as a user of bfloat16 would have it: the sum rounded once."""
    model = joined("shared", BASES["llama"]().to(torch.bfloat16))
    base, h = model.base, {}
    with torch.no_grad():
        outputs = base.base_model(tokens, output_hidden_states=True)
        h_aux = model.aux.base_model(inputs_embeds=model.trunk_projection(outputs.hidden_states[0].float()))
        delta = model.aux_head(h_aux.last_hidden_state)
        h = (outputs.last_hidden_state.float() + delta).to(torch.bfloat16)
        want = base.lm_head(h).float()
    got = model(tokens, labels=tokens)
    assert torch.equal(got.logits, want)
    exact = F.cross_entropy(
        (h.double() @ base.lm_head.weight.double().T)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    eager = F.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(got.loss - exact) <= abs(eager - exact) + 2.0**-9 * exact


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_training_with_a_shared_head_costs_one_product_with_the_vocabulary(tokens, monkeypatch):
    made, plain = [], product_module.multiply

    def spy(a, b, out, *args, **kwargs):
        made.append(tuple(out.shape))
        return plain(a, b, out, *args, **kwargs)

    monkeypatch.setattr(product_module, "multiply", spy)
    model = joined("shared").train()
    output = model(tokens, labels=tokens)
    output.loss.backward()
    rows = (tokens.shape[1] - 1) * 3
    assert sorted(made) == sorted([(rows, VOCAB_SIZE), (rows, 24)]) and output.base_loss is None
    made.clear()
    with torch.no_grad():
        assert model.eval()(tokens, labels=tokens, skip_logits=True).base_loss is not None
    assert made == [(rows, VOCAB_SIZE)] * 2


@pytest.mark.parametrize("name", HEADS)
def test_matrices_that_nothing_reads_have_no_rows(name):
    model = joined(name)
    held = {key for key, weight in model.named_parameters() if VOCAB_SIZE in weight.shape and key.startswith("aux")}
    embeddings = set() if model.config.trunk_layer is not None else {"aux.transformer.wte.weight"}
    heads = {"shared": set(), "low_rank": {"aux_head.up.weight"}, "own": {"aux.lm_head.weight"}}
    assert held == embeddings | heads[model.config.head]
    assert all(parameter.requires_grad for key, parameter in model.named_parameters() if key in held)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base_folder(tmp_path):
    BASES["llama"]().save_pretrained(tmp_path / "the-base")
    return str(tmp_path / "the-base")


@pytest.mark.parametrize("name", HEADS)
def test_folder_holds_what_is_read_and_loads_the_same_model(name, base_folder, tmp_path, tokens):
    model = joined(name, base_folder)
    model.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert weights.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    if name.startswith("shared") and "own" not in name:
        assert not any(VOCAB_SIZE in weight.shape for weight in weights.values())
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert (loaded.config.head, loaded.config.head_rank) == (model.config.head, model.config.head_rank)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert {k for k, p in loaded.named_parameters() if p.requires_grad} == weights.keys()
    os.remove(tmp_path / "saved" / "model.safetensors")
    model.train().save_pretrained(tmp_path / "saved", save_base=True)
    again = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_folder_with_embeddings_behind_a_trunk_loads(base_folder, tmp_path, tokens):
    """Folders were written with them, and without saying which head they have."""
    model = joined("own, trunk", base_folder)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "aux.transformer.wte.weight": torch.randn(VOCAB_SIZE, 16)}, path, {"format": "pt"})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"head": "own",', "").replace('"head_rank": null,', ""))
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.aux.get_input_embeddings().weight.shape == (0, 16)


def test_state_dicts_with_and_without_unread_matrices_load(tokens):
    model, other = joined("own, trunk"), joined("own, trunk", moved=False)
    state = model.state_dict()
    for more in ({"aux.transformer.wte.weight": torch.randn(VOCAB_SIZE, 16)}, {}):
        state.pop("aux.transformer.wte.weight", None)
        other.load_state_dict({**state, **more})
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_a_folder_without_its_head_is_refused(base_folder, tmp_path):
    joined("low rank", base_folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["aux_head.up.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights must be .*aux_head\.up\.weight"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path)


def test_embeddings_tied_to_a_head_that_stays_are_kept(tokens, base_folder, tmp_path):
    aux = tiny_model("gpt2", seed=2)
    assert aux.lm_head.weight is aux.transformer.wte.weight
    model = joined("own, trunk", base_folder, aux=aux, zero_init=False, moved=False)
    assert model.aux.lm_head.weight.shape == (VOCAB_SIZE, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(AuxiliaryForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared, low rank", "low rank"])
def test_lora_and_a_head_trained_whole(name, tokens):
    peft = pytest.importorskip("peft")
    model = joined(name).train()
    own = [n for n, m in model.named_modules() if n.startswith("aux.transformer") and n.endswith("c_attn")]
    for options in ({"modules_to_save": ["aux_head"]}, {}):
        config = peft.LoraConfig(r=2, target_modules=[*own, "aux_head.up"] if not options else own, **options)
        wrapped = peft.get_peft_model(joined(name).train(), config)
        trained = [(key, p) for key, p in wrapped.named_parameters() if p.requires_grad]
        assert trained and not any(".base." in key for key, _ in trained)
        with torch.no_grad():
            for _, parameter in trained:
                parameter.normal_(std=0.1)
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(parameter.grad.any() for _, parameter in trained)
        logits = wrapped.eval()(input_ids=tokens).logits
        want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert_same_network(wrapped.train()(input_ids=tokens, labels=tokens).loss, want)


# -- configurations ----------------------------------------------------------------------------------------------------


def family(name):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    if name == "GPT2":
        return transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=8, n_head=8, pad_token_id=0)
    if name == "GPTNeoX":
        del sizes["num_key_value_heads"]
    if name == "OPT":
        sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "intermediate_size")} | {
            "ffn_dim": 160
        }
    if name.startswith("Gemma"):
        sizes["head_dim"] = 16
    return getattr(transformers, f"{name}Config")(**sizes)


@pytest.mark.parametrize(
    "name", ["GPT2", "Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "GPTNeoX", "OPT", "Mistral"]
)
def test_small_is_a_quarter_of_the_base(name, tokens):
    config = family(name)
    small = small_config(config)
    assert type(small) is type(config) and small.vocab_size == 97
    assert (small.hidden_size, small.num_attention_heads, small.num_hidden_layers) == (16, 2, 2)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = config.to_dict()
    for options in ({"head": "shared"}, {"head": "own"}, {"head": "low_rank", "head_rank": 2}):
        model = AuxiliaryForCausalLM.from_base_and_aux(base, "small", **options)
        assert_same_network(model.eval()(tokens).logits, base(tokens).logits)
        model.train()(tokens, labels=tokens).loss.backward()
    assert config.to_dict() == before
    assert all(parameter.dtype == torch.float32 for parameter in model.aux.parameters())


def test_small_is_refused_where_it_cannot_be_derived():
    options = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 4, "pad_token_id": 0}
    with pytest.raises(ValueError, match="aux='small' cannot be derived from 'mamba', it has no num_attention_heads"):
        small_config(transformers.MambaConfig(**options))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        ({"head": "none"}, "head must be one of own, shared, low_rank, got 'none'"),
        ({"head": "low_rank"}, "head_rank must be given for head='low_rank'"),
        ({"head": "own", "head_rank": 4}, "head_rank must be positive, and None for head='own', got 4"),
        ({"head": "shared", "head_rank": 0}, "head_rank must be positive"),
        ({"head": "shared", "zero_init": False}, "zero_init must be True for head='shared'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrong_heads_are_errors(options, error, architecture):
    with pytest.raises(ValueError, match=error):
        AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), tiny_config(architecture), **options)


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_a_hook_on_the_base_s_head_sees_the_sum_and_passes_its_gradient(tokens):
    model, seen = joined("shared").train(), []
    want = model(tokens, labels=tokens, skip_logits=False)
    want.loss.backward()
    grad, model.aux_head.weight.grad = model.aux_head.weight.grad, None
    model.base.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    got = model(tokens, labels=tokens, skip_logits=False)
    got.loss.backward()
    assert len(seen) == 2
    assert_same_network((got.loss, got.logits), (want.loss, want.logits))
    assert_same_network(model.aux_head.weight.grad, grad)


def test_a_model_that_gives_no_hidden_states_is_named(tokens):
    model = joined("shared")
    handle = model.base.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"base must be a transformers model without hooks .* or with head='own'"):
        model(tokens)
    handle.remove()
    model.aux.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="aux must be a transformers model without hooks"):
        model(tokens)


@pytest.mark.parametrize("name", ["shared", "low rank"])
def test_a_frozen_head_of_zeros_is_warned_of(name, tokens):
    model = joined(name, moved=False).train()
    model.aux_head.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"modules_to_save=\['aux_head'\]"):
        model(tokens, labels=tokens)
