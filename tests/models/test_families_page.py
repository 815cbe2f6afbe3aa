"""docs/models.md says what is found: a sample of the families, or with AUXKERNELS_TEST_ALL_FAMILIES=1 all of them."""

import os

import families
import pytest
from family_configs import EXCEPTIONS
from family_trials import COLUMNS, WORKS, Wrong, check_close, check_greedy, results_of

transformers = pytest.importorskip("transformers")

TEXT = families.PAGE.read_text()
STATED = families.read(TEXT)
# quick ones of each kind: attention, mixtures, states, own caches or none, layers before the head, images, refusals
SAMPLE = (
    "bert",
    "cpmant",
    "deepseek_v4",
    "gemma3",
    "gpt2",
    "inkling_text",
    "llava",
    "mllama",
    "mixtral",
    "openai-gpt",
    "qwen4_exp_text",
    "reformer",
    "roberta",
    "xlnet",
    "xlstm",
)
IS_WHOLE = os.environ.get("AUXKERNELS_TEST_ALL_FAMILIES") == "1"


def _of_other_version() -> str | None:
    stated = families.version_of(TEXT)
    return None if stated == transformers.__version__ else f"the page is of transformers {stated}"


@pytest.mark.slow
@pytest.mark.skipif(_of_other_version() is not None, reason=str(_of_other_version()))
@pytest.mark.parametrize("family", sorted(families.families()) if IS_WHOLE else SAMPLE)
def test_the_page_says_what_is_found(family):
    assert results_of(family) == STATED[family]


@pytest.mark.skipif(_of_other_version() is not None, reason=str(_of_other_version()))
def test_the_page_has_every_family():
    assert STATED.keys() == families.families().keys()


def test_no_family_computes_something_wrong_or_fails_without_a_reason():
    cells = {cell for result in STATED.values() if isinstance(result, dict) for cell in result.values()}
    assert not [cell for cell in cells if cell.startswith(("WRONG", "FAILS"))]


def test_a_page_is_read_as_it_was_written():
    version = families.version_of(TEXT)
    assert families.written(STATED, version) == families.between_markers(TEXT)
    works = dict.fromkeys(COLUMNS, WORKS) | {"cache": "kept"}
    results = {
        "a": works,
        "b": works | {"cache": "none"},
        "c": works | {"planner": "refused: why | not"},
        "d": "no reason",
    }
    page = f"{families.BEGIN}\n\n{families.written(results, '0.0')}\n\n{families.END}"
    assert families.read(page) == results


@pytest.mark.skipif(_of_other_version() is not None, reason=str(_of_other_version()))
def test_exceptions_are_of_known_families():
    assert not EXCEPTIONS.keys() - set(transformers.CONFIG_MAPPING)


def test_trials_see_wrong_logits_and_wrong_tokens():
    import torch
    from tiny import tiny_model

    model, tokens = tiny_model("llama"), torch.randint(2, 50, (2, 6))
    logits = model(tokens).logits
    with pytest.raises(Wrong, match="off by"):
        check_close(logits + 0.01 * logits.abs().max(), logits, "logits")
    check_greedy(model, lambda ids: model(ids).logits, tokens)
    with pytest.raises(Wrong, match="not the likeliest, use_cache=True"):
        check_greedy(model, lambda ids: -model(ids).logits, tokens)
