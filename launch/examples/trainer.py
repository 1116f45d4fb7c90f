"""transformers.Trainer with ISTCallback, on rows of one's own.

    python trainer.py MODEL ROWS.json OUTPUT_DIR [MAX_STEPS]

ROWS.json is a list of {"instruction": text, "output": text}. Needs `pip install ./ist` (or this repository's URL with
#subdirectory=ist) and nothing else of the repository. Leaves OUTPUT_DIR/adapter and OUTPUT_DIR/importance.jsonl.
"""

import json
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from ist import ISTCallback, ISTConfig
from ist.adapters.targets import default_target_modules


def encode(row: dict, tokenizer) -> dict:
    text = f"{row['instruction']}\n{row['output']}{tokenizer.eos_token or ''}"
    ids = tokenizer(text, truncation=True, max_length=512)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def main(model_name: str, rows_file: str, output_dir: str, max_steps: str = "-1") -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [encode(row, tokenizer) for row in json.loads(Path(rows_file).read_text())]
    model = AutoModelForCausalLM.from_pretrained(model_name)
    targets = default_target_modules(model)
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            max_steps=int(max_steps),
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[ISTCallback(ISTConfig(trained_layers=0.25, update_interval=10))],
    )
    trainer.train()
    model.save_pretrained(Path(output_dir) / "adapter")
    print(f"the adapter is in {output_dir}/adapter")


if __name__ == "__main__":
    if sys.argv[1:] == ["--help"]:
        print(__doc__)
    elif len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    else:
        main(*sys.argv[1:])
