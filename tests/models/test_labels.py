"""Labels of segments: sentences, tokens of sentences, batches, k-means and nearest centroids."""

import builtins

import pytest
import torch

pytest.importorskip("transformers")

from auxkernels.models.labels import (
    collate_segments,
    embed,
    fit_codebook,
    nearest_labels,
    segment_ids_of_ends,
    segment_ids_of_offsets,
    split_sentences,
)


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith met Dr. J. R. Jones. They spoke, e.g. of No. 5.", None),
        ('"Is it so?" he asked. "Yes!" She left.', ['"Is it so?" he asked.', '"Yes!"', "She left."]),
        ("It cost 3.5 dollars... Then (at 5 p.m. or so.) Nothing.", None),
        ("A title\n\nA text. \n\n\n", ["A title", "A text."]),
        ("", []),
        ("  \n ", []),
        ("no capital. follows", ["no capital. follows"]),
        ("Il a dit non. Éva partit.", ["Il a dit non.", "Éva partit."]),
    ],
)
def test_sentences_end_at_stops_before_what_can_begin_one(text, sentences):
    got = split_sentences(text)
    if sentences is None:
        sentences = {
            "M": ["Mr. Smith met Dr. J. R. Jones.", "They spoke, e.g. of No. 5."],
            "I": ["It cost 3.5 dollars...", "Then (at 5 p.m. or so.)", "Nothing."],
        }[text[0]]
    assert got == sentences
    assert "".join("".join(got).split()) == "".join(text.split())  # nothing lost


@pytest.mark.timeout(20)  # quadratic time would be minutes
def test_a_long_text_is_split_in_linear_time():
    text = "A word and another word, and so on, Mr. Best said. " * 20_000
    assert len(split_sentences(text)) == 20_000
    assert len(split_sentences("." * 100_000 + " " * 100_000 + "\n" * 100_000 + "'" * 100_000)) == 2


def test_tokens_belong_to_the_sentence_of_their_last_character():
    text = "  One two.  Three\tfour!"
    #                special  "  "    "One"   " two"  "."      "  "     "Three"   " four"   "!"      special
    offsets = [(0, 0), (0, 2), (2, 5), (5, 9), (9, 10), (10, 12), (12, 17), (17, 22), (22, 23), (0, 0)]
    assert segment_ids_of_offsets(text, offsets) == [-1, 0, 0, 0, 0, 0, 1, 1, 1, -1]
    leading_space = [(2, 5), (5, 9), (9, 10), (10, 17)]  # "  Three" begins before its sentence does
    assert segment_ids_of_offsets(text, leading_space) == [0, 0, 0, 1]
    own = ["One", "two.", "Three four!"]
    with pytest.raises(ValueError, match=r"sentences\[2\] is not in the text"):
        segment_ids_of_offsets(text, offsets, own)
    assert segment_ids_of_offsets(text, leading_space, ["One", "two.  Three"]) == [0, 1, 1, 1]
    assert segment_ids_of_offsets("a a. a", [(0, 1), (2, 4), (5, 6)], ["a", "a.", "a"]) == [0, 1, 2]


def test_segments_of_ends_are_numbered_over_the_batch():
    ends = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    assert segment_ids_of_ends(ends).tolist() == [[0, 0, 0, 1, 1], [2, 3, 3, 4, 4], [5, 5, 5, 5, 5]]
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert segment_ids_of_ends(ends, mask).tolist() == [[-1, 0, 0, 1, 1], [2, 3, 3, -1, -1], [-1] * 5]
    with pytest.raises(TypeError, match="must be bool"):
        segment_ids_of_ends(ends.long())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_numbers_segments_through_and_pads(side):
    batch = collate_segments(
        [
            {"input_ids": [5, 6, 7], "segment_ids": [0, 1, 1], "label_ids": [3, 4, 5]},
            {"input_ids": [8, 9], "segment_ids": [-1, 0], "label_ids": [6], "labels": [-100, 9]},
        ],
        pad_token_id=0,
        padding_side=side,
    )

    def padded(row, fill):
        return [*row, fill] if side == "right" else [fill, *row]

    assert batch["input_ids"].tolist() == [[5, 6, 7], padded([8, 9], 0)]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], padded([1, 1], 0)]
    assert batch["labels"].tolist() == [[5, 6, 7], padded([-100, 9], -100)]
    assert batch["segment_ids"].tolist() == [[0, 1, 1], padded([-1, 3], -1)]  # segment 2 has no tokens
    assert batch["label_ids"].tolist() == [3, 4, 5, 6]


