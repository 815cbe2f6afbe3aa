"""PlannerForCausalLM.forward: which label conditions which token, in every mode, and the loss."""

import pytest
import torch

pytest.importorskip("transformers")

from network import assert_same_network
from planner_models import (
    ARCHITECTURES,
    LABEL_DIM,
    NUM_LABELS,
    NUM_SEGMENTS,
    SEGMENT_IDS,
    VOCAB,
    label_weights,
    reference_logits,
    scores,
    tiny_lm,
    tiny_model,
    tokens,
)
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from auxkernels.models.conditioning import Conditioning, is_folded, predicted_segments
from auxkernels.models.planner import PlannerForCausalLM

GIVEN_SCORES = ("soft", "straight_through", "gumbel", "hard")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", GIVEN_SCORES)
def test_segment_form_equals_every_token_by_itself(architecture, mode):
    model, ids, given = tiny_model(architecture, temperature=0.7), tokens(), scores()
    got = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, mode=mode).logits
    want = reference_logits(model, ids, SEGMENT_IDS, label_weights(mode, given, 0.7))
    assert_same_network(got, want)
    assert (got - model.lm(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_given_labels_equal_every_token_by_itself(architecture):
    model, ids, labels = tiny_model(architecture, conditioning_init="zero_gate"), tokens(), torch.arange(NUM_SEGMENTS)
    got = model(ids, segment_ids=SEGMENT_IDS, label_ids=labels, mode="hard")
    assert_same_network(got.logits, reference_logits(model, ids, SEGMENT_IDS, label_weights("hard", labels)))
    assert got.label_entropy == 0 and torch.equal(got.segment_labels, labels)
    assert_same_network(got.label_usage, torch.tensor([1, 1, 1, 1, 1, 1, 0]) / 6)


def test_fixed_label_needs_no_source_and_reads_none():
    model, ids = tiny_model(mode="fixed", fixed_label=3), tokens()
    everywhere, weights = torch.zeros_like(ids), label_weights("hard", torch.tensor([3]))
    assert_same_network(model(ids).logits, reference_logits(model, ids, everywhere, weights))
    where = SEGMENT_IDS.clamp(max=0)
    got = model(ids, segment_ids=SEGMENT_IDS, label_scores=scores(), mode="fixed").logits
    assert_same_network(got, reference_logits(model, ids, where, weights))


def test_planner_scores_are_those_of_the_planner():
    model, ids, features = tiny_model(), tokens(), torch.randn(NUM_SEGMENTS, 5)
    want = model(ids, segment_ids=SEGMENT_IDS, label_scores=model.planner(features))
    got = model(ids, segment_ids=SEGMENT_IDS, planner_inputs={"features": features})
    assert torch.equal(got.logits, want.logits)


def test_last_token_of_a_segment_carries_the_next_segments_label():
    aligned = predicted_segments(torch.tensor([[0, 0, 1, 1, -1, 2], [3, -1, -1, 3, 4, 4]]))
    assert aligned.tolist() == [[0, 1, 1, -1, 2, 2], [-1, -1, 3, 4, 4, 4]]
    model, ids, given = tiny_model(), tokens(), scores()
    by_model = model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits
    by_user = model(
        ids, segment_ids=predicted_segments(SEGMENT_IDS), segments_are_aligned=True, label_scores=given
    ).logits
    assert torch.equal(by_model, by_user)


def test_changing_a_segments_scores_changes_the_prediction_of_its_first_token_and_none_before():
    model, ids, given = tiny_model(), tokens(1), scores(2)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    before = model(ids, segment_ids=segments, label_scores=given).logits
    given[1] = -given[1]
    after = model(ids, segment_ids=segments, label_scores=given).logits
    changed = (after - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * 6  # the token at 3 predicts the one at 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("init", ["zero_projection", "zero_gate"])
def test_a_new_model_equals_its_language_model(architecture, init):
    lm, ids = tiny_lm(architecture), tokens()
    model = PlannerForCausalLM.from_lm(lm, num_labels=NUM_LABELS, label_dim=LABEL_DIM, conditioning_init=init)
    assert torch.equal(model(ids, segment_ids=SEGMENT_IDS, label_scores=scores()).logits, lm(ids).logits)


def test_xavier_start_differs_and_a_codebook_is_every_layers_own():
    lm, ids, codebook = tiny_lm("gpt2"), tokens(), torch.randn(NUM_LABELS, LABEL_DIM)
    model = PlannerForCausalLM.from_lm(lm, codebook=codebook, conditioning_init="xavier")
    assert (model(ids, segment_ids=SEGMENT_IDS, label_scores=scores()).logits - lm(ids).logits).abs().max() > 1e-3
    assert torch.equal(model.conditioning.codebooks, codebook.expand(2, -1, -1))
    assert model.config.layers == [2, 3]
    with torch.no_grad():
        model.conditioning.codebooks[0] += 1.0
    assert torch.equal(model.conditioning.codebooks[1], codebook)


@pytest.mark.parametrize("segments", [0, 1, 3, 40])
@pytest.mark.parametrize("hard", [False, True])
def test_folded_tables_equal_projected_mixtures(segments, hard):
    table = Conditioning(3, NUM_LABELS, LABEL_DIM, 8, init="zero_gate", dtype=torch.float64)
    for weight in table.parameters():
        weight.data.normal_()
    given, upstream = scores(segments, torch.float64).requires_grad_(), torch.randn(3, segments, 8).double()
    results = []
    for folded in (False, True):
        rows, _ = table(given, folded=folded, hard=hard, temperature=0.5)
        results.append((rows, *torch.autograd.grad(rows, [given, *table.parameters()], upstream)))
    for unfolded, folded in zip(*results, strict=True):
        assert_same_network(unfolded, folded)
    labels = torch.randint(0, NUM_LABELS, (segments,))
    assert_same_network(table.of_labels(labels, folded=True), table.of_labels(labels, folded=False))


def test_folding_is_chosen_where_it_multiplies_less():
    for sizes in ((1, 7, 6, 16), (40, 7, 6, 16), (1100, 1024, 768, 768), (4000, 1024, 768, 768), (900, 64, 768, 768)):
        segments, labels, width, hidden = sizes
        folded = labels * width * hidden + segments * labels * hidden
        unfolded = segments * labels * width + segments * width * hidden
        assert is_folded(*sizes) == (folded < unfolded)
    assert is_folded(4000, 1024, 768, 768) and not is_folded(900, 1024, 768, 768)


# -- loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_the_shifted_cross_entropy_of_the_logits(architecture):
    model, ids, given = tiny_model(architecture), tokens(), scores()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    out = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=labels)
    want = cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    assert_same_network(out.loss, want)
    by_count = model(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=labels, num_items_in_batch=50)
    counted = (labels[:, 1:] != -100).sum()
    assert_same_network(by_count.loss, want * counted / 50)
    shifted = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), 1)
    assert torch.equal(model(ids, segment_ids=SEGMENT_IDS, label_scores=given, shift_labels=shifted).loss, out.loss)


