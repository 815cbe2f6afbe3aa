"""Training: a small language model beside a frozen one takes the same course with eager torch and with the package."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from auxkernels import aux_cross_entropy, nn

VOCAB, WIDTH, CONTEXT, STEPS = 211, 32, 12, 60


class TinyModel(torch.nn.Module):
    """Embedding, one recurrent layer, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.mix = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens):
        return self.head(self.mix(self.embedding(tokens))[0])


def batches(seed: int, count: int, device: str):
    """Sequences in which the next token is mostly a function of the last one, some of it padding to ignore."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randperm(VOCAB, generator=generator)
    for _ in range(count):
        tokens = [torch.randint(VOCAB, (8,), generator=generator)]
        for _ in range(CONTEXT):
            noise = torch.randint(VOCAB, (8,), generator=generator)
            tokens.append(torch.where(torch.rand(8, generator=generator) < 0.1, noise, rule[tokens[-1]]))
        tokens = torch.stack(tokens, 1)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
        yield tokens[:, :-1].to(device), labels.to(device)


def train(loss_of, device, dtype=torch.float32, seed=0):
    """The losses of all steps, and the model."""
    torch.manual_seed(seed)
    base, aux = TinyModel().to(device).requires_grad_(False), TinyModel().to(device)
    optimizer = torch.optim.AdamW(aux.parameters(), lr=1e-2)
    losses = []
    for tokens, labels in batches(seed, STEPS, device):
        loss = loss_of(base(tokens).to(dtype), aux(tokens).to(dtype), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), aux


def eager(base, aux, labels):
    return F.cross_entropy((base.float() + aux.float()).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_coincide_with_eager_torch_in_float32(impl, seed):
    want, want_model = train(eager, impl.device, seed=seed)
    got, model = train(lambda b, a, t: aux_cross_entropy(b, a, t, backend=impl.backend), impl.device, seed=seed)
    assert want[-1] < 0.6 * want[0]  # it does learn
    assert (got - want).abs().max() < 1e-4
    assert (got[-1] - want[-1]).abs() < 1e-5 * STEPS
    for one, two in zip(model.parameters(), want_model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_coincide_with_eager_torch_in_half_precision(impl, dtype):
    want, _ = train(eager, impl.device, dtype)
    got, _ = train(lambda b, a, t: aux_cross_entropy(b, a, t, backend=impl.backend), impl.device, dtype)
    assert want[-1] < 0.6 * want[0]
    assert (got - want).abs().max() < 2e-2 and (got[-1] - want[-1]).abs() < 5e-3


def test_only_the_auxiliary_learns(impl):
    torch.manual_seed(0)
    base, aux = TinyModel().to(impl.device).requires_grad_(False), TinyModel().to(impl.device)
    before = [p.clone() for p in base.parameters()]
    tokens, labels = next(batches(0, 1, impl.device))
    nn.AuxCrossEntropyLoss(backend=impl.backend)(base(tokens), aux(tokens), labels).backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in aux.parameters())
    assert all(map(torch.equal, before, base.parameters()))


def test_a_base_that_learns_too_takes_the_course_of_eager_torch(impl):
    courses = []
    for loss_of in (eager, lambda b, a, t: aux_cross_entropy(b, a, t, backend=impl.backend)):
        torch.manual_seed(3)
        base, aux = TinyModel().to(impl.device), TinyModel().to(impl.device)
        optimizer = torch.optim.AdamW([*base.parameters(), *aux.parameters()], lr=1e-2)
        losses = []
        for tokens, labels in batches(3, 20, impl.device):
            loss = loss_of(base(tokens), aux(tokens), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        courses.append(torch.tensor(losses))
    assert (courses[0] - courses[1]).abs().max() < 1e-4


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(impl, parts):
    torch.manual_seed(0)
    base, aux = TinyModel().to(impl.device).requires_grad_(False), TinyModel().to(impl.device)
    tokens, labels = next(batches(0, 1, impl.device))
    labels[0] = -100  # unequal parts
    grads = []
    for pieces in ([slice(None)], [slice(i * 8 // parts, (i + 1) * 8 // parts) for i in range(parts)]):
        aux.zero_grad()
        kept = (labels != -100).sum()
        for piece in pieces:
            loss = aux_cross_entropy(
                base(tokens[piece]), aux(tokens[piece]), labels[piece], normalizer=kept, backend=impl.backend
            )
            loss.backward()
        grads.append([p.grad.clone() for p in aux.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


@pytest.fixture
def one_process_group():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_trains_it(on_cpu, one_process_group):
    torch.manual_seed(0)
    base, plain = TinyModel().requires_grad_(False), TinyModel()
    parallel = torch.nn.parallel.DistributedDataParallel(TinyModel())
    parallel.module.load_state_dict(plain.state_dict())
    tokens, labels = next(batches(0, 1, "cpu"))
    for model in (plain, parallel):
        aux_cross_entropy(base(tokens), model(tokens), labels, backend=on_cpu.backend).backward()
    for one, two in zip(plain.parameters(), parallel.module.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_sharded_tensor_is_a_type_error_that_names_it(on_cpu, one_process_group):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    tensors = {"base": torch.zeros(4, 8), "aux": torch.zeros(4, 8), "target": torch.zeros(4, dtype=torch.int64)}
    mesh = DeviceMesh("cpu", [0])
    for name in tensors:
        given = tensors | {name: distribute_tensor(tensors[name], mesh, [Shard(0)])}
        with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got DTensor"):
            aux_cross_entropy(given["base"], given["aux"], given["target"], backend=on_cpu.backend)


def test_the_sequences_of_this_file_repeat():
    first, second = (list(itertools.chain(*batches(5, 2, "cpu"))) for _ in range(2))
    assert all(map(torch.equal, first, second))
