"""The cache of large blocks of CPU memory: what waits, for how long, and that a tensor in a block is one like any."""

import copy
import gc
import io
import mmap
import pickle
import sys
import threading

import interpreter
import pytest
import torch
from interpreter import resident

import auxkernels
from auxkernels import Head, aux_cross_entropies, aux_cross_entropy, cache_settings, empty_cache, memory, soft_embedding
from auxkernels.heads import products
from auxkernels.soft_embedding.segments import segments_to_tokens

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is a cache on Linux alone")
MIB, PAGE = 2**20, mmap.PAGESIZE


@pytest.fixture
def cache(native, monkeypatch):
    """The compiled module with an empty cache, which takes tensors of 4 KiB and more."""
    monkeypatch.setattr(memory, "LARGE", PAGE)
    gc.collect()
    empty_cache()
    yield native
    native.fill_taken_blocks(False)
    cache_settings.num_bytes = None
    empty_cache()


def tensor(num_bytes: int, dtype=torch.float32) -> torch.Tensor:
    return memory.empty(torch.empty(0, dtype=dtype), (num_bytes // dtype.itemsize,))


def taken(cache) -> tuple[int, int]:
    """How many takes have found a block, and how many not."""
    counts = cache.block_counts()
    return counts["found"], counts["mapped"]


def is_block(tensor: torch.Tensor) -> bool:
    """Blocks begin where a huge page may; PyTorch's storages can be resized."""
    return tensor.data_ptr() % (2 * MIB) == 0 and not tensor.untyped_storage().resizable()


# -- what waits --------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_dead_tensor_is_that_of_the_next(cache):
    one = tensor(MIB)
    address = one.data_ptr()
    assert is_block(one) and cache.block_counts()["used"] == 1
    other = tensor(MIB)
    assert other.data_ptr() != address, "both are alive"
    view = one[3:]
    del one
    assert tensor(MIB).data_ptr() != address, "a view keeps its memory"
    del view
    assert tensor(MIB).data_ptr() == address
    assert cache.block_counts()["used"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_block_serves_any_shape_and_dtype_that_fills_most_of_it(cache, dtype):
    address = tensor(MIB).data_ptr()
    again = memory.empty(torch.empty(0, dtype=dtype), (15, MIB // 16 // dtype.itemsize))
    assert again.data_ptr() == address and again.dtype == dtype and again.is_contiguous()
    del again
    assert tensor(MIB * 3 // 4).data_ptr() != address


def test_from_its_second_step_on_a_training_loop_maps_no_memory(native):
    """As it comes: nothing is set."""
    empty_cache()
    base, target = torch.randn(256, 40_000), torch.randint(40_000, (256,))
    aux = torch.randn(256, 40_000, requires_grad=True)
    counts = []
    for _ in range(4):
        aux.grad = None
        aux_cross_entropy(base, aux, target, backend="native").backward()
        assert is_block(aux.grad)
        counts.append(taken(native))
    found, mapped = counts[0]
    assert counts == [(found + i, mapped) for i in range(4)]
    aux.grad = None
    empty_cache()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_weight_that_a_product_needs_in_float32_lies_in_a_block(cache, monkeypatch, dtype):
    """PyTorch's memory for it was brought in anew for every part of it, where parts have 16 MiB."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    seen, multiply = [], products._multiply

    def seeing(a, b, *args):
        seen.append(b)
        return multiply(a, b, *args)

    monkeypatch.setattr(products, "_multiply", seeing)
    hidden = torch.randn(64, 48, dtype=dtype, requires_grad=True)
    head = Head(hidden, torch.randn(97, 48, dtype=dtype))
    aux_cross_entropy(head, None, torch.randint(97, (64,)), backend="native").backward()
    assert len(seen) == 2 and all(b.dtype == torch.float32 and is_block(b) for b in seen)


def test_no_more_waits_than_is_allowed_and_the_oldest_is_given_back_first(cache):
    cache_settings.num_bytes = 2 * MIB + 4 * PAGE
    tensors = [tensor(size) for size in (MIB, MIB // 2, MIB)]
    addresses = [one.data_ptr() for one in tensors]
    while tensors:
        tensors.pop(0)
        assert cache.block_counts()["waiting_bytes"] <= cache_settings.num_bytes
    assert cache.block_counts()["waiting"] == 2
    assert tensor(MIB // 2).data_ptr() == addresses[1]
    assert tensor(MIB).data_ptr() == addresses[2]
    assert not is_block(tensor(4 * MIB)), "what could not wait is PyTorch's from the start"
    cache_settings.num_bytes = MIB // 2 + 4 * PAGE
    assert cache.block_counts()["waiting_bytes"] <= cache_settings.num_bytes


def test_a_block_that_nobody_has_wanted_for_long_is_given_back(cache):
    del_me = tensor(MIB)
    del del_me
    for _ in range(512):
        tensor(PAGE)
    assert cache.block_counts()["waiting"] == 2
    tensor(PAGE)
    assert cache.block_counts()["waiting"] == 1


def test_an_eighth_of_the_memory_may_wait_unless_another_number_is_set(cache):
    allowed = cache.block_counts()["allowed"]
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert abs(allowed - total // 8) <= PAGE
    cache_settings.num_bytes = 5 * MIB
    assert cache.block_counts()["allowed"] == cache_settings.num_bytes == 5 * MIB
    cache_settings.num_bytes = None
    assert cache.block_counts()["allowed"] == allowed


def test_where_it_is_off_memory_is_pytorchs_and_nothing_waits(cache):
    alive = tensor(MIB)
    tensor(2 * MIB)
    assert cache.block_counts()["waiting"] == 1
    cache_settings.num_bytes = 0
    assert cache.block_counts()["waiting"] == 0
    before = taken(cache)
    one = tensor(MIB)
    assert one.untyped_storage().resizable() and taken(cache) == before
    del alive
    counts = cache.block_counts()
    assert counts["waiting"] == counts["waiting_bytes"] == counts["used"] == counts["used_bytes"] == 0
    assert "CPU cache   off" in auxkernels.show_config()


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**63, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_a_setting_that_is_no_number_of_bytes_is_an_error(cache, value, error):
    cache_settings.num_bytes = 3 * MIB
    with pytest.raises(error, match=r"cache_settings\.num_bytes must be"):
        cache_settings.num_bytes = value
    assert cache_settings.num_bytes == cache.block_counts()["allowed"] == 3 * MIB


def test_empty_cache_gives_back_what_waits_and_leaves_what_is_used(cache):
    used = tensor(MIB).fill_(3)
    tensor(64 * MIB).fill_(1)
    before = resident()
    assert cache.block_counts()["waiting_bytes"] >= 64 * MIB
    empty_cache()
    assert before - resident() > 60 * MIB
    assert cache.block_counts()["waiting_bytes"] == 0 and cache.block_counts()["used_bytes"] >= MIB
    assert bool((used == 3).all())


def test_show_config_says_what_waits_and_what_is_used(cache):
    cache_settings.num_bytes = 300 * MIB
    one = tensor(2 * MIB)
    tensor(5 * MIB)
    (line,) = (line for line in auxkernels.show_config().splitlines() if line.startswith("CPU cache"))
    assert "5 MiB in 1 blocks wait, of 300 MiB allowed, and 2 MiB in 1 are in use" in line
    del one


@pytest.mark.slow
def test_ten_thousand_steps_leave_nothing_behind(cache):
    """Of two shapes in turn, with gradients that are kept for a step."""
    rows = (96, 160)  # calls with less are small ones, which pass the cache by
    base = torch.randn(160, 700)
    leaves, targets = [torch.randn(n, 700, requires_grad=True) for n in rows], torch.randint(700, (160,))

    def step(i):
        aux = leaves[i % 2]
        aux.grad = None
        aux_cross_entropy(base[: len(aux)], aux, targets[: len(aux)], backend="native").backward()

    for i in range(200):
        step(i)
    counts, growth = cache.block_counts(), []
    while len(growth) < 3 and (not growth or min(growth) >= MIB):
        gc.collect()
        before, alive = resident(), len(gc.get_objects())
        for i in range(10_000):
            step(i)
        gc.collect()
        growth.append(resident() - before)
    after = cache.block_counts()
    assert after["found"] == counts["found"] + 10_000 * len(growth)
    for name in ("mapped", "used", "used_bytes", "waiting", "waiting_bytes"):
        assert after[name] == counts[name], name
    assert min(growth) < MIB  # the gradients are 900 MB in all, and 105 bytes a step would show
    assert len(gc.get_objects()) - alive < 100


# -- threads and processes ---------------------------------------------------------------------------------------------


def test_threads_that_take_and_free_never_share_a_block(cache):
    wrong, left = [], []

    def work(number):
        for i in range(200):
            one = tensor(PAGE * (1 + (number + i) % 3)).fill_(number)
            if i % 10 == 0:
                left.append(one)  # dies in another thread
            if not bool((one == number).all()):
                wrong.append(number)
            del one

    before = cache.block_counts()["used"]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len({one.data_ptr() for one in left}) == len(left) == 80
    left.clear()
    assert cache.block_counts()["used"] == before


FORK = """
import os, signal, threading, torch
from auxkernels import empty_cache, memory, native

memory.LARGE = 4096
torch.set_num_threads(1)  # torch hangs in a child otherwise
counts = native.cpu().block_counts
like = torch.empty(0)
used, waiting = (memory.empty(like, (2**18,)) for _ in range(2))
used.fill_(1)
waiting.fill_(2)
address = waiting.data_ptr()
del waiting
ends = threading.Event()

def busy():  # holds the lock at the fork, some of the time
    while not ends.is_set():
        memory.empty(like, (2**18,))

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang is a failure
        assert bool((used == 1).all()) and counts()["waiting"] == counts()["waiting_bytes"] == 0
        used.fill_(5)
        one = memory.empty(like, (2**18,)).fill_(6)
        place = one.data_ptr()
        del one, used
        assert counts()["waiting"] == 2
        assert bool((memory.empty(like, (2**18,)).fill_(7) == 7).all())
        empty_cache()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((used == 1).all())
ends.set()
for thread in threads:
    thread.join()
assert counts()["used"] == 1 and counts()["waiting"] >= 1
print("done")
"""


def test_a_forked_child_has_what_is_used_and_nothing_of_what_waits(native):
    assert interpreter.run(FORK) == "done\n"


def test_tensors_may_outlive_the_interpreter(native):
    code = """
    import atexit, torch
    from auxkernels import memory
    memory.LARGE = 4096
    kept = memory.empty(torch.empty(0), (2**18,))
    atexit.register(lambda: memory.empty(torch.empty(0), (2**18,)).fill_(1))
    memory.later = memory.empty(torch.empty(0), (2**18,))
    print("done")
    """
    assert interpreter.run(code) == "done\n"


# -- a tensor like any other -------------------------------------------------------------------------------------------


def test_a_tensor_in_a_block_is_saved_copied_and_changed_like_any_other(cache):
    values = torch.randn(32, 64)
    one = memory.empty(values, values.shape)
    one.copy_(values)
    assert is_block(one) and one.is_leaf and one._base is None and not one.requires_grad and one.stride() == (64, 1)
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    for other in (torch.load(file), pickle.loads(pickle.dumps(one)), copy.deepcopy(one), one.clone()):
        assert torch.equal(other, values) and other.data_ptr() != one.data_ptr()
    assert torch.equal(torch.from_numpy(one.numpy()), values)
    version = one._version
    one.add_(1).mul_(2)
    assert torch.equal(one, (values + 1) * 2) and one._version == version + 2
    assert one.requires_grad_().sum().backward() is None and bool((one.grad == 1).all())
    with torch.inference_mode():
        assert memory.empty(values, values.shape).is_inference()
    assert not memory.empty(values, values.shape).is_inference()


def test_sharing_between_processes_moves_it_and_frees_the_block(cache):
    one = tensor(MIB).fill_(4)
    assert cache.block_counts()["used"] == 1
    one.share_memory_()
    assert one.is_shared() and bool((one == 4).all())
    assert cache.block_counts()["used"] == 0 and cache.block_counts()["waiting"] == 1


def test_it_can_be_made_smaller_but_not_larger(cache):
    """As a tensor whose memory is NumPy's, whose shape PyTorch changes before it refuses, too; a clone can."""
    one = tensor(MIB).fill_(4)
    one.resize_(10)
    assert one.shape == (10,) and bool((one == 4).all())
    one.resize_(MIB // 4)
    assert bool((one == 4).all())
    assert one.clone().resize_(MIB).numel() == MIB
    with pytest.raises(RuntimeError, match="not resizable"):
        one.resize_(MIB)
    assert one.untyped_storage().nbytes() == MIB


def test_autograd_keeps_the_gradient_itself_and_adds_to_it_in_place(cache):
    base, target = torch.randn(96, 700), torch.randint(700, (96,))
    aux = torch.randn(96, 700, requires_grad=True)
    made = []
    hook = aux.register_hook(lambda grad: made.append(grad.data_ptr()))
    aux_cross_entropy(base, aux, target, backend="native").backward()
    hook.remove()
    assert aux.grad.data_ptr() == made[0] and is_block(aux.grad), "it was not copied"
    once, address = aux.grad.clone(), aux.grad.data_ptr()
    aux_cross_entropy(base, aux, target, backend="native").backward()
    assert aux.grad.data_ptr() == address and torch.equal(aux.grad, 2 * once)


def test_a_profiler_of_memory_sees_what_a_call_takes(cache):
    base, target = torch.randn(64, 700), torch.randint(700, (64,))
    aux = torch.randn(64, 700, requires_grad=True)

    def step():
        return torch.autograd.grad(aux_cross_entropy(base, aux, target, backend="native"), aux)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(event.nbytes() for event in events) >= aux.nbytes
    del kept


def test_a_mode_that_follows_operators_sees_an_allocation(cache):
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        one = tensor(MIB)
    assert torch.ops.aten.new_empty.default in seen and not is_block(one)
    with torch._subclasses.FakeTensorMode():
        assert type(tensor(MIB)) is torch._subclasses.FakeTensor


# -- contents ----------------------------------------------------------------------------------------------------------


def losses(dtype):
    N, V, W = 40, 700, 720  # the columns from V on are a tail
    base, aux = torch.randn(N, W, dtype=dtype), torch.randn(N, V, dtype=dtype)
    target = torch.randint(V, (N,))
    target[::3] = -100
    for options in ({}, {"reduction": "none"}, {"recompute": True}, {"z_loss": 1e-3, "label_smoothing": 0.1}):
        leaves = base.clone().requires_grad_(), aux.clone().requires_grad_()
        loss = aux_cross_entropy(*leaves, target, vocab_size=V, backend="native", **options)
        yield loss
        yield from torch.autograd.grad(loss.sum(), leaves)


def heads(dtype):
    N, V, D = 300, 700, 24
    target = torch.randint(V, (N,))
    target[::3] = -100
    hidden, weight = [torch.randn(N, D, dtype=dtype) for _ in range(3)], torch.randn(V + 20, D, dtype=dtype)
    for ignore_index in (-100, -1):
        with auxkernels_in_chunks():
            given = [one.clone().requires_grad_() for one in (*hidden, weight, torch.randn(V + 20, dtype=dtype))]
            base, auxes = Head(given[0], given[3]), [Head(one, given[3], bias=given[4]) for one in given[1:3]]
            targets = target.clamp(min=0) if ignore_index == -1 else target
            for one in auxes:
                loss = aux_cross_entropy(base, one, targets, vocab_size=V, ignore_index=ignore_index, backend="native")
                yield loss
                yield from torch.autograd.grad(loss, [base.hidden, one.hidden, given[3], given[4]])
            base = Head(hidden[0], weight)
            for loss in aux_cross_entropies(
                base, auxes, targets, vocab_size=V, ignore_index=ignore_index, backend="native"
            ):
                yield loss
                yield from torch.autograd.grad(loss, [given[3]], retain_graph=True)


class auxkernels_in_chunks:
    """Chunks of few rows, so that sums of several are formed."""

    def __enter__(self):
        auxkernels.chunk_settings.num_bytes = 1

    def __exit__(self, *_):
        auxkernels.chunk_settings.num_bytes = None


def lookups(dtype):
    for options in ({}, {"top_k": 5}, {"hard": True}, {"gumbel": 1.0, "seed": 3}, {"return_stats": True}):
        for tables in ((), (3,)):
            given = torch.randn(300, 77, dtype=dtype), torch.randn(*tables, 77, 40, dtype=dtype)
            scores, table = (one.requires_grad_() for one in given)
            made = soft_embedding(scores, table, temperature=0.7, backend="native", **options)
            mixture = made[0] if isinstance(made, tuple) else made
            yield mixture
            yield from torch.autograd.grad(mixture.square().sum(), (scores, table))
    rows = torch.randn(9, 40, dtype=dtype, requires_grad=True)
    tokens = segments_to_tokens(rows, torch.arange(-1, 8).repeat(20))
    yield tokens
    yield from torch.autograd.grad(tokens.square().sum(), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("results", [losses, heads, lookups])
def test_nothing_depends_on_what_a_block_held_before(cache, monkeypatch, results, dtype):
    """Bit for bit what memory of PyTorch's gives, in blocks that are full of NaN."""
    monkeypatch.setattr(memory, "LARGE", 1)
    found = []
    for num_bytes in (0, None, None):
        cache_settings.num_bytes = num_bytes
        cache.fill_taken_blocks(True)
        torch.manual_seed(0)
        before = taken(cache)
        found.append([one.detach().clone() for one in results(dtype)])
        assert (taken(cache) != before) == (num_bytes is None)
    plain, *in_blocks = found
    for others in in_blocks:
        for one, other in zip(plain, others, strict=True):
            ours, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (other, one))
            assert torch.equal(ours, theirs) and not other.isnan().any()
