"""What a `BaseCache` holds: the base's hidden states of each example, and its log-sum-exp."""

import itertools
import multiprocessing
import os
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from cached import LENGTHS, examples_of, packed_examples, saved_base
from family_configs import tiny_config as family_config
from family_configs import tiny_model as family_model
from tiny import ARCHITECTURES, tiny_config, tiny_model
from torch.utils.data import DataLoader

from auxkernels.models import AuxiliaryForCausalLM, BaseCache, DataCollatorForBaseCache
from auxkernels.models.base_cache import CachePlan, data_fingerprint, tokenizer_fingerprint

EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture
def base(tmp_path):
    return saved_base(tmp_path / "base")


@pytest.fixture
def cache(base, tmp_path):
    return BaseCache.create(tmp_path / "cache", base, examples_of(), batch_size=3, shard_bytes=700)


def states_of(base, example):
    """All hidden states of an example that runs alone, [layers + 1, n, D]."""
    inputs = {name: one[None] for name, one in example.items()}
    with torch.no_grad():
        output = base.base_model(**inputs, output_hidden_states=True, use_cache=False)
    return [state[0] for state in output.hidden_states], output.last_hidden_state[0]


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_hidden_states_times_the_head_are_the_bases_logits(architecture, is_tied, tmp_path):
    base = saved_base(tmp_path / "base", architecture, tie_word_embeddings=is_tied, dtype=torch.float32)
    examples = examples_of()
    cache = BaseCache.create(tmp_path / "cache", base, examples, dtype="float32", batch_size=3, shard_bytes=700)
    head = cache.base_head().get_output_embeddings()
    assert len(cache) == len(examples) and len(cache.manifest.shards) > 2
    for i, example in enumerate(examples):
        want = base(example["input_ids"][None]).logits[0]
        item = cache[i]
        assert torch.equal(item["input_ids"], example["input_ids"])
        torch.testing.assert_close(head(item["base_hidden_states"]), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(item["base_lse"], want.logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_hidden_states_are_the_very_ones_of_the_same_batch(base, cache):
    examples, collator = examples_of(), DataCollatorForBaseCache()
    for start in range(0, len(LENGTHS), 3):
        chosen = range(start, min(start + 3, len(LENGTHS)))
        batch = collator([examples[i] for i in chosen])
        del batch["labels"]
        with torch.no_grad():
            want = base.base_model(**batch, use_cache=False).last_hidden_state
        for row, i in enumerate(chosen):
            got = cache[i]["base_hidden_states"]
            assert got.dtype == torch.bfloat16 and torch.equal(got, want[row, : LENGTHS[i]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_hidden_states_are_rounded_once_to_the_dtype(dtype, tmp_path):
    base = saved_base(tmp_path / "base", dtype=torch.float32)
    example = examples_of([7])
    cache = BaseCache.create(tmp_path / "cache", base, example, dtype=getattr(torch, dtype), lse=False)
    want = states_of(base, example[0])[1]
    got = cache[0]["base_hidden_states"]
    assert "base_lse" not in cache[0]
    assert torch.equal(got, want.to(getattr(torch, dtype)))
    assert cache.num_bytes == sum(os.path.getsize(one) for one in (tmp_path / "cache").glob("*.safetensors"))


def test_trunk_layers_are_those_of_the_base(tmp_path):
    base = saved_base(tmp_path / "base", dtype=torch.float32)
    examples = examples_of()
    cache = BaseCache.create(tmp_path / "cache", base, examples, dtype="float32", batch_size=1, trunk_layers=[-2, 0])
    assert cache.trunk_layers == [0, 1]
    for i, example in enumerate(examples):
        states, last = states_of(base, example)
        torch.testing.assert_close(cache[i]["base_hidden_states"], last, **EXACT)
        for layer in (0, 1):
            torch.testing.assert_close(cache[i][f"base_trunk_states.{layer}"], states[layer], **EXACT)
    assert torch.equal(cache.dataset(trunk_layer=1)[3]["base_trunk_states"], cache[3]["base_trunk_states.1"])
    assert "base_trunk_states" not in cache.dataset()[3]


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_texts_have_the_hidden_states_of_each_alone(side, tmp_path):
    base = saved_base(tmp_path / "base", dtype=torch.float32)
    rows = packed_examples()
    cache = BaseCache.create(tmp_path / "cache", base, rows, dtype="float32", batch_size=2, padding_side=side)
    for i, row in enumerate(rows):
        assert torch.equal(cache[i]["position_ids"], row["position_ids"])
        begins = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["input_ids"])]
        for begin, end in itertools.pairwise(begins):
            want = states_of(base, {"input_ids": row["input_ids"][begin:end]})[1]
            torch.testing.assert_close(cache[i]["base_hidden_states"][begin:end], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_left_changes_nothing_but_roundings(architecture, tmp_path):
    base = saved_base(tmp_path / "base", architecture, dtype=torch.float32)
    options = {"dtype": "float32", "batch_size": 4}
    right, left = (
        BaseCache.create(tmp_path / side, base, examples_of(), padding_side=side, **options)
        for side in ("right", "left")
    )
    for i in range(len(right)):
        torch.testing.assert_close(right[i]["base_hidden_states"], left[i]["base_hidden_states"], rtol=1e-4, atol=1e-4)


def test_the_base_runs_without_dropout_and_is_left_as_it_was(tmp_path):
    base = saved_base(tmp_path / "base", "gpt2", embd_pdrop=0.5)
    want = BaseCache.create(tmp_path / "want", base.eval(), examples_of())
    got = BaseCache.create(tmp_path / "got", base.train(), examples_of())
    assert base.training and all(weight.requires_grad for weight in base.parameters())
    assert all(torch.equal(want[i]["base_hidden_states"], got[i]["base_hidden_states"]) for i in range(len(want)))


# -- items -------------------------------------------------------------------------------------------------------------


def test_an_item_is_a_copy(cache):
    before = cache[2]["base_hidden_states"].clone()
    cache[2]["base_hidden_states"].fill_(7.0)
    assert torch.equal(cache[2]["base_hidden_states"], before)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in cache[2].values())
    cache.verify()


def test_indices_are_those_of_a_sequence(cache):
    assert torch.equal(cache[-1]["input_ids"], cache[len(cache) - 1]["input_ids"])
    for index in (len(cache), -len(cache) - 1):
        with pytest.raises(IndexError, match="index must be in"):
            cache[index]


def test_columns_of_the_examples_are_added(base, cache):
    examples = [{**one, "labels": one["input_ids"] + 1, "attention_mask": [1]} for one in examples_of()]
    model = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("gpt2"))
    item = cache.dataset(model, examples=examples)[4]
    assert torch.equal(item["labels"], examples[4]["input_ids"] + 1)
    assert item.keys() == {"input_ids", "labels", "base_hidden_states", "base_lse"}
    examples[4] = {"input_ids": examples[4]["input_ids"] + 1}
    with pytest.raises(ValueError, match=r"examples\[4\] must have the tokens"):
        cache.dataset(examples=examples)[4]
    with pytest.raises(ValueError, match="examples must be those of the cache, 8, got 7"):
        cache.dataset(examples=examples[:7])


def test_a_model_of_another_base_is_refused(cache):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama", seed=5, width=24), tiny_config("gpt2"))
    with pytest.raises(ValueError, match=r"base of the cache .* must be the model that is meant"):
        cache.dataset(model)


def test_a_base_of_the_same_weights_and_another_configuration_is_refused(base, cache):
    """Its hidden states are others; what a call returns, which tokens end a text and names make none."""
    other = tiny_model("llama", seed=1, width=24, rms_norm_eps=0.5).to(torch.bfloat16)
    other.load_state_dict(base.state_dict())
    model = AuxiliaryForCausalLM.from_base_and_aux(other, tiny_config("gpt2"))
    for refused in (lambda: cache.dataset(model), lambda: BaseCache.open(cache.path, base=other)):
        with pytest.raises(ValueError, match="configuration of the model that is meant, they differ in rms_norm_eps"):
            refused()
    base.config.use_cache, base.config.eos_token_id, base.config.name_or_path = False, 7, "elsewhere"
    assert len(BaseCache.open(cache.path, base=base)) == len(cache)


def test_positions_of_the_examples_are_those_of_the_cache(base, cache, tmp_path):
    examples = examples_of()
    assert "position_ids" not in cache.dataset(examples=_with(examples, 1, position_ids=torch.arange(9)))[1]
    with pytest.raises(ValueError, match=r"examples\[1\] must have the position_ids of the cache's example"):
        cache.dataset(examples=_with(examples, 1, position_ids=torch.arange(9) % 4))[1]
    with pytest.raises(ValueError, match=r"examples\[1\] must have no padding"):
        cache.dataset(examples=_with(examples, 1, attention_mask=torch.arange(9) > 0))[1]
    rows = packed_examples()
    packed = BaseCache.create(tmp_path / "packed", base, rows)
    assert torch.equal(packed.dataset(examples=rows)[0]["position_ids"], rows[0]["position_ids"])
    with pytest.raises(ValueError, match=r"examples\[0\] must have the position_ids of the cache's example"):
        packed.dataset(examples=_with(rows, 0, position_ids=torch.arange(9)))[0]
    with pytest.raises(ValueError, match=r"position_ids of examples\[0\] must be \[9\], in \[0, 2\*\*31\)"):
        BaseCache.create(tmp_path / "far", base, _with(rows, 0, position_ids=torch.arange(9) + 2**31))


def _with(examples, index, **columns):
    return [{**one, **columns} if i == index else one for i, one in enumerate(examples)]


def test_a_trunk_layer_that_is_not_held_is_refused(base, cache):
    model = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("gpt2"), trunk_layer=1)
    for given in ({"model": model}, {"trunk_layer": 1}):
        with pytest.raises(ValueError, match=r"trunk_layer must be one that the cache .* holds"):
            cache.dataset(**given)
    with pytest.raises(ValueError, match="trunk_layer must be the model's, 1, got 0"):
        cache.dataset(model, trunk_layer=0)
    with pytest.raises(TypeError, match="model must be an AuxiliaryForCausalLM"):
        cache.dataset(base)


