"""Under accelerate launch: transformers.Trainer with ISTCallback, or TRL's DPOTrainer, on what is in the folder that is
named.

    accelerate launch ... tests/support/callback_run.py FOLDER [dpo | CHECKPOINT]

Writes FOLDER/rank<r>.json: the layers trained at each step, the scores and the losses.
"""

import gc
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

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


def supervised(folder: Path, batch_size: int) -> tuple[Trainer, ISTCallback]:
    callback = ISTCallback(ISTConfig(**IST))
    trainer = in_order(Trainer)(
        model=lora(folder / "tiny"),
        args=TrainingArguments(**arguments(folder / "run", batch_size, save_strategy="steps", save_steps=10)),
        train_dataset=Dataset.from_list(json.loads((folder / "rows.json").read_text())),
        data_collator=pad,
        callbacks=[callback],
    )
    return trainer, callback


def preference(folder: Path, batch_size: int, probe_batch_size: int = 5) -> tuple[Trainer, ISTCallback]:
    """Of 5 probe rows two ranks make 6: a batch of two rows each, and one of one row each."""
    from trl import DPOConfig, DPOTrainer

    set_seed(42)  # older versions of TRL make the adapter without a seed
    targets = ["q_proj", "v_proj", "down_proj"]
    trainer = in_order(DPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(folder / "tiny"),
        args=DPOConfig(**arguments(folder / "run", batch_size, bf16=False, remove_unused_columns=True)),
        train_dataset=Dataset.from_list(json.loads((folder / "rows.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tiny"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"),
    )
    callback = ISTCallback(ISTConfig(**IST | {"probe_batch_size": probe_batch_size, "score_lr": 10}), trainer=trainer)
    trainer.add_callback(callback)
    return trainer, callback


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    trainer, callback = (preference if how == "dpo" else supervised)(folder, 2)
    trainer.train(resume_from_checkpoint=None if how == "dpo" else how)
    seen = {
        "world_size": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [loss for loss, _ in trainer.seen],
        "trained": [layers for _, layers in trainer.seen],
        "scores": callback.tuner.rule.scores.tolist(),
    }
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    # gloo aborts a rank whose peer leaves while the group is up: all meet, then the group goes, with DDP that holds it.
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    del trainer, callback
    gc.collect()
    accelerator.end_training()
