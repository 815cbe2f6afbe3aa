"""Tiny ensembles on one base, and what their logits must be: plain sums."""

import pytest
import torch

pytest.importorskip("transformers")

from tiny import tiny_model

from auxkernels.models import AuxiliaryEnsembleForCausalLM, AuxiliaryForCausalLM

# members by kind: (architecture, options of joining)
KINDS = {
    "own": ("gpt2", {"zero_init": False}),
    "trunk": ("llama", {"zero_init": False, "trunk_layer": 1}),
    "shared": ("llama", {"head": "shared", "trunk_layer": 0}),
    "factored": ("gpt2", {"head": "shared", "head_rank": 3}),
    "low_rank": ("gpt2", {"head": "low_rank", "head_rank": 4}),
}
PREFIX = torch.tensor([[7, 9, 11, 13], [0, 0, 21, 23], [0, 31, 33, 35]])
PREFIX_MASK = (PREFIX != 0).long()


def tiny_base(architecture: str = "llama"):
    return tiny_model(architecture, seed=1, width=24)


def tiny_member(base, kind: str = "own", seed: int = 2):
    """An auxiliary of a kind, in eval mode, whose new head is random."""
    architecture, options = KINDS[kind]
    member = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model(architecture, seed=seed), **options)
    if hasattr(member, "aux_head"):
        torch.manual_seed(seed)
        for weight in member.aux_head.parameters():
            torch.nn.init.normal_(weight)
    return member.eval()


def tiny_ensemble(kinds=("own", "trunk"), *, base=None, names="abcdef", **options):
    """Members of kinds, called a, b, ..., with scales of 1 and -0.5 and 0.7 unless options say others."""
    base = tiny_base() if base is None else base
    members = {name: tiny_member(base, kind, seed=2 + i) for i, (name, kind) in enumerate(zip(names, kinds))}  # noqa: B905
    options = {"aux_scales": dict(zip(members, (1.0, -0.5, 0.7))), **options}  # noqa: B905
    return AuxiliaryEnsembleForCausalLM.from_members(base, members, **options)


def part(member, tokens, **kwargs):
    """The logits that one member adds to its base's, from calls of it alone."""
    return member(tokens, aux_scale=1.0, **kwargs).logits - member(tokens, aux_scale=0.0, **kwargs).logits


def eager_sum(model, tokens, scales, base_scale=1.0, of_members=None, **kwargs):
    """[batch, new, V]: scales of each member, numbers or [batch]; of_members: keywords of each by name."""

    def of_rows(scale):
        return scale[:, None, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale

    total = of_rows(base_scale) * model.base(tokens, **kwargs).logits
    for (name, member), scale in zip(model.members.items(), scales, strict=True):
        total = total + of_rows(scale) * part(member, tokens, **kwargs, **(of_members or {}).get(name, {}))
    return total
