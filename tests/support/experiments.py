"""An experiment on tiny models, and an executor without threads."""

from concurrent.futures import Future
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ist.loss import token_loss_sum
from ist.training.data import collate

FILE = {
    "recipe": {
        **{"max_steps": 6, "eval_steps": 2, "warmup_steps": 1, "prompt_template": "none"},
        **{"completion_only_loss": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "update_interval": 2},
    },
    "split": {"test": 10, "tuning": 6},
    "tuning": {"seed": 100, "grid": {"learning_rate": [2e-2]}},
    "seeds": [1, 2],
    "arms": {
        "LoRA": {"selection": "all"},
        "short": {"selection": "all", "max_steps": 2, "tuned_as": "LoRA"},
        "IST": {
            **{"selection": "ist", "trained_layers": 2, "kept_layers": 2},
            "tune": {"learning_rate": [1e-3, 2e-2], "score_lr": [10, 100]},
        },
        "fixed": {"selection": "fixed", "trained_layers": 2, "tuned_as": "LoRA", "top_of": "IST"},
    },
    "pairs": [["IST", "LoRA"], ["fixed", "IST"]],
    "evaluate": {"num_beams": 1, "max_new_tokens": 4},
}


def arguments(**values) -> list[str]:
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def saved_by_hooks(folder: Path, adapter: Path, rows: int, tokens: int) -> int:
    """Bytes that a forward of a loaded model with a trained adapter really saves, weights apart."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter, is_trainable=True)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    ids = torch.ones(rows, tokens, dtype=torch.long)
    batch = collate(ids.tolist(), ids.tolist(), 0)
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()
        token_loss_sum(model, batch)
    batch_own = {t.untyped_storage().data_ptr() for t in batch.values()}
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in own | batch_own)


class Inline:
    """An executor that runs what it is given at once, in this thread: signals are for the main one."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


def commonsense_row(i: int) -> dict:
    texts = f"Answer1: {i} apples Answer2: a pear.  Answer3: Answer keys"
    instruction = f"Please choose the correct answer to the question: How many has {i}?\n\n{texts}\n\n"
    return {"instruction": instruction + "Answer format: answer1/answer2/answer3", "answer": f"answer{i % 3 + 1}"}
