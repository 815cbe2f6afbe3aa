"""Training on cached hidden states, with the base's trunk in memory or without: to the bit as online."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from cached import examples_of, packed_examples, saved_base  # noqa: E402
from family_configs import tiny_model as family_model  # noqa: E402
from tiny import VOCAB_SIZE, tiny_config, tiny_model  # noqa: E402

from auxkernels.models import (  # noqa: E402
    AuxiliaryEnsembleForCausalLM,
    AuxiliaryForCausalLM,
    BaseCache,
    DataCollatorForBaseCache,
)

EXACT = {"rtol": 0.0, "atol": 0.0}
BATCH = 3


def batches_of(data, collator, steps):
    """Successive batches, as those in which the base ran when the cache was written."""
    starts = range(0, len(data), BATCH)
    for step in range(steps):
        start = starts[step % len(starts)]
        yield collator([data[i] for i in range(start, min(start + BATCH, len(data)))])


def new_auxiliary(base, aux="llama", **options):
    torch.manual_seed(4)
    return AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config(aux), **options)


def trained(model, data, collator, steps=50):
    """(losses, base losses, weights) of some steps."""
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    losses = []
    for batch in batches_of(data, collator, steps):
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.loss.item(), output.base_loss is not None and output.base_loss.item()))
    own = {name: one for name, one in model.state_dict().items() if not name.startswith("base.")}
    return losses, copy.deepcopy(own)


def assert_same_training(online, cached):
    assert online[0] == cached[0]
    assert online[1].keys() == cached[1].keys()
    assert all(torch.equal(one, cached[1][name]) for name, one in online[1].items())
    losses = [loss for loss, _ in online[0]]
    assert len(set(losses)) > 0.9 * len(losses)  # something was learnt


# -- to the bit --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("trunk_layer", [None, 1])
def test_fifty_steps_are_those_of_online_training(base, is_tied, trunk_layer, tmp_path):
    base, examples = saved_base(tmp_path / "base", base, tie_word_embeddings=is_tied), examples_of()
    layers = [] if trunk_layer is None else [trunk_layer]
    cache = BaseCache.create(tmp_path / "cache", base, examples, batch_size=BATCH, trunk_layers=layers)
    collator = DataCollatorForBaseCache()
    online = trained(new_auxiliary(base, trunk_layer=trunk_layer), examples, collator)
    model = new_auxiliary(cache.base_head(), trunk_layer=trunk_layer)
    assert_same_training(online, trained(model, cache.dataset(model), collator))


@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2", "cohere", "granite", "opt"])
def test_other_families_have_the_logits_of_online_calls(family, tmp_path):
    """Kernels that depend on whether weights require gradients, configurations with infinities, scales of logits."""
    base, examples, collator = family_model(family), examples_of([6, 6]), DataCollatorForBaseCache()
    cache = BaseCache.create(tmp_path / "cache", base, examples, dtype="float32", batch_size=2, trunk_layers=[1])
    head = cache.base_head()
    for trunk_layer in (None, 1):
        models = [new_auxiliary(one, trunk_layer=trunk_layer, zero_init=False).eval() for one in (base, head)]
        batches = collator(examples), collator([cache.dataset(models[1])[i] for i in range(2)])
        online, cached = (model(**batch).logits for model, batch in zip(models, batches, strict=True))
        assert torch.equal(online, cached) and online.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [examples_of, packed_examples], ids=["padded", "packed"])
@pytest.mark.parametrize("head", ["own", "shared", "low_rank"])
def test_padded_and_packed_rows_are_those_of_online_training(side, make, head, tmp_path):
    base, examples = saved_base(tmp_path / "base", dtype=torch.float32), make()
    options = {"dtype": "float32", "batch_size": BATCH, "padding_side": side, "trunk_layers": [0]}
    cache = BaseCache.create(tmp_path / "cache", base, examples, **options)
    collator, rank = DataCollatorForBaseCache(padding_side=side), 3 if head == "low_rank" else None
    online = trained(new_auxiliary(base, head=head, head_rank=rank), examples, collator, steps=12)
    for one in (base, cache.base_head()):
        model = new_auxiliary(one, head=head, head_rank=rank)
        assert (model.config.trunk_layer == 0) == (head == "shared")
        assert_same_training(online, trained(model, cache.dataset(model), collator, steps=12))


def test_prefixes_and_labels_come_with_the_examples(tmp_path):
    base = saved_base(tmp_path / "base")
    examples = [
        {**one, "labels": one["input_ids"].where(one["input_ids"] % 3 > 0, -100), "aux_input_ids": [7] * (i % 3)}
        for i, one in enumerate(examples_of())
    ]
    cache = BaseCache.create(tmp_path / "cache", base, examples, batch_size=BATCH)
    collator = DataCollatorForBaseCache()
    online = trained(new_auxiliary(base), examples, collator, steps=12)
    model = new_auxiliary(cache.base_head())
    assert_same_training(online, trained(model, cache.dataset(model, examples=examples), collator, steps=12))
    without = trained(new_auxiliary(base), cache.dataset(), collator, steps=12)
    assert without[0] != online[0]


def test_rounded_hidden_states_change_the_base_by_their_rounding_alone(tmp_path):
    base, examples = saved_base(tmp_path / "base", dtype=torch.float32, sharpness=4.0), examples_of()
    cache = BaseCache.create(tmp_path / "cache", base, examples)  # bfloat16
    model, collator = new_auxiliary(base).eval(), DataCollatorForBaseCache()
    online, cached = (model(**collator([data[i] for i in range(8)])) for data in (examples, cache.dataset(model)))
    assert cached.loss.item() != online.loss.item()
    torch.testing.assert_close(cached.loss, online.loss, rtol=0.02, atol=0.02)


# -- Trainer -----------------------------------------------------------------------------------------------------------


def trainer(model, data, folder, **options):
    options = {
        "max_steps": 6,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=DataCollatorForBaseCache()
    )


def logged(run, name="loss"):
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize("trunk_layer", [None, 1])
def test_trainer_gives_the_losses_and_folders_of_online_training(trunk_layer, tmp_path):
    base, examples = saved_base(tmp_path / "base"), examples_of()
    cache = BaseCache.create(tmp_path / "cache", base, examples, batch_size=BATCH, trunk_layers=[1])
    runs = {}
    for name, one in (("online", base), ("cached", cache.base_head())):
        model = new_auxiliary(one, trunk_layer=trunk_layer)
        data = examples if one is base else cache.dataset(model)
        runs[name] = trainer(model, data, tmp_path / name)
        runs[name].train()
        runs[name].save_model(str(tmp_path / f"{name}-model"))
    assert len(logged(runs["online"])) == 6
    assert logged(runs["online"]) == logged(runs["cached"])
    folders = [tmp_path / f"{name}-model" for name in runs]
    files = [{one.name: one.read_bytes() for one in folder.iterdir()} for folder in folders]
    assert files[0].keys() == files[1].keys() >= {"config.json", "generation_config.json", "model.safetensors"}
    for name in files[0].keys() - {"training_args.bin"}:
        assert files[0][name] == files[1][name], name


@pytest.mark.slow
def test_trainer_evaluates_saves_and_resumes_without_the_trunk(tmp_path):
    base = saved_base(tmp_path / "base")
    cache = BaseCache.create(tmp_path / "cache", base, examples_of(), batch_size=BATCH)
    model = new_auxiliary(cache.base_head())
    run = trainer(model, cache.dataset(model), tmp_path / "run", eval_strategy="steps", eval_steps=3)
    run.train()
    again = new_auxiliary(cache.base_head())
    resumed = trainer(again, cache.dataset(again), tmp_path / "run", eval_strategy="steps", eval_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert logged(resumed)[-3:] == logged(run)[-3:]
    assert logged(resumed, "eval_loss")[-1] == logged(run, "eval_loss")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_under_autocast_is_that_of_online_training(dtype, tmp_path):
    base, examples = saved_base(tmp_path / "base", dtype=getattr(torch, dtype)), examples_of()
    options = {"dtype": dtype, "batch_size": BATCH}
    cache = BaseCache.create(tmp_path / "cache", base, examples, autocast="bfloat16", **options)
    losses = []
    for one in (base, cache.base_head()):
        model = new_auxiliary(one)
        run = trainer(model, examples if one is base else cache.dataset(model), tmp_path / "run", bf16=True)
        run.train()
        losses.append(logged(run))
    assert losses[0] == losses[1]


def test_the_callers_autocast_does_not_change_what_is_written(tmp_path):
    base, examples = saved_base(tmp_path / "base", dtype=torch.float32), examples_of()
    outside = BaseCache.create(tmp_path / "outside", base, examples, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        inside = BaseCache.create(tmp_path / "inside", base, examples, dtype="float32")
    under = BaseCache.create(tmp_path / "under", base, examples, dtype="float32", autocast=torch.bfloat16)
    for name in ("base_hidden_states", "base_lse"):
        assert torch.equal(outside[0][name], inside[0][name])
        assert not torch.equal(outside[0][name], under[0][name])


@pytest.mark.slow
def test_trainer_reads_with_workers(tmp_path):
    base = saved_base(tmp_path / "base")
    cache = BaseCache.create(tmp_path / "cache", base, examples_of(), batch_size=BATCH, shard_bytes=700)
    losses = []
    for workers in (0, 4):
        model = new_auxiliary(cache.base_head())
        run = trainer(model, cache.dataset(model), tmp_path / "run", dataloader_num_workers=workers, save_strategy="no")
        run.train()
        losses.append(logged(run))
    assert losses[0] == losses[1]


# -- a base without its trunk ------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    return saved_base(tmp_path / "base")


@pytest.fixture
def cache(base, tmp_path):
    return BaseCache.create(tmp_path / "cache", base, examples_of(), batch_size=BATCH, trunk_layers=[0, 1])


def test_the_head_alone_is_in_memory(base, cache):
    for head in (cache.base_head(), copy.deepcopy(cache.base_head()), pickle.loads(pickle.dumps(cache.base_head()))):
        assert sum(one.numel() for one in head.parameters()) == base.lm_head.weight.numel()
        assert torch.equal(head.lm_head.weight, base.lm_head.weight) and head.dtype == base.dtype
        assert not any(one.is_meta or one.requires_grad for one in [*head.parameters()])
        assert not any(one.is_meta for one in head.buffers()) and not head.training
        head.to(torch.float32).to("cpu")


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_tying_the_weights_again_leaves_the_head(is_tied, tmp_path):
    base = saved_base(tmp_path / "base", tie_word_embeddings=is_tied)
    head = BaseCache.create(tmp_path / "cache", base, examples_of()).base_head()
    head.tie_weights()
    assert torch.equal(head.lm_head.weight, base.lm_head.weight)


def test_the_heads_dtype_can_be_chosen(cache):
    assert cache.base_head(dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_a_head_with_a_bias_is_kept(tmp_path):
    config = transformers.PhiConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        base.lm_head.bias.uniform_(-2, 2)
    cache = BaseCache.create(tmp_path / "cache", base, examples_of(), dtype="float32", batch_size=1)
    want = base(examples_of()[1]["input_ids"][None]).logits[0]
    got = cache.base_head().lm_head(cache[1]["base_hidden_states"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_softcap_is_kept(cap, tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=cap,
    )
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(200.0)
    cache = BaseCache.create(tmp_path / "cache", base, examples_of(), dtype="float32", batch_size=1)
    model, ids = new_auxiliary(cache.base_head()).eval(), examples_of()[1]["input_ids"][None]
    want = base(ids).logits
    got = model(ids, base_hidden_states=cache[1]["base_hidden_states"][None]).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[1]["base_lse"], want[0].logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_saved_auxiliary_is_loaded_with_its_base_or_with_the_cache(base, cache, tmp_path):
    model = new_auxiliary(cache.base_head(), zero_init=False).eval()
    model.save_pretrained(tmp_path / "saved")
    batch = DataCollatorForBaseCache()([cache.dataset(model)[0]])
    whole = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    head = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=cache.base_head())
    want = model(**batch).loss
    torch.testing.assert_close(head(**batch).loss, want, **EXACT)
    ids = batch["input_ids"]
    torch.testing.assert_close(whole(ids, labels=ids).loss, want, rtol=1e-2, atol=1e-2)
    assert whole.generate(ids, max_new_tokens=2).shape == (1, ids.shape[1] + 2)
    assert whole.config.base_name_or_path == str(tmp_path / "base")


def test_a_saved_auxiliary_of_another_base_is_refused(cache, tmp_path):
    new_auxiliary(tiny_model("llama", seed=9, width=24).to(torch.bfloat16)).save_pretrained(
        tmp_path / "saved", save_base=True
    )
    with pytest.raises(ValueError, match="base must be the model that the auxiliary was saved with"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=cache.base_head())


def test_revision_and_options_of_the_base_are_pointed_to(tmp_path):
    tiny_model("llama", seed=1, width=24).save_pretrained(tmp_path / "bases/inner")
    kwargs = {"base_revision": "main", "base_kwargs": {"subfolder": "inner"}}
    cache = BaseCache.create(tmp_path / "cache", str(tmp_path / "bases"), examples_of(), **kwargs)
    config = new_auxiliary(cache.base_head()).config
    assert (config.base_name_or_path, config.base_revision) == (str(tmp_path / "bases"), "main")
    assert config.base_options == {"subfolder": "inner"}


def test_a_small_auxiliary_is_that_of_the_whole_base(base, cache):
    sizes = [
        sum(one.numel() for one in AuxiliaryForCausalLM.from_base_and_aux(one, "small").aux.parameters())
        for one in (base, cache.base_head())
    ]
    assert sizes[0] == sizes[1]


def test_what_needs_the_trunk_is_refused(cache, tmp_path):
    model = new_auxiliary(cache.base_head(), trunk_layer=1)
    ids = examples_of()[0]["input_ids"][None]
    advice = "needs the base's trunk, which is not in memory: pass base_hidden_states .*from_pretrained"
    states = {name: one[None] for name, one in cache.dataset(model)[0].items() if name.startswith("base_")}
    del states["base_lse"]
    model(ids, **states)
    with pytest.raises(ValueError, match=rf"a call without base_hidden_states {advice}"):
        model(ids)
    with pytest.raises(ValueError, match=rf"generate {advice}"):
        model.generate(ids)
    with pytest.raises(ValueError, match=rf"aux_input_ids with a trunk layer {advice}"):
        model(ids, aux_input_ids=ids, **states)
    with pytest.raises(ValueError, match="the base's trunk is not in memory: pass base_hidden_states"):
        model.base(ids)
    with pytest.raises(ValueError, match="the base's trunk is not in memory"):
        model.base.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="the base's trunk is not in memory"):
        model.base.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="save_base must be False for a base without its trunk"):
        model.save_pretrained(tmp_path / "saved", save_base=True)
    with pytest.raises(ValueError, match=rf"writing a cache {advice}"):
        BaseCache.create(tmp_path / "other", model.base, examples_of())
    ensemble = AuxiliaryEnsembleForCausalLM.from_members(model.base, {"one": new_auxiliary(model.base)})
    with pytest.raises(ValueError, match=rf"a call without base_hidden_states {advice}"):
        ensemble(ids)


def test_an_ensemble_takes_no_states(base, cache):
    """It would run its base, and the states would be of no use."""
    ensemble = AuxiliaryEnsembleForCausalLM.from_members(base, {"one": new_auxiliary(base)})
    item = cache[0]
    with pytest.raises(ValueError, match="base_hidden_states must not be given to an ensemble"):
        ensemble(item["input_ids"][None], base_hidden_states=item["base_hidden_states"][None])


def test_a_manifest_names_no_code(cache):
    """Or a folder from elsewhere would choose what transformers loads."""
    config = cache.manifest.base["config"]
    config |= {"_attn_implementation": "someone/kernel", "auto_map": {"AutoConfig": "someone/code--it.Config"}}
    head = cache.base_head()
    assert "someone" not in head.config.to_json_string(use_diff=False) + str(head.config._attn_implementation)


def test_a_trunk_layer_that_the_cache_does_not_hold_is_refused(cache):
    with pytest.raises(ValueError, match=r"trunk_layer must be one that the base's cache holds, \[0, 1\], got 2"):
        new_auxiliary(cache.base_head(), trunk_layer=2)


def test_a_base_with_code_of_its_own_is_not_built_without_its_trunk(cache):
    cache.manifest.base["config"]["model_type"] = "of-their-own"
    with pytest.raises(ValueError, match=r"base of the cache .* must be of a class of transformers"):
        cache.base_head()


# -- arguments of forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"base_hidden_states": None}, "base_trunk_states must come with base_hidden_states, got them alone"),
        ({"base_trunk_states": None}, "base_trunk_states must be given .* got none for trunk_layer=1"),
        ({"base_hidden_states": torch.zeros(1, 4, 24)}, r"base_hidden_states must be \[1, 5, 24\], got \[1, 4, 24\]"),
        ({"base_hidden_states": torch.zeros(1, 5, 16)}, r"base_hidden_states must be \[1, 5, 24\], got \[1, 5, 16\]"),
        ({"base_trunk_states": torch.zeros(5, 24)}, r"base_trunk_states must be \[1, 5, 24\], got \[5, 24\]"),
        ({"use_cache": True}, "use_cache must not be given with base_hidden_states"),
        ({"output_hidden_states": True}, "output_hidden_states must not be given with base_hidden_states"),
        ({"pixel_values": torch.zeros(1)}, "images, video or sound must not be given with base_hidden_states"),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)
def test_wrong_states_are_refused(base, cache, given, message):
    model = new_auxiliary(base, trunk_layer=1)
    states = {"base_hidden_states": torch.zeros(1, 5, 24), "base_trunk_states": torch.zeros(1, 5, 24)}
    with pytest.raises(ValueError, match=message):
        model(examples_of()[0]["input_ids"][None], **{**states, **given})


def test_states_of_another_kind_are_refused(base):
    model, ids = new_auxiliary(base), examples_of()[0]["input_ids"][None]
    with pytest.raises(TypeError, match=r"base_hidden_states must be floating point, got torch\.int64"):
        model(ids, base_hidden_states=torch.zeros(1, 5, 24, dtype=torch.int64))
    with pytest.raises(ValueError, match="got some for trunk_layer=None"):
        model(ids, base_hidden_states=torch.zeros(1, 5, 24), base_trunk_states=torch.zeros(1, 5, 24))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must not be given with base_hidden_states"):
        model(ids, base_hidden_states=torch.zeros(1, 5, 24), past_key_values=cache)
    model.base.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="base_hidden_states must be for a transformers model without hooks"):
        model(ids, base_hidden_states=torch.zeros(1, 5, 24))


def test_a_call_on_states_keeps_no_cache(base, cache):
    model, ids = new_auxiliary(base).eval(), examples_of()[0]["input_ids"][None]
    output = model(ids, base_hidden_states=cache[0]["base_hidden_states"][None])
    assert output.past_key_values is None and output.logits.shape == (1, 5, VOCAB_SIZE)


def test_the_base_is_not_run_on_states(base, cache):
    model, ids = new_auxiliary(base), examples_of()[0]["input_ids"][None]
    hook = base.model.register_forward_pre_hook(lambda *args: pytest.fail("the base was run"))
    model(ids, labels=ids, base_hidden_states=cache[0]["base_hidden_states"][None])
    hook.remove()
