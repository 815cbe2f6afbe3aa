"""A Trainer's losses in one process or, where torchrun runs this file, in several, which write them to a file."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from parallel_training import new_model
from transformers import Trainer, TrainingArguments

from auxkernels.models import DataCollatorForPrefixes

STEPS, ROWS = 6, 8  # of all processes
ACCUMULATED = (1, 2)


def trained(accumulate: int) -> dict[str, list[float]]:
    """Losses and gradient norms of the steps, in float64; texts are of different lengths."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (ROWS * STEPS,), generator=drawn).tolist()
    texts = [{"input_ids": torch.randint(3, 50, (length,), generator=drawn).tolist()} for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS // accumulate // world,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.3,
            lr_scheduler_type="constant",
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = new_model("auxiliary", "llama", False)
        trainer = Trainer(model, options, train_dataset=texts, data_collator=DataCollatorForPrefixes(pad_token_id=0))
        trainer.train()
        assert trainer.args.world_size == world
        assert (world == 1) == (type(trainer.model_wrapped).__name__ != "DistributedDataParallel")
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm")}


if __name__ == "__main__":
    found = [trained(accumulate) for accumulate in ACCUMULATED]
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may still let go of tensors, which aborts a process in which Python ends
