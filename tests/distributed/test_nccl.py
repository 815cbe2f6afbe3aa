"""The same with NCCL, one process on each device, for whoever has several."""

import nccl
import pytest
import torch
import torch.multiprocessing as mp


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_shards_on_devices_are_one_vocabulary(tmp_path, kind, dtype):
    world = torch.cuda.device_count()
    if world < 2:
        pytest.skip("needs two CUDA devices")
    answers = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(
        nccl.compare, args=(world, str(tmp_path / "store"), kind, dtype, answers), nprocs=world, start_method="spawn"
    )
    found = sorted(answers.get() for _ in range(world))
    assert len({loss for _, _, loss in found}) == 1
    # sums of float32 in another order; gradients of 16 bits are rounded on each process, hidden states' once more
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for _, errors, _ in found:
        assert errors[0] < 1e-5 and max(errors) < bound
