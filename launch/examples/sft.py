"""TRL's SFTTrainer with ISTCallback, on rows of one's own.

    python sft.py MODEL ROWS.json OUTPUT_DIR [MAX_STEPS] [LOSS_TYPE]

ROWS.json is a list of {"prompt": text, "completion": text}; LOSS_TYPE is nll (the default) or dft. Needs `pip install
./ist` (or this repository's URL with #subdirectory=ist) and trl, and nothing else of the repository. Leaves
OUTPUT_DIR/adapter and OUTPUT_DIR/importance.jsonl.
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ist import ISTCallback, ISTConfig
from ist.adapters.targets import default_target_modules


def main(model_name: str, rows_file: str, output_dir: str, max_steps: str = "-1", loss_type: str = "nll") -> None:
    model = AutoModelForCausalLM.from_pretrained(model_name)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=output_dir,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            max_steps=int(max_steps),
            logging_steps=10,
            loss_type=loss_type,
            use_cpu=not torch.accelerator.is_available(),  # TRL's default, bf16, is refused on a CPU without it
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=rows_file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model_name),
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules=default_target_modules(model), task_type="CAUSAL_LM"
        ),
    )
    # With the trainer, so that probes measure the loss that it trains by; with nll it could be left out.
    trainer.add_callback(ISTCallback(ISTConfig(trained_layers=0.25, update_interval=10), trainer=trainer))
    trainer.train()
    trainer.model.save_pretrained(Path(output_dir) / "adapter")
    print(f"the adapter is in {output_dir}/adapter")


if __name__ == "__main__":
    if sys.argv[1:] == ["--help"]:
        print(__doc__)
    elif not 4 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    else:
        main(*sys.argv[1:])