def test_batches_that_do_not_fit_say_so():
    good = {"input_ids": [5, 6], "segment_ids": [0, 1], "label_scores": torch.randn(2, 3)}
    assert collate_segments([good, good], 0)["label_scores"].shape == (4, 3)
    assert collate_segments([{**good, "label_scores": torch.randn(2, 3)}], 0)["segment_ids"].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=r"examples\[0\] has 2 segments, but 1 label_ids"):
        collate_segments([{"input_ids": [5, 6], "segment_ids": [0, 1], "label_ids": [3]}], 0)
    with pytest.raises(ValueError, match="every example or for none"):
        collate_segments([good, {"input_ids": [5], "segment_ids": [0]}], 0)
    with pytest.raises(ValueError, match="padding_side"):
        collate_segments([good], 0, "both")


def test_embeddings_come_from_the_users_encoder_in_batches():
    sizes = []

    def encoder(strings):
        sizes.append(len(strings))
        return torch.tensor([[len(s), s.count("a")] for s in strings], dtype=torch.float64)

    got = embed(["a", "banana", "b"], encoder, batch_size=2)
    assert got.dtype == torch.float32 and got.tolist() == [[1, 1], [6, 3], [1, 0]] and sizes == [2, 1]
    assert torch.equal(embed(["a"], lambda strings: encoder(strings).numpy()), got[:1])
    with pytest.raises(ValueError, match="encoder must return"):
        embed(["a", "b"], lambda strings: torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least one"):
        embed([], encoder)


def clusters(count=4, each=50):
    centres = 10 * torch.randn(count, 5)
    return centres, (centres.repeat_interleave(each, 0) + 0.1 * torch.randn(count * each, 5))


@pytest.mark.parametrize("batch_size", [None, 64])
def test_k_means_finds_well_separated_clusters_and_repeats(batch_size):
    pytest.importorskip("sklearn")
    centres, points = clusters()
    codebook = fit_codebook(points, 4, seed=1, batch_size=batch_size)
    assert codebook.centroids.dtype == torch.float32
    assert torch.cdist(centres, codebook.centroids).min(1).values.max() < 0.2
    labels = codebook.labels(points).view(4, 50)
    assert (labels == labels[:, :1]).all() and len(set(labels[:, 0].tolist())) == 4
    again = fit_codebook(points, 4, seed=1, batch_size=batch_size)
    assert torch.equal(again.centroids, codebook.centroids)


def test_k_means_refuses_what_it_cannot_serve():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="n >= num_labels = 5"):
        fit_codebook(torch.randn(4, 3), 5)
    with pytest.raises(ValueError, match="finite"):
        fit_codebook(torch.full((4, 3), torch.nan), 2)


def test_k_means_without_scikit_learn_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"auxkernels\[labels\]"):
        fit_codebook(torch.randn(4, 3), 2)


@pytest.mark.parametrize("offset", [0.0, 300.0])  # far from the origin, squares lose digits
def test_nearest_label_is_that_of_the_distances_in_float64(offset):
    points, centroids = torch.randn(1000, 16) + offset, torch.randn(37, 16) + offset
    want = torch.cdist(points.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    for chunk_size in (1, 7, 8192):
        assert torch.equal(nearest_labels(points[:100], centroids, chunk_size), want[:100])
    assert torch.equal(nearest_labels(points, centroids), want)
    assert nearest_labels(points[:0], centroids).shape == (0,)
    with pytest.raises(ValueError, match="must be"):
        nearest_labels(points, centroids[:, :3])
