"""`AuxiliaryGroupForCausalLM`: each member's loss, gradients, training and folder are those that it has alone."""

import copy
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from cached import examples_of, packed_examples, saved_base  # noqa: E402
from ensembles import KINDS, PREFIX, PREFIX_MASK, tiny_base, tiny_member  # noqa: E402
from many import Shared, assert_same_bits  # noqa: E402
from tiny import VOCAB_SIZE, tiny_config, tiny_model  # noqa: E402

from auxkernels.models import (  # noqa: E402
    AuxiliaryEnsembleForCausalLM,
    AuxiliaryForCausalLM,
    AuxiliaryGroupForCausalLM,
    BaseCache,
    DataCollatorForBaseCache,
)

OWN_LOGITS = ("own", "trunk", "low_rank")
BATCH = 4


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def tiny_group(kinds=tuple(KINDS), *, base=None, **options):
    base = tiny_base() if base is None else base
    members = {f"{kind}-{i}": tiny_member(base, kind, seed=2 + i) for i, kind in enumerate(kinds)}
    return without_dropout(AuxiliaryGroupForCausalLM.from_members(members, **options))


def own_weights(member):
    return {name: p for name, p in member.named_parameters() if not name.startswith("base.") and p.requires_grad}


def numbers_of(output, member):
    """All numbers of a member's output by name, and its gradients behind a backward pass."""
    names = ("loss", "base_loss", "token_accuracy", "entropy", "num_valid_tokens", "num_correct_tokens", "router_loss")
    found = {name: getattr(output, name) for name in names}
    found = {name: None if one is None else one.detach() for name, one in found.items()}
    return found | {name: p.grad.clone() for name, p in own_weights(member).items() if p.grad is not None}


def of(name, given):
    return given.get(name) if isinstance(given, dict) else given


def assert_as_alone(group, tokens, of_group=None, **kwargs):
    """of_group: what the group is given under other names or in other forms than its members."""
    together = group(tokens, **{**kwargs, **(of_group or {})})
    assert list(together.losses) == list(together.outputs) == list(group.members)
    assert math.isclose(together.loss.item(), sum(one.item() for one in together.losses.values()), rel_tol=1e-6)
    group.zero_grad()
    together.loss.backward()
    for name, member in group.members.items():
        output = together.outputs[name]
        assert together.losses[name] is output.loss and output.logits is None and output.past_key_values is None
        found = numbers_of(output, member)
        alone = member(tokens, skip_logits=True, **{key: of(name, given) for key, given in kwargs.items()})
        member.zero_grad()
        alone.loss.backward()
        expected = numbers_of(alone, member)
        assert len(expected) > 7 and any(expected[key].any() for key in own_weights(member))
        assert_same_bits(found, expected)


# -- losses and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_each_alone(is_training, dtype, tokens):
    group = tiny_group(base=tiny_base().to(dtype)).train(is_training)
    for i, member in enumerate(group.members.values()):
        member.config.aux_scale, member.config.label_smoothing = 0.5 + i, 0.1 * i
    labels = tokens.clone()
    labels[0, :5] = -100
    assert_as_alone(group, tokens, labels=labels)


def test_dtypes_softcaps_and_vocabularies_may_differ(tokens):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_SIZE + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0,
    )  # fmt: skip
    torch.manual_seed(0)
    capped = transformers.AutoModelForCausalLM.from_config(config).eval()
    base = tiny_base()
    members = {
        "narrow": tiny_model("gpt2", seed=3, vocab_size=VOCAB_SIZE - 4),
        "capped": capped,
        "rounded": tiny_model("llama", seed=5).to(torch.bfloat16),
    }
    joined = {
        name: AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False, vocab_policy="pad").eval()
        for name, aux in members.items()
    }
    tokens = tokens.clamp(max=VOCAB_SIZE - 5)
    assert_as_alone(AuxiliaryGroupForCausalLM.from_members(joined), tokens, labels=tokens)


def test_a_base_with_a_softcap_and_shared_heads(tokens):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert_as_alone(tiny_group(("shared", "own", "low_rank"), base=base), tokens, labels=tokens)


def test_a_base_that_is_called_whole(tokens):
    base = tiny_base()
    base.register_forward_hook(lambda *args: None)
    assert_as_alone(tiny_group(("own", "low_rank"), base=base), tokens, labels=tokens)


def test_labels_may_differ(tokens):
    group = tiny_group(OWN_LOGITS)
    labels = {name: tokens.clone() for name in group.members}
    for i, one in enumerate(labels.values()):
        one[i % len(tokens)] = -100
    assert_as_alone(group, tokens, labels=labels)
    num_items = {name: torch.tensor(5 + i) for i, name in enumerate(labels)}
    shifted = {name: one.roll(-1, dims=1) for name, one in labels.items()}
    assert_as_alone(group, tokens, shift_labels=shifted, num_items_in_batch=num_items)


