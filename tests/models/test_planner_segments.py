"""Segments are numbered over the whole batch: ids that begin anew in each row are seen and refused."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from planner_models import NUM_LABELS, scores, tiny_model, tokens

from auxkernels.models.conditioning import refuse_numbers_of_rows
from auxkernels.models.labels import collate_segments

ANEW = torch.tensor([[0, 0, 1, 1, 2, 2, -1], [-1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
OVER_BATCH = torch.tensor([[0, 0, 1, 1, 2, 2, -1], [-1, 3, 3, 3, 3, 4, 4], [5, 5, 5, 5, 5, 5, 5]])
SOURCES = {
    "label_scores": scores(6),
    "label_ids": torch.arange(6) % NUM_LABELS,
    "planner_inputs": {"features": torch.randn(6, 5)},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("aligned", [False, True])
def test_ids_that_begin_anew_in_each_row_are_refused(source, aligned):
    model, ids = tiny_model(mode="hard" if source == "label_ids" else "soft"), tokens(3, 7)
    call = {source: SOURCES[source], "segments_are_aligned": aligned, "labels": ids}
    with pytest.raises(ValueError, match="begin anew in each row, at most 3 where labels of 6 segments are given"):
        model(ids, segment_ids=ANEW, **call)
    assert model(ids, segment_ids=OVER_BATCH, **call).loss.isfinite()


def test_a_stock_collator_is_refused_and_the_packages_own_gives_each_row_its_plan():
    examples = [{"input_ids": tokens(1, 6)[0].tolist(), "segment_ids": [0] * 6} for _ in range(4)]
    model, given = tiny_model(), scores(4)
    with pytest.raises(ValueError, match=r"as labels\.collate_segments does"):
        model(**transformers.default_data_collator(examples), label_scores=given)
    batch = collate_segments(examples, pad_token_id=0)
    got = model(**batch, label_scores=given).logits
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        want = model(**{**alone, "segment_ids": torch.zeros(1, 6).long()}, label_scores=given[row : row + 1]).logits
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)


def test_padding_whose_id_is_zero_does_not_hide_them():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    anew = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="begin anew"):
        tiny_model()(tokens(2, 6), segment_ids=anew, label_scores=scores(4), attention_mask=mask)


def test_where_nothing_can_be_raised_they_become_unknown_segments(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(refuse_numbers_of_rows(ANEW, 6), torch.where(ANEW < 0, ANEW, 6))


@pytest.mark.parametrize(
    "ids, num_segments",
    [
        ([[0, 0, 1, 1], [0, 1, 1, 1]], 2),  # the same two plans for two texts
        ([[3, 3, 5, 5], [3, 4, 4, 0]], 10),  # chosen from a collection of plans
        ([[0, 2, 1, 1], [0, 1, 1, 2]], 6),
        (OVER_BATCH.tolist(), 9),  # the last ones have no tokens
        ([[0, 0, 1, 1]], 4),
        ([[0, 0, 1, 1], [-1, -1, -1, -1]], 4),
        ([[-1, -1], [-1, -1]], 4),
        ([[], []], 4),
    ],
)
def test_other_ids_are_left_as_they_are(ids, num_segments):
    ids = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(refuse_numbers_of_rows(ids, num_segments), ids)


def test_a_fixed_label_asks_for_no_numbers():
    model, ids = tiny_model(mode="fixed"), tokens(3, 7)
    assert model(ids, segment_ids=ANEW, label_scores=scores(6)).logits.isfinite().all()
