"""generate(): plans at the ends of segments, equal to a loop without a cache that conditions every prefix anew."""

import pytest
import torch
from generation import Draws
from segment_ends import ENDS, end_by_sum, ends_by_sum, ends_by_token, scores_of

pytest.importorskip("transformers")

import transformers
from network import assert_same_network
from planner_models import ARCHITECTURES, VOCAB, scores, tiny_model, tokens


def plan_of_prefix(row: list[int], ends) -> tuple[list[list[float]], list[int]]:
    """The plans of one row without padding, and which one each of its tokens carries."""
    plans, carried = [], []
    for n in range(1, len(row) + 1):
        if n == 1 or ends(row[:n]):
            plans.append(scores_of(torch.tensor([row[:n]]), torch.ones(1, n, dtype=torch.int64))[0].tolist())
        carried.append(len(plans) - 1)
    return plans, carried


def next_logits(model, row: list[int], mode: str = "soft", ends=ends_by_token) -> torch.Tensor:
    plans, carried = plan_of_prefix(row, ends)
    label_source = {"label_scores": torch.tensor(plans)}
    call = {"segment_ids": torch.tensor([carried]), "segments_are_aligned": True, "mode": mode, **label_source}
    return model(torch.tensor([row]), use_cache=False, **call).logits[0, -1]


def greedy_loop(model, row: list[int], count: int, mode: str = "soft", ends=ends_by_token) -> list[int]:
    for _ in range(count):
        row = [*row, int(next_logits(model, row, mode, ends).argmax())]
    return row


def generate(model, ids, count=10, **options):
    options = {"planner_fn": scores_of, "is_segment_end": ENDS, "do_sample": False, **options}
    options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=count, eos_token_id=-1, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["soft", "hard", "gumbel"])