def test_prefixes_are_of_those_that_are_given_one(tokens):
    group = tiny_group(("own", "trunk", "shared"))
    name = list(group.members)[1]
    assert_as_alone(group, tokens, labels=tokens, aux_input_ids={name: PREFIX}, aux_attention_mask={name: PREFIX_MASK})
    assert_as_alone(group, tokens, labels=tokens, aux_input_ids=PREFIX, aux_attention_mask=PREFIX_MASK)


def test_padding_and_packed_texts(tokens):
    group = tiny_group(("own", "trunk", "shared"))
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[1, -3:] = 0, 0
    assert_as_alone(group, tokens, labels=tokens.masked_fill(mask == 0, -100), attention_mask=mask)
    positions = torch.cat([torch.arange(5), torch.arange(tokens.shape[1] - 5)]).expand_as(tokens)
    assert_as_alone(group, tokens, labels=tokens, position_ids=positions)


def test_experts_balance_their_routers_in_their_own_losses(tokens):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0,
    )  # fmt: skip
    base = tiny_base()
    experts = transformers.MixtralForCausalLM(config).eval()
    members = {
        "experts": AuxiliaryForCausalLM.from_base_and_aux(base, experts, zero_init=False),
        "plain": tiny_member(base),
    }
    group = AuxiliaryGroupForCausalLM.from_members(members)
    assert_as_alone(group, tokens, labels=tokens)
    outputs = group(tokens, labels=tokens).outputs
    assert outputs["experts"].router_loss > 0 and outputs["plain"].router_loss is None


def test_the_base_runs_once_and_its_head_serves_all_with_logits_of_their_own(tokens, monkeypatch):
    group, calls, shared = tiny_group().train(), [], Shared(monkeypatch)
    group.base.model.register_forward_pre_hook(lambda *args: calls.append(args))
    group(tokens, labels=tokens)
    assert len(calls) == 1
    assert shared.beside_others == [len(OWN_LOGITS)] and shared.alone == len(KINDS) - len(OWN_LOGITS)


def test_a_frozen_member_has_a_loss_and_no_gradient(tokens):
    group = tiny_group(("own", "low_rank"), frozen=["own-0"]).train()
    alone = group.members["own-0"](tokens, labels=tokens).loss
    output = group(tokens, labels=tokens)
    output.loss.backward()
    assert torch.equal(output.losses["own-0"], alone) and not output.losses["own-0"].requires_grad
    assert all(p.grad is None for p in group.members["own-0"].parameters())
    assert all(p.grad is not None for p in own_weights(group.members["low_rank-1"]).values())
    assert not group.base.training and all(p.grad is None for p in group.base.parameters())


def test_gradient_checkpointing_changes_nothing(tokens):
    group = tiny_group(("own", "trunk", "shared")).train()
    group.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in group.modules())
    assert_as_alone(group, tokens, labels=tokens)


# -- a cache of the base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [examples_of(), packed_examples()], ids=["padded", "packed"])
@pytest.mark.parametrize("layers", [(None, None), (1, None), (0, 1, 1)], ids=lambda layers: ",".join(map(str, layers)))
def test_from_a_cache_they_are_those_of_the_whole_base(layers, examples, tmp_path):
    base = saved_base(tmp_path / "base")
    cache = BaseCache.create(tmp_path / "cache", base, examples, batch_size=BATCH, trunk_layers=[0, 1])
    collator, losses = DataCollatorForBaseCache(), []
    for one in (base, cache.base_head()):
        group = AuxiliaryGroupForCausalLM.from_members(
            {f"layer-{i}": new_auxiliary(one, trunk_layer=layer, zero_init=False) for i, layer in enumerate(layers)}
        ).train()
        data = examples if one is base else cache.dataset(group)
        batch = collator([data[i] for i in range(BATCH)])
        output = group(**batch)
        output.loss.backward()
        found = {f"loss {name}": loss.detach() for name, loss in output.losses.items()}
        losses.append(found | {name: p.grad for name, p in group.named_parameters() if p.grad is not None})
        if one is not base:
            name, member = next(iter(group.members.items()))
            alone = collator([cache.dataset(member)[i] for i in range(BATCH)])
            assert torch.equal(member(**alone).loss, output.losses[name])
    assert len(losses[0]) > 2 * len(layers)
    assert_same_bits(*losses)


