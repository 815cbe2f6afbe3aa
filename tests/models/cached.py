"""Small caches of a base's hidden states, and what they are written from."""

import torch
from tiny import VOCAB_SIZE, tiny_model, transformers

LENGTHS = (5, 9, 7, 9, 3, 8, 2, 6)
TEXTS_IN_ROWS = ((4, 5), (9,), (2, 3, 4), (1, 8), (6, 3))


def examples_of(lengths=LENGTHS, seed=0):
    """Rows of random tokens, one text in each."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, VOCAB_SIZE, (n,), generator=generator)} for n in lengths]


def packed_examples(rows=TEXTS_IN_ROWS, seed=0):
    """Rows of several texts each, which their positions tell apart."""
    examples = examples_of([sum(row) for row in rows], seed)
    positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
    return [{**example, "position_ids": one} for example, one in zip(examples, positions, strict=True)]


def saved_base(folder, architecture="llama", *, dtype=torch.bfloat16, **options):
    """A base that was loaded from a folder, and so has a name to be found by."""
    model = tiny_model(architecture, seed=1, width=24, **options).to(dtype)
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
