"""One of several processes that share a base's weights: `python sharded_base.py RANK WORLD FOLDER`."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from auxkernels.models import AuxiliaryForCausalLM
from auxkernels.models.saving import fingerprint


def main(rank: int, world: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    base = tiny_model("llama", seed=1, width=24)
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    plain = fingerprint(base)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model("gpt2", seed=2), zero_init=False)
    found = {"joined": model.config.base_fingerprint == plain}

    sharded = copy.deepcopy(base)
    fully_shard(sharded, mesh=mesh)
    found["fully sharded"] = fingerprint(sharded) == plain
    columns = copy.deepcopy(base)
    for module in columns.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                placed = [Shard(weight.dim() - 1)]  # 61 are not even
                module._parameters[name] = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, placed), False)
    found["in columns"] = fingerprint(columns) == plain
    assert any(isinstance(weight, DTensor) for weight in sharded.parameters())

    fully_shard(model.base, mesh=mesh)
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("base.")}
    if rank == 0:  # alone
        model.save_pretrained(folder / "saved", state_dict=own)
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # a mesh keeps gloo's threads alive, and one that lets go of a tensor while Python ends aborts the process
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