# -- workers -----------------------------------------------------------------------------------------------------------


def test_four_workers_give_what_one_process_gives(cache):
    loaders = [
        DataLoader(cache.dataset(), batch_size=2, collate_fn=DataCollatorForBaseCache(), num_workers=n) for n in (0, 4)
    ]
    cache[0]  # maps a shard before the workers are forked
    for want, got in zip(*loaders, strict=True):
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_pickled_cache_maps_its_files_anew(cache):
    cache[0], cache[7]
    pickled = pickle.dumps(cache.dataset())
    assert len(pickled) < 100_000
    again = pickle.loads(pickled)
    assert not again.cache._opened
    assert torch.equal(again[7]["base_hidden_states"], cache[7]["base_hidden_states"])


def test_a_process_of_its_own_maps_the_files_anew(cache, monkeypatch):
    want = cache[0]["base_hidden_states"]
    mapped = cache._opened[0]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert torch.equal(cache[0]["base_hidden_states"], want) and cache._opened[0] is not mapped


def _first_token(data):
    return data[5]["input_ids"][0].item()


@pytest.mark.slow
def test_a_spawned_process_reads_the_cache(cache):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_token, (cache.dataset(),)) == cache[5]["input_ids"][0].item()


def test_no_more_shards_than_a_few_stay_open(base, tmp_path, monkeypatch):
    import auxkernels.models.base_cache.cache as module

    monkeypatch.setattr(module, "_MOST_OPEN", 2)
    cache = BaseCache.create(tmp_path / "cache", base, examples_of(), batch_size=1, shard_bytes=1)
    assert len(cache.manifest.shards) == len(LENGTHS)
    for i in (0, 1, 2, 7, 0):
        assert torch.equal(cache[i]["input_ids"], examples_of()[i]["input_ids"])
        assert len(cache._opened) <= 2


