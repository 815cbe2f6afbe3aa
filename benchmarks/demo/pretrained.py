"""The demo on a pretrained model: an auxiliary of another style, and the same prompts at several scales of it."""

from dataclasses import asdict, dataclass, replace

import torch
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from auxkernels.models import AuxiliaryForCausalLM, BaseCache, DataCollatorForBaseCache
from benchmarks import pretrained
from benchmarks.reproductions.bible import load_verses, split_chapters
from benchmarks.training.loop import Recipe, settings_key, train
from benchmarks.training.terminal import Terminal
from benchmarks.training.text import make_windows

DIALS = (0.0, 1.0, 1.5)
PROMPTS = (
    "My phone ran out of battery, so",
    "The teacher asked the class to",
    "On Monday morning the engineers",
)
NEW_TOKENS = 40


@dataclass(frozen=True)
class Settings:
    """Tokens in a window, windows to train on and to keep apart, and what the auxiliary reads of the base."""

    length: int = 128
    windows: int = 768
    held_out: int = 16
    trunk_layer: int = 15
    steps: int = 192
    batch: int = 8
    learning_rate: float = 2e-3


SETTINGS = Settings()


def windows_of(tokenizer, settings):
    """Token windows, int64 [windows + held_out, length]: at equal distances in training chapters, then in others."""
    splits = split_chapters(load_verses())
    parts = []
    for split, count in (("train", settings.windows), ("validation", settings.held_out)):
        texts = [" ".join(chapter) for chapter in splits[split]]
        windows = make_windows(tokenizer.backend_tokenizer, texts, settings.length)
        parts.append(windows[:-1].spread(count).tokens)  # the last one is padded
    return torch.cat(parts)


def tune(base, tokens, settings, arguments, terminal):
    """The auxiliary beside the base, which is read once; (model, held-out loss, that of the base alone)."""
    dtype = str(base.dtype).removeprefix("torch.")
    key = settings_key({**asdict(settings), "dtype": dtype, "seed": arguments.seed, "tokens": tokens.sum().item()})
    folder = arguments.cache / f"pretrained-{key}"
    with terminal.stage(f"reading {tokens.numel()} tokens with the base, once"):
        examples = [{"input_ids": row} for row in tokens]
        layers = {"trunk_layers": [settings.trunk_layer]}
        cache = BaseCache.create(folder / "base", base, examples, lse=False, dtype=dtype, batch_size=8, **layers)
    torch.manual_seed(arguments.seed)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, "small", head="shared", trunk_layer=settings.trunk_layer)
    items, collate = cache.dataset(model), DataCollatorForBaseCache()
    num_train = len(tokens) - settings.held_out

    def loss_of(indices):
        return model(**collate([items[i] for i in indices.tolist()])).loss

    recipe = Recipe(settings.steps, settings.batch, settings.learning_rate, warmup_steps=10, seed=arguments.seed)
    with terminal.stage("training the auxiliary", total=settings.steps) as advance:
        train(model, loss_of, num_train, recipe, folder / "auxiliary.safetensors", advance)
    with torch.no_grad():
        output = model(**collate([items[i] for i in range(num_train, len(tokens))]), skip_logits=True)
    return model, output.loss.item(), output.base_loss.item()


def continued(model, tokenizer, prompt, seed):
    """The prompt's continuation at each of DIALS, sampled from the same random numbers."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    texts = []
    for dial in DIALS:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": NEW_TOKENS}
        found = model.generate(ids, aux_scale=dial, pad_token_id=tokenizer.eos_token_id, **options)
        texts.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def run(arguments):
    """Tunes the model and prints its continuations; returns the exit status."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings, terminal = replace(SETTINGS, steps=arguments.steps or SETTINGS.steps), Terminal()
    with terminal.stage("loading the base"):
        base, tokenizer = pretrained.load_language_model(getattr(torch, arguments.dtype))
    tokens = windows_of(tokenizer, settings)
    model, loss, base_loss = tune(base, tokens, settings, arguments, terminal)
    terminal.say(f"held-out loss: {loss:.2f} nats per token, {base_loss:.2f} of the base alone")
    table = Table(*(f"dial at {dial:g}" + (" (the base)" if dial == 0 else "") for dial in DIALS), show_lines=True)
    with terminal.stage("continuing the prompts"):
        for prompt in PROMPTS:
            texts = continued(model, tokenizer, prompt, arguments.seed)
            table.add_row(*(Text.assemble((prompt, "bold"), f" {text}") for text in texts))
    terminal.console.print(table)
    return 0