def test_states_of_other_layers_are_refused(tmp_path):
    base = saved_base(tmp_path / "base")
    cache = BaseCache.create(tmp_path / "cache", base, examples_of(), trunk_layers=[0, 1])
    group = AuxiliaryGroupForCausalLM.from_members(
        {f"layer-{i}": new_auxiliary(cache.base_head(), trunk_layer=i) for i in range(1)}
    )
    with pytest.raises(ValueError, match="trunk_layer must be the model's, 0, got 1"):
        cache.dataset(group, trunk_layer=1)
    two = AuxiliaryGroupForCausalLM.from_members({f"layer-{i}": new_auxiliary(base, trunk_layer=i) for i in range(2)})
    ids, states = torch.tensor([[2, 3, 4]]), torch.zeros(1, 3, 24)
    for given, got in ((None, "none"), (states, "a tensor")):
        with pytest.raises(ValueError, match=rf"must be a dict of those of the layers \[0, 1\], got {got}"):
            two(ids, labels=ids, base_hidden_states=states, base_trunk_states=given)
    with pytest.raises(ValueError, match=r"must have those of the layers \[0, 1\], got \[0, 2\]"):
        two(ids, labels=ids, base_hidden_states=states, base_trunk_states={0: states, 2: states})
    with pytest.raises(ValueError, match=r"base_trunk_states\[1\] must be \[1, 3, 24\], got \[1, 2, 24\]"):
        two(ids, labels=ids, base_hidden_states=states, base_trunk_states={0: states, 1: states[:, :2]})
    with pytest.raises(ValueError, match=r"must be one that the cache .* holds, \[1\], got 0"):
        BaseCache.create(tmp_path / "less", base, examples_of(), trunk_layers=[1]).dataset(two)


# -- Trainer -----------------------------------------------------------------------------------------------------------


def new_auxiliary(base, seed=4, **options):
    torch.manual_seed(seed)
    return AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("llama"), **options)


def new_members(base):
    return {
        "own": new_auxiliary(base, 4),
        "trunk": new_auxiliary(base, 5, trunk_layer=1),
        "shared": new_auxiliary(base, 6, head="shared"),
        "low_rank": new_auxiliary(base, 7, head="low_rank", head_rank=4),
    }


def trainer(model, data, folder, *, steps=6, accumulation=2, **options):
    options = {
        "max_steps": steps,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,  # the norm would be that of all members
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    collator = DataCollatorForBaseCache()
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


@pytest.mark.parametrize("is_cached", [False, True], ids=["online", "cached"])
def test_trainer_trains_each_as_alone_and_each_loads_alone(is_cached, tmp_path):
    base, examples = saved_base(tmp_path / "base"), examples_of()
    cache = BaseCache.create(tmp_path / "cache", base, examples, batch_size=2, trunk_layers=[0, 1])
    group = AuxiliaryGroupForCausalLM.from_members(new_members(cache.base_head() if is_cached else base)).train()
    before = copy.deepcopy(group.state_dict())
    run = trainer(group, cache.dataset(group) if is_cached else examples, tmp_path / "together")
    run.train()
    changed = {key.split(".")[1] for key, value in group.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == set(group.members)
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    sums = torch.zeros(len(logged), dtype=torch.float64)
    for name, member in new_members(base).items():
        alone = trainer(member.train(), examples, tmp_path / "alone")
        alone.train()
        sums += torch.tensor([entry["loss"] for entry in alone.state.log_history if "loss" in entry])
        assert_same_bits(own_weights(group.members[name]), own_weights(member))
        group.members[name].save_pretrained(tmp_path / name)
        loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / name)
        assert_same_bits(own_weights(loaded), own_weights(member))
        ids = examples[0]["input_ids"][None]
        assert torch.equal(loaded(ids).logits, member.eval()(ids).logits)
    torch.testing.assert_close(torch.tensor(logged, dtype=torch.float64), sums, rtol=0, atol=1e-3)


def test_trainer_evaluates_saves_and_resumes(tmp_path):
    base, examples = saved_base(tmp_path / "base"), examples_of()
    options = {"save_strategy": "steps", "save_steps": 2}
    runs = {}
    for name, steps in (("whole", 4), ("half", 2), ("resumed", 4)):
        group = AuxiliaryGroupForCausalLM.from_members(new_members(base)).train()
        folder = tmp_path / ("half" if name == "resumed" else name)
        runs[name] = trainer(group, examples, folder, steps=steps, **options)
        runs[name].train(resume_from_checkpoint=name == "resumed")
    assert_same_bits(runs["resumed"].model.state_dict(), runs["whole"].model.state_dict())
    result = runs["whole"].evaluate()
    group = runs["whole"].model.eval()
    loaded = AuxiliaryGroupForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4")
    assert_same_bits(loaded.state_dict(), group.state_dict())
    data = trainer(loaded, examples, tmp_path / "evaluated").evaluate()
    assert data["eval_loss"] == result["eval_loss"] > 0
    alone = [trainer(one.eval(), examples, tmp_path / "evaluated").evaluate() for one in group.members.values()]
    assert math.isclose(sum(one["eval_loss"] for one in alone), result["eval_loss"], rel_tol=1e-5)


# -- saving and mixing -------------------------------------------------------------------------------------------------


def test_a_folder_holds_each_member_and_they_mix_with_a_dial_for_each_text(tmp_path, tokens):
    base = saved_base(tmp_path / "base", dtype=torch.float32)
    group = tiny_group(("own", "trunk", "shared"), base=base, frozen=["trunk-1"])
    group.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryGroupForCausalLM.from_pretrained(tmp_path / "saved", base=base)
    assert_same_bits(loaded.state_dict(), group.state_dict())
    assert loaded.config.frozen_members == ["trunk-1"] and loaded.config.base_name_or_path == str(tmp_path / "base")
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "saved"), type(group.config))
    folders = {name: f"{tmp_path}/saved/members/{name}" for name in group.members}
    for members in (dict(group.members), folders):
        mixed = AuxiliaryEnsembleForCausalLM.from_members(base, members).eval()
        logits = mixed(tokens, aux_scale=torch.eye(len(tokens))[:, : len(members)]).logits
        for row, (name, folder) in enumerate(folders.items()):
            alone = AuxiliaryForCausalLM.from_pretrained(folder, base=base)
            assert torch.equal(alone(tokens).logits, group.members[name](tokens).logits)
            torch.testing.assert_close(logits[row], alone(tokens).logits[row])
        mixed.generate(tokens, max_new_tokens=2, aux_scale={"own-0": torch.tensor([0.0, 1.0, 2.0])})


