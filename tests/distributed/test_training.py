"""DistributedDataParallel, FSDP2 and tensor parallelism: many processes train as one does."""

import numpy
import parallel_training
import pytest
import torch
from safetensors.torch import load_file

ARCHITECTURES = ("gpt2", "llama")


@pytest.mark.parametrize("size", [2, 3])
def test_average_of_a_known_gradient(running, size):
    """What the other tests compare would hide a gloo that sums where it should average."""
    want = sum(range(1, size + 1)) / size
    assert running.run(size, parallel_training.gradient_of_known) == [pytest.approx(want)] * size


def check_curves(running, size, kind, architecture, is_tied, accumulate, way):
    found = running.run(size, parallel_training.trained_by_many, kind, architecture, is_tied, accumulate, way)
    check_curves_of(found, kind, architecture, is_tied, accumulate)


def check_curves_of(found, kind, architecture, is_tied, accumulate):
    want, untrained = (
        parallel_training.trained(parallel_training.new_model(kind, architecture, is_tied), kind, accumulate, rate=rate)
        for rate in (0.3, 0.0)
    )
    assert all(curve == found[0] for curve in found)
    assert want[-1] < untrained[-1] - 1e-4  # a hundred times what curves may differ by
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(want), rtol=0.0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
def test_curve_is_that_of_one_process(running, kind, architecture, is_tied, accumulate, way):
    check_curves(running, 2, kind, architecture, is_tied, accumulate, way)


@pytest.mark.slow
@pytest.mark.parametrize("kind, architecture", [("auxiliary", "gpt2"), ("planner", "llama")])
@pytest.mark.parametrize("size, way", [(2, "FSDP2, frozen parts too"), (4, "HSDP"), (4, "FSDP2")])
def test_curve_of_other_meshes_and_frozen_parts(running, kind, architecture, size, way):
    check_curves(running, size, kind, architecture, True, 1, way)


@pytest.mark.slow
@pytest.mark.parametrize("kind, parts", [("auxiliary", "all"), ("auxiliary", "auxiliary's head"), ("planner", "all")])
def test_curve_under_tensor_parallelism(running, kind, parts):
    curves, kinds = zip(*running.run(2, parallel_training.trained_by_cutting, kind, parts), strict=True)
    assert kinds[0] == ({"ParallelHead", "OutputHead"} if parts == "auxiliary's head" else {"ParallelHead"})
    check_curves_of(curves, kind, "llama", False, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind, accumulate", [("auxiliary", 1), ("auxiliary", 4), ("planner", 1)])
def test_curve_under_both(running, kind, accumulate):
    curves, kinds = zip(*running.run(4, parallel_training.trained_by_both, kind, accumulate), strict=True)
    assert kinds[0] == {"ParallelHead"}
    check_curves_of(curves, kind, "llama", False, accumulate)


def test_generation_under_tensor_parallelism(running):
    model = parallel_training.new_model("auxiliary", "llama", False).eval()
    want = model.generate(torch.arange(3, 8).unsqueeze(0), max_new_tokens=8, do_sample=False)[0].tolist()
    assert running.run(2, parallel_training.generated_by_cutting) == [want] * 2


def test_label_statistics_are_of_the_segments_of_all(running):
    counts = [3, 5]
    want = parallel_training.balanced(None, counts)
    for found in running.run(2, parallel_training.balanced, counts):
        for got, expected in zip(found, want, strict=True):
            numpy.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_logits_are_stored_beside_a_sharded_head(running, architecture, is_tied):
    found = running.run(2, parallel_training.kinds_of_heads, architecture, is_tied)
    assert found == [({"OutputHead"}, 0)] * 2


@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
@pytest.mark.parametrize("is_frozen_sharded", [False, True])
def test_what_many_save_is_what_one_saves(running, tmp_path, kind, is_frozen_sharded):
    option = {"auxiliary": "save_base", "planner": "save_lm"}[kind]
    one = parallel_training.new_model(kind, "llama", True)
    parallel_training.trained(one, kind, 1)
    one.save_pretrained(tmp_path / "one", **{option: True})
    running.run(2, parallel_training.saved, kind, str(tmp_path / "many"), is_frozen_sharded, {option: True})
    assert files(tmp_path / "many") == files(tmp_path / "one")
    for file in (tmp_path / "one").rglob("*.safetensors"):
        want, found = load_file(file), load_file(tmp_path / "many" / file.relative_to(tmp_path / "one"))
        assert want.keys() == found.keys()
        for name, weight in want.items():
            torch.testing.assert_close(found[name], weight, rtol=0.0, atol=1e-6, msg=name)


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_failed_save_is_an_error_on_all(running, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = running.tried(2, parallel_training.saved_on_the_base, str(tmp_path))
    assert [error[0] for _, error in found] == [ValueError, RuntimeError]
    assert "save_directory" in found[1][1][1]
