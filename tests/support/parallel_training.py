"""Twenty steps of training, in one process and by several that each read a part of the batch."""

from __future__ import annotations

import contextlib

import planner_models
import torch
import torch.distributed as dist
from tiny import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from auxkernels.models import AuxiliaryForCausalLM, label_statistics_of_all, planner, sums
from auxkernels.models.fsdp import apply_fully_shard

STEPS, ROWS, LENGTH = 20, 8, 7
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def new_model(kind: str, architecture: str, is_tied: bool):
    """In float64: two ways that compute the same then differ by far less than what a wrong factor would change."""
    options = _NO_DROPOUT if architecture == "gpt2" else {"num_key_value_heads": 2}  # for two processes
    if kind == "auxiliary":
        base, aux = (tiny_model(architecture, seed=i, sharpness=4.0, **options) for i in (1, 2))
        model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False)
        head, embeddings = aux.get_output_embeddings(), aux.get_input_embeddings()
        head.weight = embeddings.weight if is_tied else torch.nn.Parameter(embeddings.weight.detach().clone())
    else:
        torch.manual_seed(3)
        lm = planner_models.tiny_lm(architecture, **options, tie_word_embeddings=is_tied)
        model = planner_models.tiny_model(lm=lm, freeze_lm=architecture == "llama")
    return model.double().train()


