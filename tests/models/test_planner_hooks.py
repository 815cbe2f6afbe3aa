"""The hooks on a language model: shared, copied, compiled, removed, and after an error."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from network import assert_same_network
from planner_models import ARCHITECTURES, SEGMENT_IDS, scores, tiny_lm, tiny_model, tokens

from auxkernels.models.conditioning import decoder_layers


def logits(model, ids, given):
    return model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_models_share_a_language_model_without_a_trace(architecture):
    lm, ids, given = tiny_lm(architecture), tokens(), scores()
    alone = lm(ids).logits
    first, second = tiny_model(lm=lm), tiny_model(lm=lm, layers=[0, 3])
    by_first, by_second = logits(first, ids, given), logits(second, ids, given)
    apart = copy.deepcopy(first)
    assert apart.lm is not lm and torch.equal(logits(apart, ids, given), by_first)
    assert (by_first - by_second).abs().max() > 1e-2
    assert torch.equal(logits(first, ids, given), by_first) and torch.equal(lm(ids).logits, alone)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_conditioned_by_its_own_weights(copied):
    model, ids, given = tiny_model(), tokens(), scores()
    want = logits(model, ids, given)
    other = copied(model)
    assert torch.equal(logits(other, ids, given), want)
    with torch.no_grad():
        model.conditioning.bias += 1.0
    assert torch.equal(logits(other, ids, given), want) and not torch.equal(logits(model, ids, given), want)
    other.remove_hooks()
    assert (logits(model, ids, given) - want).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="hooks were removed"):
        logits(other, ids, given)


def test_a_copied_language_model_is_its_own():
    model, ids, given = tiny_model(), tokens(), scores()
    other = copy.deepcopy(model.lm)
    alone = other(ids).logits
    logits(model, ids, given)
    assert torch.equal(other(ids).logits, alone)


def test_an_error_inside_the_language_model_leaves_nothing_behind():
    model, ids, given = tiny_model(), tokens(), scores()
    want, alone = logits(model, ids, given), model.lm(ids).logits
    handle = decoder_layers(model.lm)[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids, given)
    handle.remove()
    assert torch.equal(model.lm(ids).logits, alone) and torch.equal(logits(model, ids, given), want)


def test_removed_hooks_leave_the_language_model_as_it_was():
    lm = tiny_lm("gpt2")
    count = [len(layer._forward_pre_hooks) for layer in decoder_layers(lm)]
    model = tiny_model(lm=lm)
    assert [len(layer._forward_pre_hooks) for layer in decoder_layers(lm)] != count
    model.remove_hooks()
    assert [len(layer._forward_pre_hooks) for layer in decoder_layers(lm)] == count


def test_a_shared_language_model_keeps_no_dropped_models_weights():
    lm = tiny_lm("gpt2")
    codebooks = weakref.ref(tiny_model(lm=lm).conditioning.codebooks)
    gc.collect()
    assert codebooks() is None


def count_of_hooks(lm) -> list[int]:
    return [len(layer._forward_pre_hooks) for layer in decoder_layers(lm)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_deleted_model_takes_its_hooks_along(copied):
    model, ids, given = copied(tiny_model("gpt2")), tokens(), scores()
    lm = model.lm
    other = tiny_model(lm=lm, layers=[1])
    want = logits(other, ids, given)
    assert count_of_hooks(lm) == [0, 1, 1, 1]
    shallow = copy.copy(model)
    del shallow
    gc.collect()
    assert count_of_hooks(lm) == [0, 1, 1, 1]
    del model
    gc.collect()
    assert count_of_hooks(lm) == [0, 1, 0, 0]
    assert torch.equal(logits(other, ids, given), want)


def test_another_thread_uses_the_shared_language_model_alone():
    """The model's pass stops between two conditioned layers while another thread runs the language model and backward.

    Without a state of its own, the other thread's pass would be conditioned, and the model's would lose its rows.
    """
    model, ids, given = tiny_model(), tokens(), scores().requires_grad_()
    lm, other = model.lm, tiny_model(lm=model.lm, layers=[0, 3])
    want, alone, by_other = logits(model, ids, given), lm(ids).logits, logits(other, ids, given)
    main, got = threading.current_thread(), {}

    def work():
        got["alone"], got["other"] = lm(ids).logits, logits(other, ids, given)
        got["model"] = logits(model, ids, -given)

    def stop(*_):
        if threading.current_thread() is main:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(30)

    handle = decoder_layers(lm)[2].register_forward_hook(stop)
    got["main"] = logits(model, ids, given)
    handle.remove()
    assert torch.equal(got["main"], want) and torch.equal(got["alone"], alone) and torch.equal(got["other"], by_other)
    assert torch.equal(got["model"], logits(model, ids, -given))
    assert torch.equal(lm(ids).logits, alone)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_forward_and_gradient_equal_eager(architecture):
    model, ids = tiny_model(architecture).train(), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (scores(), scores(), scores()):
        for call in (model, compiled):
            given.grad = None
            given.requires_grad_()
            loss = call(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids).loss
            loss.backward()
            if call is model:
                want = loss.detach(), given.grad
        assert_same_network((loss.detach(), given.grad), want)
    assert torch.equal(model.lm(ids).logits, copy.deepcopy(model.lm)(ids).logits)


def test_compiled_language_model_is_conditioned_only_through_the_model():
    model, ids, given = tiny_model(), tokens(), scores()
    alone, want = model.lm(ids).logits, logits(model, ids, given)
    model.lm.forward = torch.compile(model.lm.forward, backend="eager")
    model.lm.model.forward = torch.compile(model.lm.model.forward, backend="eager")
    for _ in range(2):
        assert_same_network(model.lm(ids).logits, alone)
        assert_same_network(logits(model, ids, given), want)


def test_data_parallel_replicas_are_refused():
    model = tiny_model()
    model._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        logits(model, tokens(), scores())


def test_encoder_decoder_models_and_unknown_ones_are_refused():
    config = transformers.T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(TypeError, match="decoder only"):
        decoder_layers(transformers.T5ForConditionalGeneration(config))
    lm = tiny_lm("gpt2")
    lm.config.n_layer = 5
    with pytest.raises(ValueError, match="no list of 5 decoder layers"):
        decoder_layers(lm)
