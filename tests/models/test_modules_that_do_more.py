"""Parts that do more when they are called: hooks; offloaded, sharded, replaced heads. Nothing is passed by."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

transformers = pytest.importorskip("transformers")

import planner_models  # noqa: E402
from experts import MASK, experts, skip_unless_balanced  # noqa: E402
from tiny import tiny_model, tiny_pair  # noqa: E402

from auxkernels import Logits  # noqa: E402
from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM  # noqa: E402
from auxkernels.models.heads import output_head  # noqa: E402

PREFIX = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)
SIDES = ("base", "aux")


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


class OtherLinear(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).sin()


def banned(module, args, output):
    return output.index_fill(-1, torch.tensor([5]), -30.0)


def hook_on_head(model):
    model.get_output_embeddings().register_forward_hook(banned)


def hook_before_head(model):
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def replaced_forward_of_head(model):
    head = model.get_output_embeddings()
    head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight).cos()


def parametrized_head(model):
    parametrize.register_parametrization(model.get_output_embeddings(), "weight", Doubled())


def head_of_another_class(model):
    head = model.get_output_embeddings()
    other = OtherLinear(head.in_features, head.out_features, bias=False)
    other.weight = head.weight
    model.set_output_embeddings(other)


def hook_on_model(model):
    def change(module, args, output):
        output.logits = output.logits.tanh() + 0.5
        return output

    model.register_forward_hook(change)


def replaced_forward_of_model(model):
    forward = model.forward

    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.forward = other


CHANGES = [
    hook_on_head,
    hook_before_head,
    replaced_forward_of_head,
    parametrized_head,
    head_of_another_class,
    hook_on_model,
    replaced_forward_of_model,
]


def named(function):
    return function.__name__


# -- values are those of the modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES, ids=named)
@pytest.mark.parametrize("side", SIDES)
def test_logits_and_loss_are_those_of_the_changed_models(change, side, tokens):
    model = tiny_pair()
    before = getattr(model, side)(tokens).logits
    change(getattr(model, side))
    assert not torch.allclose(getattr(model, side)(tokens).logits, before, atol=0.1)
    want = model.base(tokens).logits + 0.5 * model.aux(tokens).logits
    got = model(tokens, labels=tokens, aux_scale=0.5)
    torch.testing.assert_close(got.logits, want)
    torch.testing.assert_close(got.loss, cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    torch.testing.assert_close(model(tokens, aux_scale=0.5, logits_to_keep=2).logits, want[:, -2:])


@pytest.mark.parametrize("change", [hook_on_head, hook_on_model], ids=named)
def test_changes_before_joining_are_kept(change, tokens):
    models = [tiny_model("llama"), tiny_model("gpt2", seed=3)]
    for one in models:
        change(one)
    model = AuxiliaryForCausalLM.from_base_and_aux(*models, zero_init=False).eval()
    torch.testing.assert_close(model(tokens).logits, models[0](tokens).logits + models[1](tokens).logits)


@pytest.mark.parametrize("change", [hook_on_head, hook_on_model], ids=named)
@pytest.mark.parametrize("options", [{}, {"trunk_layer": 1}], ids=["tokens", "trunk"])
def test_gradients_flow_through_the_changed_auxiliary(change, options, tokens):
    model = tiny_pair("gpt2", "llama", **options).train()
    change(model.aux)
    model.base.eval()
    model(tokens, labels=tokens).loss.backward()
    got = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    inputs = {"input_ids": tokens}
    if options:
        states = model.base(tokens, output_hidden_states=True).hidden_states[1]
        inputs = {"inputs_embeds": model.trunk_projection(states.detach())}
    want = model.base(tokens).logits.detach() + model.aux(**inputs).logits
    cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert got.keys() == wanted.keys() and all(name.startswith(("aux.", "trunk_projection.")) for name in got)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [hook_on_head, hook_on_model], ids=named)
@pytest.mark.parametrize("side", SIDES)
def test_prefixes_and_caches_go_with_changed_models(change, side, tokens):
    model = tiny_pair()
    change(getattr(model, side))
    behind = model.aux(torch.cat([PREFIX, tokens], dim=1)).logits[:, PREFIX.shape[1] :]
    want = model.base(tokens).logits + behind
    torch.testing.assert_close(model(tokens, aux_input_ids=PREFIX).logits, want)
    options = {"aux_input_ids": PREFIX, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_planner_gives_the_changed_language_models_logits(change):
    lm = planner_models.tiny_lm("llama")
    model = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, mode="fixed").eval()
    change(lm)
    tokens = planner_models.tokens()
    want = lm(tokens).logits
    got = model(tokens, labels=tokens)
    torch.testing.assert_close(got.logits, want)
    torch.testing.assert_close(got.loss, cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jetmoe", "dbrx"])
def test_balancing_loss_of_experts_is_kept_where_the_model_is_called_whole(family, tokens):
    skip_unless_balanced(family)
    aux = experts(family)
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), aux, zero_init=False)
    want = model(tokens, attention_mask=MASK, labels=tokens)
    assert want.router_loss > 1.0
    aux.register_forward_hook(lambda module, args, output: None)
    got = model(tokens, attention_mask=MASK, labels=tokens)
    torch.testing.assert_close(got.router_loss, want.router_loss)
    torch.testing.assert_close(got.loss, want.loss)


# -- offloaded by accelerate -------------------------------------------------------------------------------------------


def offloaded(model):
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def test_offloaded_parts_give_the_logits_that_they_give_in_memory(tokens):
    models = [tiny_model("llama"), tiny_model("gpt2", seed=3)]
    want = models[0](tokens).logits + models[1](tokens).logits
    model = AuxiliaryForCausalLM.from_base_and_aux(*map(offloaded, models), zero_init=False).eval()
    assert all(one.get_output_embeddings().weight.is_meta for one in models)
    got = model(tokens, labels=tokens)
    torch.testing.assert_close(got.logits, want)
    torch.testing.assert_close(got.loss, cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def test_head_on_disk_is_loaded_when_it_is_called(tmp_path, tokens):
    pytest.importorskip("accelerate")
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    places = {"model": "cpu", "lm_head": "disk"}
    model = AuxiliaryForCausalLM.from_base_and_aux(
        str(tmp_path / "base"),
        tiny_model("gpt2", seed=3),
        zero_init=False,
        base_kwargs={"device_map": places, "offload_folder": str(tmp_path / "off")},
    ).eval()
    assert model.base.lm_head.weight.is_meta
    torch.testing.assert_close(model(tokens).logits, base(tokens).logits + model.aux(tokens).logits)


def test_planner_stands_where_its_offloaded_language_model_runs():
    lm, tokens = planner_models.tiny_lm("llama"), planner_models.tokens()
    want = lm(tokens).logits
    model = PlannerForCausalLM.from_lm(offloaded(lm), num_labels=4, label_dim=4, mode="fixed").eval()
    assert {weight.device.type for weight in model.conditioning.parameters()} == {"cpu"}
    torch.testing.assert_close(model(tokens).logits, want)


def test_hooks_that_only_move_inputs_leave_the_loss_without_logits():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model) and not isinstance(output_head(model).source(torch.zeros(1, 16)), Logits)


def test_offloaded_head_of_the_auxiliary_is_not_zeroed_in_vain():
    with pytest.raises(ValueError, match="zero_init must be False for GPT2LMHeadModel"):
        AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), offloaded(tiny_model("gpt2", seed=3)))


# -- sharded -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def units(model, kind):
    if kind == "heads":
        return [model.base.lm_head, model.aux.lm_head]
    return {"models": [model.base, model.aux], "base": [model.base], "bodies": [model.base.model, model.aux.model]}[
        kind
    ]


@pytest.mark.parametrize("kind", ["heads", "models", "base", "bodies"])
def test_units_of_fsdp_train_as_one_process_does(mesh, kind, tokens):
    from torch.distributed.fsdp import fully_shard

    losses, gradients = [], []
    for is_sharded in (False, True):
        model = tiny_pair("llama", "llama").train()
        for unit in units(model, kind) if is_sharded else ():
            fully_shard(unit, mesh=mesh)
        if is_sharded:
            fully_shard(model, mesh=mesh)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        losses.append(loss.detach())
        gradients.append({name: grad.full_tensor() if is_sharded else grad for name, grad in grads.items()})
    torch.testing.assert_close(*losses)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_planner_over_a_sharded_language_model_gives_its_logits(mesh):
    from torch.distributed.fsdp import fully_shard

    lm, tokens = planner_models.tiny_lm("llama"), planner_models.tokens()
    want = lm(tokens).logits
    model = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, mode="fixed").eval()
    for unit in (model.conditioning, model.lm, model):
        fully_shard(unit, mesh=mesh)
    torch.testing.assert_close(model(tokens).logits, want)


def test_sharded_head_that_nothing_gathers_is_an_error_with_a_way_out(mesh, tokens):
    from torch.distributed.tensor import distribute_tensor

    model = tiny_pair()
    model.base.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.base.lm_head.weight.detach(), mesh))
    with pytest.raises(
        ValueError, match=r"output head of LlamaForCausalLM is a DTensor .* apply fully_shard to the whole"
    ):
        model(tokens)


def test_head_on_meta_that_nothing_loads_is_an_error(tokens):
    model = tiny_pair()
    model.aux.lm_head.to("meta")
    with pytest.raises(ValueError, match="weight of the output head of GPT2LMHeadModel is on meta"):
        model(tokens)
