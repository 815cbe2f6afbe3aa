"""benchmarks.generation: each method is what it is called, and goes through the same tokens."""

import argparse

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from rich.console import Console
from tiny import tiny_model

from auxkernels.models.token_choice import TokenChoice
from benchmarks import generation
from benchmarks.training.terminal import Terminal


@pytest.fixture
def base(monkeypatch):
    made = tiny_model("llama", width=32)
    monkeypatch.setattr(generation.pretrained, "load", lambda *_: (made, None))
    monkeypatch.setattr(generation, "windows", lambda _, __, length, rows, ___: torch.randint(2, 61, (rows, length)))
    return made


def test_the_fused_method_alone_chooses_from_sources(base, monkeypatch):
    asked, of_method, choose, medians = [], {}, TokenChoice.__call__, generation._medians

    def counted(self, *args):
        asked.append(self.position)
        return choose(self, *args)

    def one_by_one(methods, rounds, advance):
        for name, run in methods.items():
            asked.clear()
            run()
            of_method.setdefault(name, []).append(len(asked))
        return medians(methods, rounds, advance)

    monkeypatch.setattr(TokenChoice, "__call__", counted)
    monkeypatch.setattr(generation, "_medians", one_by_one)
    arguments = argparse.Namespace(model=None, gguf_file=None, dtype="float32", rows=[1, 2], length=5, new=4, rounds=1)
    found = generation.compare(arguments, Terminal())
    assert [(row["rows"], row["call"]) for row in found] == [(n, call) for n in (1, 2) for call in generation.CALLS]
    calls = 2 * len(generation.CALLS)
    assert of_method == {"fused": [4] * calls, "transformers": [0] * calls, "models": [0] * calls}
    console = Console(width=120, record=True)
    console.print(generation.table(found))
    assert console.export_text().count("%") == 2 * calls


def test_models_alone_read_every_token_once(base):
    aux, read = tiny_model("gpt2"), []
    for model in (base, aux):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: read.append((type(module), args[0].shape[1])), with_kwargs=True
        )
    generation.run_models(base, aux, torch.randint(2, 61, (2, 5)), torch.randint(2, 61, (2, 3)))
    for model in (base, aux):
        assert [length for kind, length in read if kind is type(model)] == [5, 1, 1]