# -- the collator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_stand_where_their_tokens_do(cache, side):
    batch = DataCollatorForBaseCache(pad_token_id=0, padding_side=side)([cache[0], cache[4]])
    assert batch["base_hidden_states"].shape == (2, 5, 24)
    place = slice(0, 3) if side == "right" else slice(2, 5)
    rest = slice(3, 5) if side == "right" else slice(0, 2)
    assert torch.equal(batch["input_ids"][1, place], cache[4]["input_ids"])
    assert torch.equal(batch["base_hidden_states"][1, place], cache[4]["base_hidden_states"])
    assert not batch["base_hidden_states"][1, rest].any() and not batch["attention_mask"][1, rest].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_packed_rows_is_one_more_text(side):
    rows = packed_examples(((2, 3), (3,)))
    batch = DataCollatorForBaseCache(padding_side=side)(rows)
    assert "attention_mask" not in batch
    short = [0, 1, 2, 0, 1] if side == "right" else [0, 1, 0, 1, 2]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], short]
    is_counted = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 1, 0, 0] if side == "right" else [0, 0, 0, 1, 1]]).bool()
    assert torch.equal(batch["labels"] != -100, is_counted)


def test_rows_of_a_batch_must_be_of_one_kind(cache):
    collator = DataCollatorForBaseCache()
    with pytest.raises(ValueError, match="position_ids must be given for every example or for none"):
        collator([examples_of()[0], packed_examples()[0]])
    with pytest.raises(ValueError, match="base_hidden_states must be given for every example or for none"):
        collator([examples_of()[0], cache[1]])
    wrong = {**packed_examples()[0], "position_ids": torch.arange(3)}
    with pytest.raises(ValueError, match=r"examples\[0\] must have a position for each of 9 tokens, got 3"):
        collator([wrong])


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_the_datas_fingerprint_is_that_of_tokens_and_positions():
    whole, packed = examples_of(), packed_examples()
    assert data_fingerprint(whole) == data_fingerprint([{"input_ids": one["input_ids"].tolist()} for one in whole])
    assert data_fingerprint(packed) == data_fingerprint([{**one, "labels": [1]} for one in packed])
    apart = [{"input_ids": row["input_ids"]} for row in packed]
    others = [whole[:-1], whole[::-1], examples_of(seed=1), packed, apart]
    moved = [{**packed[0], "position_ids": torch.arange(9)}, *packed[1:]]
    joined = [{"input_ids": torch.cat([whole[0]["input_ids"], whole[1]["input_ids"]])}, *whole[2:]]
    assert len({data_fingerprint(one) for one in (whole, *others, moved, joined)}) == 8