def batch_of(kind: str, step: int, rows: slice) -> dict[str, torch.Tensor]:
    """Rows of a step's batch, and what its loss is divided by."""
    drawn = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 50, (ROWS, LENGTH), generator=drawn)
    batch = {"input_ids": tokens[rows], "labels": tokens[rows], "num_items_in_batch": ROWS * (LENGTH - 1)}
    if kind == "planner":  # two segments in each row, whose features are theirs alone
        features = torch.randn(ROWS, 2, planner_models.FEATURES, generator=drawn, dtype=torch.float64)[rows]
        first = 2 * torch.arange(len(features)).unsqueeze(1)
        batch["segment_ids"] = first + (torch.arange(LENGTH) >= LENGTH // 2)
        batch["planner_inputs"] = {"features": features.flatten(0, 1)}
    return batch


def trained(model, kind: str, accumulate: int, rank=0, world=1, group=None, rate=0.3) -> list[float]:
    """The losses of all rows; gradients of several processes are averages, hence the factor."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.5, foreach=False)  # not all on one mesh
    losses, part = [], ROWS // accumulate // world
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(accumulate):
            start = i * ROWS // accumulate + rank * part
            batch = batch_of(kind, step, slice(start, start + part))
            is_last = i == accumulate - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(is_last)
            with contextlib.nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():
                loss = model(**batch).loss
                (world * loss).backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total, group=group)
        losses.append(total.item())
    return losses


def trained_by_many(place, kind: str, architecture: str, is_tied: bool, accumulate: int, way: str) -> list[float]:
    """On one of the processes."""
    model = new_model(kind, architecture, is_tied)
    if way == "DDP":
        model = DistributedDataParallel(model, process_group=place.group)
    else:
        mesh = place.mesh if way != "HSDP" else init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = apply_fully_shard(model, mesh, shard_frozen=way != "FSDP2")
        model.set_force_sum_reduction_for_comms(True)  # gloo's averages were sums before torch 2.11
        assert any(isinstance(weight, DTensor) for weight in model.parameters())
    return trained(model, kind, accumulate, place.rank, place.size, place.group)


def tensor_parallel(model, mesh, parts: str):
    """Cuts the language models of `model`, of Llama's family, over a mesh: all linear layers, or some heads alone."""
    rows, columns = RowwiseParallel(), ColwiseParallel()
    layers = {
        **{f"model.layers.*.self_attn.{name}_proj": columns for name in "qkv"},
        "model.layers.*.self_attn.o_proj": rows,
        **{f"model.layers.*.mlp.{name}_proj": columns for name in ("gate", "up")},
        "model.layers.*.mlp.down_proj": rows,
    }
    head = {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    for lm in (
        (model.lm,)
        if hasattr(model, "lm")
        else (model.aux,)
        if parts == "auxiliary's head"
        else (model.base, model.aux)
    ):
        parallelize_module(lm, mesh, {**(layers if parts == "all" else {}), **head})
    return model


def trained_by_cutting(place, kind: str, parts: str) -> tuple[list[float], set[str]]:
    """Under tensor parallelism, where all processes read all rows; the losses, and how heads were read."""
    model, kinds = tensor_parallel(new_model(kind, "llama", False), place.mesh, parts), set()
    with seeing_heads(kinds):
        return trained(model, kind, 1), kinds


def trained_by_both(place, kind: str, accumulate: int) -> tuple[list[float], set[str]]:
    """Under tensor parallelism of two and FSDP2 over two such pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(new_model(kind, "llama", False), mesh["tp"], "all")
    model = apply_fully_shard(model, mesh["dp"], shard_frozen=True)
    model.set_force_sum_reduction_for_comms(True)
    kinds = set()
    with seeing_heads(kinds):
        return trained(model, kind, accumulate, mesh["dp"].get_local_rank(), 2, mesh["dp"].get_group()), kinds


def generated_by_cutting(place) -> list[int]:
    model = tensor_parallel(new_model("auxiliary", "llama", False), place.mesh, "all").eval()
    return model.generate(torch.arange(3, 8).unsqueeze(0), max_new_tokens=8, do_sample=False)[0].tolist()


def balanced(place, counts: list[int] | None = None):
    """Entropy and usage of labels, and the planner's gradient of a loss of them; counts: segments of each process."""
    rank = 0 if place is None else place.rank
    model = new_model("planner", "llama", False)
    features = torch.randn(sum(counts), planner_models.FEATURES, generator=torch.Generator().manual_seed(5))
    start = 0 if place is None else sum(counts[:rank])
    own = features.double()[start : sum(counts) if place is None else start + counts[rank]]
    tokens = torch.arange(3, 3 + max(len(own), 1)).unsqueeze(0)
    output = model(
        tokens, segment_ids=torch.arange(tokens.shape[1]).unsqueeze(0), planner_inputs={"features": own}, labels=tokens
    )
    if place is not None:
        output = label_statistics_of_all(output, place.group)
    (output.label_usage.square().sum() + 0.5 * output.label_entropy).backward()
    grad = model.planner.head.weight.grad
    if place is not None:
        dist.all_reduce(grad, group=place.group)
        grad /= place.size
    return [t.detach().numpy() for t in (output.label_entropy, output.label_usage, grad)]


def gradient_of_known(place) -> float:
    """Of a weight of one that each process multiplies by its rank + 1, under FSDP2: the mean."""
    module = torch.nn.Linear(1, place.size, bias=False)
    torch.nn.init.ones_(module.weight)
    fully_shard(module, mesh=place.mesh)
    module.set_force_sum_reduction_for_comms(True)
    module(torch.full((1, 1), place.rank + 1.0)).sum().backward()
    return module.weight.grad.full_tensor()[0].item()


@contextlib.contextmanager
def seeing_heads(kinds: set[str]):
    """Adds how a loss reads heads."""
    originals = {module: module.output_head for module in (sums, planner)}

    def seen(model):
        head = originals[sums](model)
        kinds.add(type(head).__name__)
        return head

    for module in originals:
        module.output_head = seen
    try:
        yield
    finally:
        for module, original in originals.items():
            module.output_head = original


def kinds_of_heads(place, architecture: str, is_tied: bool) -> tuple[set[str], int]:
    """How the loss read both heads, and how many of the auxiliary's weights have no gradient after a step."""
    model = apply_fully_shard(new_model("auxiliary", architecture, is_tied), place.mesh, shard_frozen=True)
    kinds = set()
    with seeing_heads(kinds):
        model(**batch_of("auxiliary", 0, slice(0, 2))).loss.backward()
    return kinds, sum(weight.grad is None for weight in model.aux.parameters())


def saved(place, kind: str, folder: str, is_frozen_sharded: bool, options: dict) -> None:
    """Trains for some steps and saves, from all processes."""
    model = apply_fully_shard(new_model(kind, "llama", True), place.mesh, shard_frozen=is_frozen_sharded)
    model.set_force_sum_reduction_for_comms(True)
    trained(model, kind, 1, place.rank, place.size, place.group)
    model.save_pretrained(folder, **options)


def saved_on_the_base(place, folder: str) -> None:
    model = new_model("auxiliary", "llama", True)
    model.config.base_name_or_path = folder
    apply_fully_shard(model, place.mesh).save_pretrained(folder)