def test_greedy_generation_equals_the_loop_without_a_cache(architecture, mode):
    model, ids = tiny_model(architecture, mode=mode), tokens(3, 6)
    assert generate(model, ids).tolist() == [greedy_loop(model, row, 10, mode) for row in ids.tolist()]
    want = [greedy_loop(model, row, 10, mode, ends_by_sum) for row in ids.tolist()]
    assert sum(ends_by_sum(row[:n]) for row in want for n in range(6, 17)) > 5  # plans do change while generating
    assert generate(model, ids, is_segment_end=end_by_sum).tolist() == want
    assert generate(model, ids, is_segment_end=end_by_sum, use_cache=False).tolist() == want


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_changes_no_row(architecture):
    model, prompts = tiny_model(architecture), [tokens(1, n)[0].tolist() for n in (3, 7, 5)]
    ids = torch.tensor([[0] * (7 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in prompts])
    lengths = []

    def planner_fn(tokens_so_far, attention_mask):
        lengths.append(tokens_so_far.shape[1])
        return scores_of(tokens_so_far, attention_mask)

    ends = {*ENDS, 0}  # padding that looks like the end of a segment is none
    out = generate(
        model,
        ids,
        attention_mask=mask,
        planner_fn=planner_fn,
        is_segment_end=ends,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, prompt in enumerate(prompts):
        whole = out.sequences[row, 7 - len(prompt) :].tolist()
        for step, got in enumerate(out.logits):
            want = next_logits(model, whole[: len(prompt) + step], ends=lambda prefix: prefix[-1] in ends)
            assert_same_network(got[row], want)
    starts = [7 - len(prompt) for prompt in prompts]
    columns = {
        n
        for start, prompt in zip(starts, prompts, strict=True)
        for n, token in enumerate(prompt, start)
        if n == start or token in ends
    }
    assert [n - 1 for n in lengths if n <= 7] == sorted(columns)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_each_step_equal_those_of_the_loop(architecture):
    model, ids = tiny_model(architecture), tokens(2, 6)
    out = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    for row in range(2):
        for step, got in enumerate(out.logits):
            want = next_logits(model, out.sequences[row, : 6 + step].tolist())
            assert_same_network(got[row], want)


def test_sampling_equals_the_loop_with_the_same_draws():
    model, ids = tiny_model(), tokens(2, 6)
    torch.manual_seed(5)
    got = generate(model, ids, do_sample=True, top_k=0)
    torch.manual_seed(5)
    rows, draw = ids.tolist(), Draws(2, 6)
    for _ in range(10):
        drawn = draw(torch.stack([next_logits(model, row) for row in rows]))
        rows = [[*row, token] for row, token in zip(rows, drawn[:, 0].tolist(), strict=True)]
    assert got.tolist() == rows
    several = generate(model, ids, do_sample=True, num_return_sequences=3)
    assert several.shape == (6, 16) and len({tuple(row) for row in several.tolist()}) == 6


def test_static_cache_equals_the_loop():
    model, ids = tiny_model(), tokens(2, 6)
    want = [greedy_loop(model, row, 10) for row in ids.tolist()]
    assert generate(model, ids, cache_implementation="static", disable_compile=True).tolist() == want


def test_continuation_from_a_cache_equals_the_loop():
    model, ids = tiny_model(), tokens(2, 6)
    first = generate(model, ids, 4, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, tokens(2, 2)), 1)
    got = generate(model, longer, 5, past_key_values=first.past_key_values)
    assert got.tolist() == [greedy_loop(model, row, 5) for row in longer.tolist()]


def test_planner_is_called_only_where_a_row_begins_a_segment():
    model, ids, lengths = tiny_model(), torch.tensor([[40, 3, 41, 42], [40, 43, 41, 5]]), []

    def planner_fn(tokens_so_far, attention_mask):
        assert attention_mask.shape == tokens_so_far.shape
        lengths.append(tokens_so_far.shape[1])
        return scores(2)

    generate(model, ids, 1, planner_fn=planner_fn)
    assert lengths == [1, 2, 4]


def test_labels_may_be_given_instead_of_scores():
    model, ids = tiny_model(mode="hard"), tokens(2, 6)
    by_labels = generate(model, ids, planner_fn=lambda t, mask: scores_of(t, mask).argmax(-1))
    assert torch.equal(by_labels, generate(model, ids))


def test_fixed_label_is_carried_throughout():
    model, ids = tiny_model("gpt2", fixed_label=2), tokens(2, 6)
    row = ids
    for _ in range(5):
        logits = model(row, mode="fixed", use_cache=False).logits
        row = torch.cat((row, logits[:, -1:].argmax(-1)), 1)
    got = model.generate(ids, mode="fixed", max_new_tokens=5, do_sample=False, eos_token_id=-1)
    assert torch.equal(got, row)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams must be 1"),
        (
            {"generation_config": transformers.GenerationConfig(num_beams=3)},
            "num_beams must be 1 with a planner_fn, got 3",
        ),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens cannot be used"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size cannot be used"),
        ({"planner_fn": None}, "mode 'soft' needs planner_fn and is_segment_end"),
        ({"is_segment_end": None}, "needs planner_fn and is_segment_end"),
        ({"mode": "fixed"}, "mode 'fixed' uses no planner_fn"),
        ({"mode": "softest"}, "mode must be one of"),
        ({"planner_fn": lambda t, mask: scores(2)[:, :3]}, r"must be \[segments, 7\]"),
    ],
)
def test_wrong_calls_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), tokens(2, 6), **options)


def test_wrong_results_of_the_callables_say_what_is_wrong():
    with pytest.raises(TypeError, match="planner_fn must return a tensor with 2 rows"):
        generate(tiny_model(), tokens(2, 6), planner_fn=lambda t, mask: scores(1))
    with pytest.raises(TypeError, match="is_segment_end must return a bool tensor"):
        generate(tiny_model(), tokens(2, 6), is_segment_end=lambda t: True)


def test_rewritten_tokens_are_refused():
    from auxkernels.models.planner_generation import SegmentPlans

    plans = SegmentPlans(lambda given: torch.zeros(2, len(given), 4), scores_of, ENDS)
    ids = tokens(2, 5)
    plans.advance(ids, None)
    with pytest.raises(ValueError, match="only appends tokens"):
        plans.advance(torch.cat((ids.flip(0), ids[:, :1]), 1), None)
    with pytest.raises(ValueError, match="needs all tokens so far"):
        plans.advance(ids, torch.ones(2, 9))
    assert max(ENDS) < VOCAB
