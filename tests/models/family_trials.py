"""What works with a family: each trial builds composites of a tiny model and compares with the plain models."""

from __future__ import annotations

import copy
import re
import warnings

import torch
from family_configs import NOT_BUILT, VOCAB, tiny_model
from tiny import tiny_model as tiny_other

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM
from auxkernels.models.causal_lm import has_cache
from auxkernels.models.conditioning import decoder_layers

WORKS = "works"
COLUMNS = ("base", "auxiliary", "trunk", "planner", "beams", "cache")
NEW_TOKENS = 3
# of the largest logit: two paths through a tiny network, with and without a cache, in float32
TOLERANCE = 2e-4


class Wrong(Exception):
    """A composite computes something else than the plain models."""


def plain_logits(model, tokens, **inputs) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits.float()


def check_close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    width = min(got.shape[-1], want.shape[-1])
    got, want = got[..., :width], want[..., :width]
    error = (got - want).abs().max() / want.abs().max()
    if not error <= TOLERANCE:
        raise Wrong(f"{what} are off by {float(error):.1e} of the largest")


def check_greedy(model, logits_of, tokens: torch.Tensor, **inputs) -> None:
    """Each generated token is the likeliest of logits_of(all tokens before it), or as likely up to rounding."""
    for use_cache in (True, False):
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=use_cache,
            **inputs,
        )
        if made.shape != (len(tokens), tokens.shape[1] + NEW_TOKENS):
            raise Wrong(f"generate made {list(made.shape)} tokens of {list(tokens.shape)}")
        for n in range(tokens.shape[1], made.shape[1]):
            logits = logits_of(made[:, :n])[:, -1]
            chosen, best = logits.gather(1, made[:, n : n + 1]).squeeze(1), logits.amax(1)
            if ((best - chosen) > TOLERANCE * logits.abs().amax()).any():
                raise Wrong(f"generated tokens are not the likeliest, use_cache={use_cache}")


def check_sum(joined, base, aux, tokens, **inputs) -> None:
    with torch.no_grad():
        want = plain_logits(base, tokens) + plain_logits(aux, tokens)
        check_close(joined(tokens).logits, want, "logits")
        check_greedy(joined, lambda ids: plain_logits(base, ids) + plain_logits(aux, ids), tokens)
    joined.train()
    loss = joined(tokens, labels=tokens).loss
    loss.backward()
    gradients = [weight.grad for weight in joined.aux.parameters() if weight.grad is not None]
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients):
        raise Wrong("gradients are missing or not finite")
    if any(weight.grad is not None for weight in joined.base.parameters()):
        raise Wrong("the base has a gradient")
    joined.eval()


def _base(model, tokens) -> str:
    aux = tiny_other("llama", seed=3)
    check_sum(AuxiliaryForCausalLM.from_base_and_aux(model, aux, zero_init=False).eval(), model, aux, tokens)
    return WORKS


def _auxiliary(model, tokens) -> str:
    base = tiny_other("llama", seed=3)
    check_sum(AuxiliaryForCausalLM.from_base_and_aux(base, model, zero_init=False).eval(), base, model, tokens)
    return WORKS


def _trunk(model, tokens) -> str:
    """The auxiliary reads hidden states of the middle of this base: the sum with what it makes of them."""
    aux = tiny_other("llama", seed=3)
    joined = AuxiliaryForCausalLM.from_base_and_aux(model, aux, zero_init=False, trunk_layer=1).eval()

    def sums(ids):
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        read = joined.trunk_projection(output.hidden_states[1].float())
        return output.logits.float() + aux(inputs_embeds=read, use_cache=False).logits

    with torch.no_grad():
        check_close(joined(tokens).logits, sums(tokens), "logits")
        check_greedy(joined, sums, tokens)
    joined.train()(tokens, labels=tokens).loss.backward()
    if joined.trunk_projection.weight.grad is None:
        raise Wrong("the projection has no gradient")
    return WORKS


def _planner(model, tokens) -> str:
    with torch.no_grad():
        want = plain_logits(model, tokens)
    planner = PlannerForCausalLM.from_lm(
        model, num_labels=4, label_dim=4, mode="fixed", layers=[len(decoder_layers(model)) - 1]
    ).eval()
    with torch.no_grad():
        check_close(planner(tokens).logits, want, "logits without a label")
        planner.conditioning.bias.normal_()
        logits = planner(tokens).logits
        if (logits - want).abs().max() <= 0.01 * want.abs().max():
            raise Wrong("a label changes nothing")
        check_greedy(planner, lambda ids: planner(ids, use_cache=False).logits, tokens)
    planner.train()(tokens, labels=tokens).loss.backward()
    if not planner.conditioning.weight.grad.abs().sum() > 0:
        raise Wrong("the projections have no gradient")
    planner.remove_hooks()
    return WORKS


def _beams(model, tokens) -> str:
    """Two beams score the same with and without a cache."""
    joined = AuxiliaryForCausalLM.from_base_and_aux(model, tiny_other("llama", seed=3), zero_init=False).eval()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": 2, "eos_token_id": None}
    options |= {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    mask = torch.ones_like(tokens)
    scores = [
        joined.generate(tokens, attention_mask=mask, use_cache=use_cache, **options).sequences_scores
        for use_cache in (True, False)
    ]
    check_close(*scores, "scores of beams with a cache")
    return WORKS


def _cache(model, tokens) -> str:
    return "kept" if has_cache(model) else "none"


_TRIALS = dict(zip(COLUMNS, (_base, _auxiliary, _trunk, _planner, _beams, _cache), strict=True))


def first_sentence(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return re.split(r"(?<=[a-z)\]])[.;] ", text)[0][:240]


def attempted(trial, model, tokens) -> str:
    torch.manual_seed(0)
    alone = copy.deepcopy(model)
    name = type(model).__name__
    try:
        return trial(model, tokens)
    except Exception as error:
        text = first_sentence(error).replace(name, "…")
        if isinstance(error, (Wrong, AttributeError)) and (reason := generation_alone(alone, tokens)) is not None:
            return f"as alone: generate of the plain model too: {reason}"
        if isinstance(error, Wrong):
            return f"WRONG: {text}"
        is_refused = isinstance(error, (TypeError, ValueError, RuntimeError)) and _is_ours(error)
        return f"refused: {text}" if is_refused else f"FAILS: {type(error).__name__}: {text}"


def _is_ours(error: Exception) -> bool:
    """Whether an error is raised by this package, not somewhere below it."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_globals.get("__name__", "").startswith("auxkernels.")


def generation_alone(model, tokens) -> str | None:
    """What is wrong with a plain model's own generation; None: nothing."""
    try:
        with torch.no_grad():
            check_greedy(model, lambda ids: plain_logits(model, ids), tokens)
    except Exception as error:
        return first_sentence(error)
    return None


def results_of(family: str) -> dict[str, str] | str:
    """What each trial of a family says, or why there is none."""
    if family in NOT_BUILT:
        return NOT_BUILT[family]
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCAB - 11, (2, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(family)
            with torch.no_grad():
                plain_logits(model, tokens)
        except Exception as error:
            return f"this tiny configuration fails: {type(error).__name__}: {first_sentence(error)}"
        return {name: attempted(trial, copy.deepcopy(model), tokens) for name, trial in _TRIALS.items()}
