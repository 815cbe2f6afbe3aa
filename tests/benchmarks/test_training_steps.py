"""The steps of benchmarks.training_steps: the same loss by every method that has the same auxiliary."""

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")

from tiny import tiny_model

from benchmarks import pretrained, training_steps
from benchmarks.training_steps import CACHED, EAGER, GROUP_CACHED, GROUP_ONLINE, ONLINE, SHARED


def test_every_method_trains_on_the_same_loss(monkeypatch, tmp_path):
    losses, backward = [], torch.Tensor.backward

    def kept(loss, *args, **kwargs):
        losses.append(loss.item())
        return backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", kept)
    methods = training_steps.methods_of(tiny_model("llama"), torch.randint(2, 61, (3, 9)), str(tmp_path / "cache"), 3)
    assert list(methods) == [EAGER, ONLINE, CACHED, SHARED, GROUP_ONLINE, GROUP_CACHED]
    assert [method.num_auxiliaries for method in methods.values()] == [1, 1, 1, 1, 3, 3]
    for method in methods.values():
        method.step()
    eager, online, cached, shared, group_online, group_cached = losses
    assert online == cached == shared  # at the start all of them are the base
    assert group_online == group_cached
    torch.testing.assert_close(group_online, 3 * online, rtol=1e-6, atol=0)
    torch.testing.assert_close(eager, online, rtol=1e-5, atol=0)
    del losses[:]
    for method in methods.values():
        method.step()
    eager_after, online_after, cached_after, shared_after, group_online_after, group_cached_after = losses
    assert online_after == cached_after != shared_after and online_after < online and shared_after < shared
    assert group_online_after == group_cached_after < group_online
    torch.testing.assert_close(eager_after, online_after, rtol=1e-4, atol=0)


def test_under_autocast_a_cache_gives_the_losses_of_the_whole_base(monkeypatch, tmp_path):
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (losses.append(loss.item()), backward(loss)))
    base, tokens = tiny_model("llama").to(torch.bfloat16), torch.randint(2, 61, (3, 9))
    methods = training_steps.methods_of(base, tokens, str(tmp_path / "cache"), 2, autocast=True)
    for method in (*methods.values(), *methods.values()):
        method.step()
    after = dict(zip(methods, losses[len(methods) :], strict=True))
    assert after[ONLINE] == after[CACHED] and after[GROUP_ONLINE] == after[GROUP_CACHED]


def test_without_a_model_it_is_the_packaged_one(monkeypatch):
    monkeypatch.setattr(pretrained, "load_language_model", lambda dtype: dtype)
    assert pretrained.load(None, None, torch.bfloat16) is torch.bfloat16


def test_the_table_has_each_method_beside_eager():
    methods = {EAGER: (2.0, 1, 4_000_000), ONLINE: (1.0, 1, None), GROUP_ONLINE: (1.0, 4, None)}
    rows = {
        name: {
            "auxiliaries": count,
            "step_seconds": seconds,
            "tokens_per_second": count * 27 / seconds,
            "peak_bytes": peak,
        }
        for name, (seconds, count, peak) in methods.items()
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = {"tokens_per_step": 27, "dtype": "float32", "autocast": False, "methods": rows}
    console.print(training_steps.table(found))
    lines = console.export_text().splitlines()
    assert any(all(word in line for word in (EAGER, "14", "1.00", "4")) for line in lines)
    assert any(all(word in line for word in (ONLINE, "27", "2.00", "unknown")) for line in lines)
    assert any(all(word in line for word in (GROUP_ONLINE, "108", "8.00", "unknown")) for line in lines)


def test_one_step_alone_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_steps", "model", "--steps", "1"])
    with pytest.raises(SystemExit):
        training_steps.main()
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err
