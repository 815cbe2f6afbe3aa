"""Input makers shared by the tests: logits, targets, confident rows, views, and covering choices of options."""

import itertools
import random

import torch
from torch import Tensor

from auxkernels import Head, chunk_settings
from auxkernels.heads import rows as row_module

# the vocabulary sizes at which something changes
WIDTHS_SMALL = [
    *(1, 2, 3),  # no other class, one other class, less than any vector
    *(31, 32, 33),  # one vector of 16 floats twice, and a tail of every kind
    *(127, 128, 129),  # the accumulators of an unrolled loop, one short, exact, one over
    *(1023, 1024, 1025),  # several trips of every loop, and a block of a GPU kernel
    *(4095, 4096, 4097),  # more than one block
]
WIDTHS_LARGE = [32000, 50257, 128256, 151936]  # Llama 2, GPT-2 (odd), Llama 3, Qwen 2.5

# every target that has led to a wild read somewhere, in a vocabulary of V: negative, just outside, wrapping in 32 bits
HOSTILE_TARGETS = ("-2**63", "-2**31", "-123456", "-101", "-1", "V", "V+1", "2**31-1", "2**31", "2**32+5", "2**63-1")
HOSTILE_IGNORE_INDICES = ("-100", "0", "V-1", "V+5", "2**40")


def integer(text: str, vocab_size: int) -> int:
    """The number meant by an entry of the lists above."""
    return int(eval(text, {"V": vocab_size}))


def logits(*shape: int, dtype=torch.float32, device="cpu", scale=3.0, requires_grad=False) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_(requires_grad)


def targets(*shape: int, vocab_size: int, dtype=torch.int64, device="cpu", ignored=0.0, ignore_index=-100) -> Tensor:
    """Random classes; a share `ignored` of the rows, rounded up, holds ignore_index."""
    target = torch.randint(vocab_size, shape, dtype=dtype)
    flat = target.view(-1)
    flat[torch.randperm(flat.numel())[: -int(-ignored * flat.numel() // 1)]] = ignore_index
    return target.to(device)


def confident_row(vocab_size: int, target: int, rest: float, offset: float) -> Tensor:
    """float64 [V] with probability 1 - rest at the target, the rest spread unevenly; the target's logit is offset."""
    others = torch.randn(vocab_size, dtype=torch.float64)
    keep = torch.arange(vocab_size) != target
    share = torch.where(keep, others.exp(), 0.0)
    row = torch.log(share / share.sum() * rest / (1 - rest))
    row[target] = 0.0
    return row + offset


def split_in_two(row: Tensor, device="cpu") -> tuple[Tensor, Tensor]:
    """Float32 base and aux whose float32 sum is (close to) the row, aux as large as base."""
    base = (row / 2 + torch.randn_like(row)).to(device, torch.float32)
    return base, (row.to(device) - base).to(torch.float32)


# -- heads -------------------------------------------------------------------------------------------------------------


def head(*shape: int, vocab_size: int, width=16, bias=False, dtype=torch.float32, device="cpu", grad=True, **options):
    """A `Head` whose logits have a standard deviation of about two, hidden [*shape, width]."""
    made = {"dtype": dtype, "device": device, "requires_grad": grad}
    hidden = logits(*shape, width, scale=1.0, **made)
    weight = logits(vocab_size, width, scale=2 * width**-0.5, **made)
    return Head(hidden, weight, bias=logits(vocab_size, scale=1.0, **made) if bias else None, **options)


def cut_rows(monkeypatch, num_rows: int) -> None:
    """Heads are worked on in as many chunks as there are whole `num_rows` in the batch."""
    monkeypatch.setattr(row_module, "MIN_ROWS", num_rows)
    monkeypatch.setattr(chunk_settings, "num_bytes", 1)


# -- views -------------------------------------------------------------------------------------------------------------


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers [*, V] in another place: NaN wherever the view must not look."""
    *lead, vocab_size = tensor.shape
    if layout == "padded rows":
        buffer = tensor.new_full((*lead, vocab_size + 5), torch.nan)
        view = buffer[..., 2 : 2 + vocab_size]
    elif layout == "every second row":
        buffer = tensor.new_full((lead[0] * 2, *lead[1:], vocab_size), torch.nan)
        view = buffer[::2]
    elif layout == "shifted":
        buffer = tensor.new_full((lead[0], *lead[1:-1], lead[-1] + 1, vocab_size), torch.nan)
        view = buffer[..., :-1, :]
    elif layout == "transposed rows":
        buffer = tensor.new_full((*lead[::-1], vocab_size), torch.nan)
        view = buffer.permute(*range(len(lead))[::-1], len(lead))
    elif layout.startswith("offset "):
        by = int(layout.split()[1])
        buffer = tensor.new_full((tensor.numel() + by,), torch.nan)
        view = buffer[by:].view(tensor.shape)
    else:
        raise ValueError(layout)
    view.copy_(tensor)
    return view


LAYOUTS = ["padded rows", "every second row", "shifted", "transposed rows", "offset 1", "offset 3", "offset 7"]


# -- choices of options ------------------------------------------------------------------------------------------------


def covering_pairs(axes: dict[str, list], seed: int = 0) -> list[dict]:
    """Rows that together hold every pair of values of every two axes, made greedily and always in the same way."""
    draw = random.Random(seed)
    names = list(axes)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def gained(row):
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & missing

    rows = []
    while missing:
        a, i, b, j = min(missing)  # this pair for certain, the best of forty draws around it
        drawn = ({name: draw.randrange(len(axes[name])) for name in names} | {a: i, b: j} for _ in range(40))
        best = max(drawn, key=lambda row: len(gained(row)))
        missing -= gained(best)
        rows.append({name: axes[name][choice] for name, choice in best.items()})
    return rows


def label(row: dict) -> str:
    """A test id from a row of `covering_pairs`: what differs from the axis's first, plain value."""
    return "-".join(f"{value}".replace(" ", "_").replace("torch.", "") for value in row.values())
