"""Training: a small language model beside a frozen one takes the same course with eager torch and with the package."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tolerance import OF_A_ROW, assert_alike, assert_same_course, unit

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


def train(loss_of, device, dtype=torch.float32, seed=0, steps=STEPS, base_learns=False):
    """The losses of all steps, and what the auxiliary has become."""
    torch.manual_seed(seed)
    base, aux = TinyModel().to(device).requires_grad_(base_learns), TinyModel().to(device)
    optimizer = torch.optim.AdamW([p for m in (base, aux) for p in m.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for tokens, labels in batches(seed, steps, device):
        loss = loss_of(base(tokens).to(dtype), aux(tokens).to(dtype), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [torch.tensor(losses), *aux.parameters()]


def eager(base, aux, labels, changed):
    return F.cross_entropy(changed(base.float() + aux.float()).flatten(0, 1), labels.flatten())


def ours(impl):
    return lambda base, aux, labels: aux_cross_entropy(base, aux, labels, backend=impl.backend)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_coincide_with_eager_torch_in_float32(impl, seed):
    losses, *_ = assert_same_course(lambda loss_of: train(loss_of, impl.device, seed=seed), eager, ours(impl))
    assert losses[-1] < 0.6 * losses[0]  # it does learn


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_coincide_with_eager_torch_in_half_precision(impl, dtype):
    courses = {"course_of": lambda loss_of: train(loss_of, impl.device, dtype), "stored": unit(dtype)}
    losses, *_ = assert_same_course(eager=eager, ours=ours(impl), **courses)
    assert losses[-1] < 0.6 * losses[0]


def test_only_the_auxiliary_learns(impl):
    torch.manual_seed(0)
    base, aux = TinyModel().to(impl.device).requires_grad_(False), TinyModel().to(impl.device)
    before = [p.clone() for p in base.parameters()]
    tokens, labels = next(batches(0, 1, impl.device))
    nn.AuxCrossEntropyLoss(backend=impl.backend)(base(tokens), aux(tokens), labels).backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in aux.parameters())
    assert all(map(torch.equal, before, base.parameters()))


@pytest.mark.slow
def test_a_base_that_learns_too_takes_the_course_of_eager_torch(impl):
    options = {"seed": 3, "steps": 20, "base_learns": True}
    assert_same_course(lambda loss_of: train(loss_of, impl.device, **options), eager, ours(impl))


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
    # beside a row's own, the sums over the tokens of a weight's gradient, in other orders
    assert_alike(*grads, OF_A_ROW + 8 * CONTEXT)


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
