"""Under accelerate launch: transformers.Trainer with ISTCallback, on what is in the folder that is named.

    accelerate launch ... tests/support/callback_run.py FOLDER [checkpoint]

Writes FOLDER/rank<r>.json: the layers trained at each step, the scores and the losses.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from ist import ISTCallback, ISTConfig
from ist.training.data import collate

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
IST = {"update_interval": 4, "score_lr": 1000, "trained_layers": 1, "probe_batch_size": 6}


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate([row["input_ids"] for row in rows], [row["labels"] for row in rows], pad_token_id=0)
    batch["labels"][:, 0] = -100  # never predicted; transformers 5.0 counts it
    return batch


def in_order(trainer_class: type[Trainer]) -> type[Trainer]:
    """The trainer with rows in their order, noting the loss of each step and the layers that trained in it."""

    class InOrder(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            (callback,) = (c for c in self.callback_handler.callbacks if isinstance(c, ISTCallback))
            self.seen = [*getattr(self, "seen", []), (loss.item(), callback.tuner.trained)]
            return loss

    return InOrder


def arguments(output_dir: Path, batch_size: int, **options) -> dict:
    return {
        **{"output_dir": str(output_dir), "per_device_train_batch_size": batch_size, "max_steps": 20},
        **{"learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 5, "report_to": [], "use_cpu": True},
        **{"save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True, "seed": 42, **options},
    }


def lora(model_path: Path):
    set_seed(42)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    options = arguments(folder / "run", 2, save_strategy="steps", save_steps=10)
    callback = ISTCallback(ISTConfig(**IST))
    trainer = in_order(Trainer)(
        model=lora(folder / "tiny"),
        args=TrainingArguments(**options),
        train_dataset=Dataset.from_list(json.loads((folder / "rows.json").read_text())),
        data_collator=pad,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
    seen = {
        "world_size": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [loss for loss, _ in trainer.seen],
        "trained": [layers for _, layers in trainer.seen],
        "scores": callback.tuner.rule.scores.tolist(),
    }
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()  # gloo aborts a rank whose peer leaves while the group is up
    trainer.accelerator.end_training()