# -- errors ------------------------------------------------------------------------------------------------------------


def test_what_makes_no_group_is_refused():
    base = tiny_base()
    one = tiny_member(base)
    with pytest.raises(ValueError, match="members must hold at least one auxiliary, got none"):
        AuxiliaryGroupForCausalLM.from_members({})
    with pytest.raises(TypeError, match="members must be a dict of models by name, got list"):
        AuxiliaryGroupForCausalLM.from_members([one])
    with pytest.raises(TypeError, match=r"members\['lm'\] must be an AuxiliaryForCausalLM, got GPT2LMHeadModel"):
        AuxiliaryGroupForCausalLM.from_members({"lm": tiny_model("gpt2")})
    with pytest.raises(ValueError, match=r"members must share the base as one object, members\['other'\] has another"):
        AuxiliaryGroupForCausalLM.from_members({"one": one, "other": tiny_member(tiny_base())})
    with pytest.raises(ValueError, match="'one' and 'same' are one"):
        AuxiliaryGroupForCausalLM.from_members({"one": one, "same": one})
    with pytest.raises(ValueError, match=r"frozen must name members \(one\), got 'two'"):
        AuxiliaryGroupForCausalLM.from_members({"one": one}, frozen=["two"])
    with pytest.raises(ValueError, match="needs its base and members, got a configuration alone"):
        AuxiliaryGroupForCausalLM(AuxiliaryGroupForCausalLM.from_members({"one": one}).config)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "labels must be given: a group has losses alone: call a member, or join them as an AuxiliaryEnsemble"),
        ({"use_cache": True}, "use_cache must not be given: a group has losses alone"),
        ({"logits_to_keep": 1}, "logits_to_keep must not be given"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep must not be given"),
        ({"skip_logits": False}, "skip_logits must not be given"),
        ({"output_hidden_states": True}, "output_hidden_states must not be given"),
        ({"labels": {"own-0": PREFIX}}, "labels must be given for each member, got none for 'low_rank-1'"),
        ({"labels": {"own-0": PREFIX, "low_rank-1": PREFIX}}, r"labels must be \[3, 9\], as the tokens, got \[3, 4\]"),
        ({"labels": {"x": PREFIX}}, r"labels must name members \(own-0, low_rank-1\), got 'x'"),
        ({"aux_input_ids": {"x": PREFIX}}, r"aux_input_ids must name members .*, got 'x'"),
        ({"aux_attention_mask": {"own-0": PREFIX}}, "of the member 'own-0': aux_attention_mask must come with"),
        ({"aux_other": 1}, "aux_\\* arguments are"),
    ],
    ids=str,
)
def test_calls_that_a_group_cannot_answer_are_refused(given, message, tokens):
    group = tiny_group(("own", "low_rank"))
    given = {"labels": tokens, **given} if given else {}
    with pytest.raises((ValueError, TypeError), match=message):
        group(tokens, **given)
    assert group(tokens, labels=tokens, use_cache=False, skip_logits=True, logits_to_keep=0).loss is not None


def test_generation_points_to_the_ensemble(tokens):
    with pytest.raises(ValueError, match=r"generate must not be called .*AuxiliaryEnsembleForCausalLM"):
        tiny_group(("own",)).generate(tokens)
    assert not tiny_group(("own",)).can_generate()