def fast_tokenizer(*tokens):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="a")


def test_a_tokenizers_fingerprint_is_not_changed_by_its_use():
    tokenizer, other = fast_tokenizer("a", "b"), fast_tokenizer("a", "c")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before != tokenizer_fingerprint(other)
    with pytest.raises(TypeError, match="tokenizer must be one of transformers', got int"):
        tokenizer_fingerprint(3)


def test_a_tokenizer_without_serialised_form_counts_by_its_vocabulary():
    class Written:
        all_special_tokens = ()

        def __init__(self, **vocabulary):
            self.get_vocab = lambda: vocabulary

    assert tokenizer_fingerprint(Written(a=0)) == tokenizer_fingerprint(Written(a=0))
    assert tokenizer_fingerprint(Written(a=0)) != tokenizer_fingerprint(Written(a=1))


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float8_e4m3fn"}, "dtype must be one of bfloat16, .* 8 bits are not offered"),
        ({"dtype": "int8"}, "8 bits are not offered"),
        ({"dtype": torch.int32}, "dtype must be one of bfloat16, float16, float32, float64, got int32$"),
        ({"autocast": torch.float32}, "autocast must be None or one of bfloat16, float16, got float32"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"trunk_layers": [3]}, r"trunk_layer must be in \[-3, 2\]"),
        ({"padding_side": "top"}, "padding_side must be 'right' or 'left', got 'top'"),
        ({"examples": []}, "examples must hold at least one, got none"),
        ({"examples": [{"input_ids": []}]}, r"examples\[0\] must have at least one token"),
        ({"examples": [{"tokens": [1]}]}, r"examples\[0\] must have input_ids, got tokens"),
        ({"examples": [{"input_ids": [[1]]}]}, r"input_ids of examples\[0\] must be integers \[n\]"),
        ({"examples": [{"input_ids": [1, 61]}]}, r"input_ids of examples\[0\] must be in \[0, 61\)"),
        ({"examples": [{"input_ids": [1, -1]}]}, r"input_ids of examples\[0\] must be in \[0, 61\)"),
        ({"examples": [{"input_ids": [1], "attention_mask": [0]}]}, r"examples\[0\] must have no padding"),
        ({"examples": [{"input_ids": [1], "position_ids": [0, 1]}]}, r"position_ids of examples\[0\] must be \[1\]"),
        ({"examples": [{"input_ids": [1], "position_ids": [-1]}]}, r"position_ids of examples\[0\] must be \[1\]"),
        ({"examples": [*examples_of([3]), *packed_examples()]}, r"for every example or for none, examples\[1\]"),
    ],
)
def test_arguments_that_nothing_can_be_made_of_are_refused(base, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BaseCache.create(tmp_path / "cache", base, options.pop("examples", examples_of()), **options)
    assert not (tmp_path / "cache").exists()


def test_bases_of_which_only_logits_are_known_are_refused(tmp_path):
    hooked = tiny_model("llama")
    hooked.register_forward_hook(lambda *args: None)
    head = tiny_model("llama")
    head.lm_head.register_forward_hook(lambda *args: None)
    for base in (hooked, head):
        with pytest.raises(ValueError, match="base must be a transformers model without hooks whose head is one"):
            CachePlan(base, examples_of())
    with pytest.raises(TypeError, match="base must be a PreTrainedModel or a name"):
        CachePlan(tiny_config("llama"), examples_of())


def test_a_base_without_a_hidden_state_for_each_token_is_refused(tmp_path):
    if family_config("diffusion_gemma").vision_config is None:  # 5.17, which then makes no model of it
        pytest.skip("this release of transformers has no vision tower in diffusion_gemma's defaults")
    examples = examples_of([6, 6])
    with pytest.raises(
        ValueError, match=r"base must give hidden states \[2, 6, 32\], one for each token, got \[2, 256"
    ):
        BaseCache.create(tmp_path / "cache", family_model("diffusion_gemma"), examples)


def test_adapters_in_the_base_are_refused():
    peft = pytest.importorskip("peft")
    base = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="base must have no adapters"):
        CachePlan(base, examples_of())


def test_hidden_states_that_a_dtype_cannot_hold_are_refused(tmp_path):
    base = tiny_model("llama", sharpness=1.0)
    with torch.no_grad():
        base.model.norm.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"dtype must be able to hold .*, torch\.float16 overflows"):
        BaseCache.create(tmp_path / "cache", base, examples_of(), dtype="float16")


def test_the_size_is_known_beforehand(base, tmp_path):
    plan = CachePlan(base, examples_of(), batch_size=3, shard_bytes=700)
    assert (plan.num_examples, plan.num_tokens) == (8, 49)
    assert "8 examples, 49 tokens of" in str(plan) and "in 3 shards" in str(plan)
    assert not (tmp_path / "cache").exists()
    plan.write(tmp_path / "cache")
    assert plan.num_bytes == sum(os.path.getsize(one) for one in (tmp_path / "cache").glob("*.safetensors"))
