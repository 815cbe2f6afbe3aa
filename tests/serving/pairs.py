"""Folders of small random pairs, as `AuxiliaryForCausalLM` saves them, and plain sums of their logits."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from auxkernels.models import AuxiliaryForCausalLM

VOCABULARY = 512
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _sizes(layers, hidden, heads, kv_heads, head_dim, vocab_size=VOCABULARY, tied=False, positions=512, **more):
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
        **_TOKENS,
        **more,
    }


def llama(*sizes, **more):
    return LlamaConfig(**_sizes(*sizes, **more))


def qwen(*sizes, **more):
    return Qwen3Config(**_sizes(*sizes, **more))


def gemma(*sizes, **more):
    """Half of the layers have a window of 32 tokens; the head is tied."""
    kinds = ["sliding_attention", "full_attention"] * (sizes[0] // 2)
    more = {"sliding_window": 32, "layer_types": kinds, "query_pre_attn_scalar": sizes[4], "tied": True} | more
    return Gemma3TextConfig(**_sizes(*sizes, **more))


def mistral(*sizes, **more):
    """A window of 32 tokens in all layers, without layer_types."""
    return MistralConfig(**_sizes(*sizes, sliding_window=32, **more))


def gpt2(layers=3, heads=2, width=64, positions=512):
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        n_positions=positions,
        initializer_range=0.1,
        **_TOKENS,
    )


BASE = llama(4, 128, 2, 1, 64)
SMALL = llama(2, 96, 3, 3, 32)


@dataclass
class Pair:
    """How a pair is joined. options: of `from_base_and_aux`; pointed: the base is in a folder of its own."""

    base: object
    aux: object
    options: dict = field(default_factory=dict)
    pointed: bool = False


PAIRS = {
    "equal": Pair(BASE, llama(4, 128, 2, 1, 64)),
    "fewer-layers": Pair(BASE, llama(2, 128, 2, 1, 64), pointed=True),
    "narrower": Pair(BASE, llama(2, 96, 2, 1, 64)),
    "more-key-heads": Pair(BASE, llama(2, 96, 4, 2, 64)),
    "other-query-heads": Pair(BASE, llama(2, 96, 4, 1, 64)),
    "other-head-size": Pair(BASE, SMALL),
    "larger-pages": Pair(BASE, llama(3, 96, 3, 3, 96)),
    "tied-head": Pair(BASE, llama(2, 96, 3, 3, 32, tied=True)),
    "qwen3": Pair(BASE, qwen(2, 96, 3, 3, 32, tied=True)),
    "gpt2": Pair(BASE, gpt2()),
    "gpt2-base": Pair(gpt2(), SMALL),
    "windows-in-base": Pair(gemma(4, 128, 2, 1, 64), SMALL),
    "windows-in-aux": Pair(BASE, gemma(4, 96, 3, 3, 32)),
    "window-of-base": Pair(mistral(4, 128, 2, 1, 64), llama(3, 96, 3, 3, 32)),
    "window-of-aux": Pair(BASE, mistral(3, 96, 3, 3, 32)),
    "narrower-vocabulary": Pair(BASE, llama(2, 96, 3, 3, 32, vocab_size=480), {"vocab_policy": "pad"}),
    "wider-vocabulary": Pair(BASE, llama(2, 96, 3, 3, 32, vocab_size=576), {"vocab_policy": "pad"}),
    "trunk-0": Pair(BASE, qwen(2, 96, 3, 3, 32, tied=True), {"trunk_layer": 0}),
    "trunk-2": Pair(BASE, SMALL, {"trunk_layer": 2}),
    "trunk-4": Pair(BASE, SMALL, {"trunk_layer": 4}),
    "trunk-of-gpt2": Pair(gpt2(), SMALL, {"trunk_layer": 3}),
    "shared-head": Pair(BASE, SMALL, {"head": "shared"}),
    "shared-head-behind-trunk": Pair(BASE, SMALL, {"head": "shared", "head_rank": 8, "trunk_layer": 2}),
    "shared-capped-head": Pair(gemma(4, 128, 2, 1, 64, final_logit_softcapping=5.0), SMALL, {"head": "shared"}),
    "low-rank-head": Pair(BASE, llama(2, 96, 3, 3, 32, tied=True), {"head": "low_rank", "head_rank": 8}),
    "low-rank-head-behind-trunk": Pair(BASE, SMALL, {"head": "low_rank", "head_rank": 8, "trunk_layer": 0}),
}
SCALE = 0.7


def make(name: str, folder: Path, seed: int = 0, **options) -> Path:
    """Saves a pair to folder/name, with its base inside it or in folder/name-base. options: over the pair's."""
    pair = PAIRS[name]
    torch.manual_seed(seed)
    base, aux = (AutoModelForCausalLM.from_config(config).eval() for config in (pair.base, pair.aux))
    made = folder / name
    if pair.pointed:
        base.save_pretrained(f"{made}-base")
        base = AutoModelForCausalLM.from_pretrained(f"{made}-base")
    options = {"aux_scale": SCALE, **pair.options, **options}
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init="head" in options, **options).eval()
    if "head" in options:  # new ones are zeros
        for weight in model.aux_head.parameters():
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(made, save_base=not pair.pointed)
    return made


def change_weights(path: Path, change) -> None:
    """Rewrites a file of weights by a function of their dict."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# -- plain sums --------------------------------------------------------------------------------------------------------


class Sums:
    """Logits of a folder's models, each run by transformers without a cache, in float64 and in their own dtype."""

    def __init__(self, folder: Path, **loading) -> None:
        self.own = AuxiliaryForCausalLM.from_pretrained(folder, **loading)
        self.exact = AuxiliaryForCausalLM.from_pretrained(folder, **loading).double()
        self.width = self.own.config.num_valid_tokens

    def log_probs(self, tokens: list[int], scale: float | None = None) -> tuple[torch.Tensor, float]:
        """[n, valid] float64, and the largest error of the same in the models' own dtype."""
        exact, own = (self._of(model, tokens, scale) for model in (self.exact, self.own))
        return exact, (own - exact).abs().max().item()

    @torch.no_grad()
    def _of(self, model, tokens, scale):
        scale, ids = model.config.aux_scale if scale is None else scale, torch.tensor([tokens])
        read = model.base(ids, output_hidden_states=True)
        inputs = {"input_ids": ids}
        if model.config.trunk_layer is not None:
            inputs = {"inputs_embeds": model.trunk_projection(read.hidden_states[model.config.trunk_layer])}
        if model.config.head == "own":
            total = read.logits[0, :, : self.width] + scale * model.aux(**inputs).logits[0, :, : self.width]
            return total.double().log_softmax(-1)
        h_aux = model.aux.base_model(**inputs).last_hidden_state
        added = model.aux_head(h_aux)
        if model.config.head == "low_rank":
            return (read.logits[0, :, : self.width] + scale * added[0]).double().log_softmax(-1)
        logits = model.base.get_output_embeddings()(read.hidden_states[-1] + scale * added)[0, :, : self.width]
        cap = getattr(model.base.config, "final_logit_softcapping", None)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).double().log_softmax(-1)
