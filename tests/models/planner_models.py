"""Tiny planner-conditioned models, and the conditioning written out token by token."""

import copy

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from auxkernels.models.planner import PlannerForCausalLM

VOCAB, NUM_LABELS, LABEL_DIM, FEATURES, NUM_LAYERS = 61, 7, 6, 5, 4
ARCHITECTURES = ("gpt2", "llama")
# two rows, six segments: 2 has no tokens, 5 is at the end of the padding, negative ids are tokens of no segment
SEGMENT_IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 3, 3], [-1, 4, 4, 4, -1, -1, 0, 5, -1]])
NUM_SEGMENTS = 6


def tiny_lm(architecture: str, dtype: torch.dtype = torch.float32, **options):
    """A random language model in eval mode, 4 layers."""
    special = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=NUM_LAYERS, n_head=2, n_positions=64, **special, **options)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(**{**sizes, **special, **options}, num_hidden_layers=NUM_LAYERS)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # larger than the usual start, so that differences are far above rounding
        for weight in lm.parameters():
            weight.mul_(4.0) if weight.dim() == 2 else None
    return lm.eval()


class TinyPlanner(torch.nn.Module):
    """Features [S, F] to scores [S, K]."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(FEATURES, NUM_LABELS)

    def forward(self, features):
        return self.head(features)


def tiny_model(architecture: str = "llama", lm=None, planner=None, **options) -> PlannerForCausalLM:
    """A model in eval mode whose conditioning matters: its weights are random, whatever they start with."""
    lm = tiny_lm(architecture) if lm is None else lm
    model = PlannerForCausalLM.from_lm(
        lm, planner or TinyPlanner(), num_labels=NUM_LABELS, label_dim=LABEL_DIM, **options
    )
    with torch.no_grad():
        for weight in model.conditioning.parameters():
            weight.normal_()
    return model.eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length))


def scores(segments: int = NUM_SEGMENTS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2.0 * torch.randn(segments, NUM_LABELS, dtype=dtype)


def label_weights(mode: str, given: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The weight of each label in each segment's embedding, [S, K], from scores [S, K] or labels [S]."""
    if not given.is_floating_point():
        return torch.nn.functional.one_hot(given, NUM_LABELS).float()
    soft = torch.softmax(given / temperature, dim=-1)
    hard = torch.nn.functional.one_hot(given.argmax(-1), NUM_LABELS).to(given.dtype)
    if mode == "hard":
        return hard
    return (hard - soft).detach() + soft if mode == "straight_through" else soft


def reference_logits(model, input_ids, segment_ids, weights, **inputs) -> torch.Tensor:
    """The logits where every token's addition is computed by itself; segment_ids as the user numbers them."""
    lm, table = copy.deepcopy(model.lm), model.conditioning  # the copied hooks add nothing: the copy is no one's
    layers = next(m for m in lm.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == NUM_LAYERS)
    batch, length = segment_ids.shape

    def add(n):
        added = []
        for row in range(batch):
            for t in range(length):
                segment = int(segment_ids[row, t + 1] if t + 1 < length else segment_ids[row, t])
                if segment < 0:
                    added.append(torch.zeros_like(table.bias[n]))
                    continue
                embedding = weights[segment] @ table.codebooks[n]
                step = table.weight[n] @ embedding + table.bias[n]
                added.append(step if table.gate is None else table.gate[n] * step)
        added = torch.stack(added).view(batch, length, -1)
        return lambda module, args: (args[0] + added, *args[1:])

    for n, i in enumerate(model.config.layers):
        layers[i].register_forward_pre_hook(add(n))
    return lm(input_ids, **inputs).logits
