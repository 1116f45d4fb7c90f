#!/usr/bin/env bash
# One GPU, Llama-7B geometry with random weights, bf16: 20 steps with IST under DDP and under FSDP2 at world size 1.
# Prints of each the peak memory that --plan predicts, then its peak memory and tokens per second.
#
#   launch/gpu_check.sh [DIR]      DIR (default runs/gpu_check) gets 13.5 GB of weights and the two runs
#   launch/gpu_check.sh --parity   two or more GPUs, two minutes: DDP = FSDP2 = one process (HSDP from four GPUs on), a
#                                  resume and a killed rank, on a tiny model
#
# HIDDEN, LAYERS, VOCABULARY and LENGTH make it smaller; KINDS=ddp ACCELERATE_USE_CPU=true is a trial without a GPU.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
if [ "${1:-}" = --parity ]; then
  launch/setup.sh
  shift
  exec .venv/bin/python -m ist.benchmark parity "$@"
fi
dir=${1:-runs/gpu_check}
launch/setup.sh --model # for its tokenizer
export HF_HUB_OFFLINE=1 HIDDEN=${HIDDEN:-4096} LAYERS=${LAYERS:-32} VOCABULARY=${VOCABULARY:-49152} LENGTH=${LENGTH:-1024}

if [ ! -f "$dir/model/config.json" ]; then
  echo "Writing random weights to $dir/model"
  .venv/bin/python - "$dir" <<'PYTHON'
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
hidden, layers, vocabulary, length = (int(os.environ[key]) for key in ("HIDDEN", "LAYERS", "VOCABULARY", "LENGTH"))
config = LlamaConfig(
    hidden_size=hidden,
    intermediate_size=hidden * 11008 // 4096,
    num_hidden_layers=layers,
    num_attention_heads=hidden // 128 if hidden >= 128 else 2,
    vocab_size=vocabulary,
    max_position_embeddings=2048,
)
tokenizer = AutoTokenizer.from_pretrained("models/SmolLM2-135M-Instruct")
tokenizer.save_pretrained(folder / "model")
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    LlamaForCausalLM(config).save_pretrained(folder / "model")
rows = [{"instruction": f"Count from {i}.", "output": " ".join(map(str, range(i, i + length)))} for i in range(64)]
(folder / "rows.json").write_text(json.dumps(rows))
PYTHON
fi

read -ra kinds <<<"${KINDS:-ddp fsdp2}"
for kind in "${kinds[@]}"; do
  flags=(
    --model_name_or_path "$dir/model" --train_file "$dir/rows.json" --max_length "$LENGTH" --dtype bfloat16 --bf16 true
    --per_device_train_batch_size 1 --max_steps 20 --warmup_steps 2 --logging_steps 20 --report_to none
    --output_dir "$dir/$kind"
  )
  for plan in true false; do
    .venv/bin/accelerate launch --config_file "accelerate_configs/$kind.yaml" --num_processes 1 train_ist.py \
      "${flags[@]}" --plan "$plan"
  done
done
.venv/bin/python - "$dir" "${kinds[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

print(f"{'':8}{'peak GB':>10}{'tokens/s':>10}{'s/step':>10}")
for kind in sys.argv[2:]:
    line = json.loads((Path(sys.argv[1]) / kind / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{kind:8}{line['peak_memory_bytes'] / 1e9:10.2f}{line['tokens_per_second']:10.0f}{line['step_seconds']:10.3f}")
PYTHON