class Largest(TorchDispatchMode):
    """The most elements that any new tensor with a dimension of the vocabulary has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and VOCAB in tensor.shape:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_training_makes_no_logits_and_evaluation_does():
    model, ids, given = tiny_model(), tokens(300, 9), scores()
    segments = SEGMENT_IDS.repeat(150, 1)
    model.train()
    with Largest() as largest:
        out = model(ids, segment_ids=segments, label_scores=given, labels=ids)
        out.loss.backward()
    assert out.logits is None and largest.elements < ids.numel() * VOCAB
    assert model(ids, segment_ids=segments, label_scores=given, labels=ids, skip_logits=False).logits is not None
    model.eval()
    out = model(ids, segment_ids=segments, label_scores=given, labels=ids, logits_to_keep=2)
    assert out.loss is not None and out.logits.shape == (300, 2, VOCAB)


def test_statistics_describe_the_label_probabilities():
    model, given = tiny_model(temperature=2.0), scores()
    out = model(tokens(), segment_ids=SEGMENT_IDS, label_scores=given)
    p = torch.softmax(given / 2.0, -1)
    assert_same_network(out.label_usage, p.mean(0))
    assert_same_network(out.label_entropy, -(p * p.log()).sum(-1).mean())
    assert torch.equal(out.segment_labels, given.argmax(-1))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"label_ids": torch.zeros(6).long()}, ValueError, "mode 'soft' needs exactly one of label_scores"),
        ({}, ValueError, "got none .*remove_unused_columns=False"),
        ({"label_scores": scores(), "planner_inputs": {}}, ValueError, "got label_scores and planner_inputs"),
        ({"label_scores": scores(), "segment_ids": None}, ValueError, "needs segment_ids"),
        ({"label_scores": scores()[:5]}, IndexError, "segment_ids must be below 5, got 5"),
        ({"label_scores": scores()[:, :3]}, ValueError, r"must be \[segments, 7\], got \[6, 3\]"),
        ({"label_scores": scores().long()}, TypeError, "floating point"),
        ({"label_scores": scores(), "mode": "softer"}, ValueError, "mode must be one of soft, .* got 'softer'"),
        ({"label_scores": scores(), "segment_ids": SEGMENT_IDS[:, :4]}, ValueError, "segment_ids must be int64"),
        ({"label_scores": scores(), "num_items_in_batch": 3}, ValueError, "needs labels"),
        ({"label_scores": scores(), "labels": tokens()[:, :4]}, ValueError, r"labels must be \[2, 9\], as the tokens"),
        ({"label_ids": torch.full((6,), 7), "mode": "hard"}, IndexError, r"label_ids must be in \[0, 7\), got 7"),
        ({"label_ids": torch.tensor([0, 0, 0, -1, 0, 0]), "mode": "hard"}, IndexError, "got -1 for segment 3"),
        ({"label_ids": torch.zeros(6), "mode": "hard"}, TypeError, "label_ids must be int64"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message):
        model(tokens(), **{"segment_ids": SEGMENT_IDS, **call})
    assert model(tokens(), segment_ids=SEGMENT_IDS, label_scores=scores()).logits.isfinite().all()


def test_a_call_without_tokens_says_so():
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        tiny_model()(segment_ids=SEGMENT_IDS, label_scores=scores())


def test_planner_inputs_without_a_planner_say_so():
    model = PlannerForCausalLM.from_lm(tiny_lm("llama"), num_labels=NUM_LABELS, label_dim=LABEL_DIM)
    with pytest.raises(ValueError, match="this model has none"):
        model(tokens(), segment_ids=SEGMENT_IDS, planner_inputs={"features": torch.randn(6, 5)})
    with pytest.raises(ValueError, match="no planner to freeze"):
        model.freeze_planner()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layers": [4]}, ValueError, r"layers must be distinct indices in \[0, 4\)"),
        ({"layers": [1, 1]}, ValueError, "layers must be distinct"),
        ({"layers": []}, ValueError, "at least one"),
        ({"num_labels": None}, ValueError, "num_labels and label_dim must be given"),
        ({"codebook": torch.randn(8, 6)}, ValueError, "num_labels must be 8, as the codebook's, got 7"),
        ({"codebook": torch.randn(8)}, TypeError, "codebook must be"),
        ({"mode": "oracle"}, ValueError, "mode must be one of"),
        ({"temperature": 0.0}, ValueError, "label_temperature must be positive"),
        ({"fixed_label": 7}, ValueError, r"fixed_label must be in \[0, 7\)"),
        ({"conditioning_init": "zero"}, ValueError, "conditioning_init must be one of"),
    ],
)
def test_wrong_construction_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        PlannerForCausalLM.from_lm(tiny_lm("gpt2"), **{"num_labels": NUM_LABELS, "label_dim": LABEL_DIM, **options})


def test_construction_leaves_the_language_model_as_it_is():
    lm = tiny_lm("llama")
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    config = lm.config.to_dict()
    tiny_model(lm=lm)
    assert lm.config.to_dict() == config and lm.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_either_side_changes_no_logits(architecture):
    model, given, length, padding = tiny_model(architecture), scores(3), 6, 3
    ids, segments = tokens(1, length), torch.tensor([[0, 0, 1, 1, 2, 2]])
    want = model(ids, segment_ids=segments, label_scores=given).logits
    for left, right in ((0, padding), (padding, 0), (1, 2)):
        pad = torch.nn.functional.pad
        mask = pad(torch.ones_like(ids), (left, right))
        got = model(
            pad(ids, (left, right)),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            segment_ids=pad(segments, (left, right), value=-1),
            label_scores=given,
        ).logits
        assert_same_network(got[:, left : left + length], want)


def test_the_last_token_before_padding_keeps_its_segment():
    segments = torch.tensor([[0, 0, 1, -1, -1], [-1, -1, 2, 3, -1]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])  # the last -1 is a token of no segment
    assert predicted_segments(segments, mask).tolist() == [[0, 1, 1, -1, -1], [-1, 2, 3, -1, -1]]
    with pytest.raises(ValueError, match="shape of segment_ids"):
        predicted_segments(segments, mask[:, 1:])


def test_with_a_cache_the_mask_of_all_tokens_says_what_is_padding():
    model, ids, given = tiny_model(), tokens(1, 6), scores(2)
    segments, mask = torch.tensor([[0, 0, 0, 1, 1, -1]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    want = model(ids, attention_mask=mask, segment_ids=segments, label_scores=given).logits
    start = model(ids[:, :3], segment_ids=segments[:, 1:4], segments_are_aligned=True, label_scores=given)
    got = model(
        ids[:, 3:],
        attention_mask=mask,
        segment_ids=segments[:, 3:],
        label_scores=given,
        past_key_values=start.past_key_values,
    ).logits
    assert_same_network(got[:, :2], want[:, 3:5])
