"""TRL's DPOTrainer with ISTCallback, on pairs of one's own.

    python dpo.py MODEL PAIRS.json OUTPUT_DIR [MAX_STEPS]

PAIRS.json is a list of {"prompt": text, "chosen": text, "rejected": text}. Needs `pip install ./ist` (or this
repository's URL with #subdirectory=ist) and trl, and nothing else of the repository. Leaves OUTPUT_DIR/adapter and
OUTPUT_DIR/importance.jsonl.
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ist import ISTCallback, ISTConfig
from ist.adapters.targets import default_target_modules


def main(model_name: str, pairs_file: str, output_dir: str, max_steps: str = "-1") -> None:
    model = AutoModelForCausalLM.from_pretrained(model_name)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=4,
            learning_rate=5e-5,
            max_steps=int(max_steps),
            logging_steps=10,
            use_cpu=not torch.accelerator.is_available(),  # TRL's default, bf16, is refused on a CPU without it
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=pairs_file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model_name),
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules=default_target_modules(model), task_type="CAUSAL_LM"
        ),
    )
    # Candidate sets are compared by the loss of the pairs, which only the trainer has.
    trainer.add_callback(ISTCallback(ISTConfig(trained_layers=0.25, update_interval=10), trainer=trainer))
    trainer.train()
    trainer.model.save_pretrained(Path(output_dir) / "adapter")
    print(f"the adapter is in {output_dir}/adapter")


if __name__ == "__main__":
    if sys.argv[1:] == ["--help"]:
        print(__doc__)
    elif len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    else:
        main(*sys.argv[1:])
