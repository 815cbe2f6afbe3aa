"""Calls of the registered ops of soft_embedding, past the public function and its checks."""

import torch
from inputs import logits

forward_op = torch.ops.auxkernels.soft_embedding.default


backward_op = torch.ops.auxkernels.soft_embedding_backward.default


def arguments(device, **changes) -> dict:
    made = {"device": device}
    given = {
        "parts": [logits(4, 9, **made), None, None, None],
        "softcaps": [0.0],
        "autocast": None,
        "table": logits(9, 3, **made),
        "temperature": torch.rand(4, device=device) + 0.5,
        "gumbel": torch.tensor(0.5, device=device),
        "seed": torch.tensor(3, device=device),
        "mask": torch.rand(4, 9, device=device) < 0.3,
        "top_k": 0,
        "hard": False,
    }
    return given | changes
