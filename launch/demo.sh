#!/usr/bin/env bash
# The whole way once, on a CPU or one GPU: environment, a real 30-layer model, word problems with worked answers,
# fine-tuning with IST, and the exact answers on held-out problems before and after.
#
#   launch/demo.sh [--key value ...]      arguments go to train_ist.py, after launch/recipes/demo.yaml
#
# Leaves runs/demo/ (launch/README.md lists its files) and runs/demo.json; DEMO_DIR names another folder. At most 15 minutes on two CPU cores, most of it
# the first time: run again, it goes on where it was stopped and does nothing twice.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
run=${DEMO_DIR:-runs/demo}
model=models/SmolLM2-135M-Instruct

say "1/5 Environment and model"
launch/setup.sh --model
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} # accelerate launch would set 1

# bfloat16 where the hardware multiplies it, float32 elsewhere.
dtype=float32
if command -v nvidia-smi >/dev/null || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi

say "2/5 Word problems"
if [ ! -f "$run/data/held_out.json" ]; then .venv/bin/python -m ist.training.word_problems --output_dir "$run/data"; fi

evaluate() { # NAME [--adapter DIR]
  local name=$1
  shift
  if [ ! -f "$run/$name/summary.json" ]; then
    .venv/bin/python -m ist.evaluate --model_name_or_path $model --dtype $dtype --test_file "$run/data/held_out.json" \
      --num_beams 1 --max_new_tokens 48 --batch_size 32 --output_dir "$run/$name" "$@"
  fi
}
say "3/5 Exact answers on held-out problems, before"
evaluate before

say "4/5 Fine-tuning with IST"
.venv/bin/accelerate launch --quiet --config_file accelerate_configs/single.yaml train_ist.py \
  --config launch/recipes/demo.yaml --dtype $dtype --resume_from_checkpoint auto --output_dir "$run" \
  --train_file "$run/data/train.json" --validation_file "$run/data/validation.json" "$@"

say "5/5 Exact answers on held-out problems, after"
evaluate after --adapter "$run/adapter"

.venv/bin/python - "$run" <<'PYTHON'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
read = lambda name: json.loads((run / name).read_text())
losses = [line["validation_loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "validation_loss" in line]
before, after = read("before/summary.json"), read("after/summary.json")
record = read("run.json")
demo = {
    "exact_before": before["average"],
    "exact_after": after["average"],
    "validation_loss_before": losses[0],
    "validation_loss_after": losses[-1],
    **{key: record[key] for key in ("start", "end", "commit", "versions", "hardware")},
    "seed": record["configuration"]["seed"],
    "held_out_rows": after["tasks"]["held_out"]["rows"],
}
text = json.dumps(demo, indent=1) + "\n"
for path in (run / "demo.json", run.with_name(run.name + ".json")):
    path.write_text(text)
print(f"""
exact answers on {demo['held_out_rows']} held-out problems   {demo['exact_before']:.1%} -> {demo['exact_after']:.1%}
validation loss                       {losses[0]:.3f} -> {losses[-1]:.3f}

  {run}/adapter/           the adapter, as PEFT loads it
  {run}/importance.png     which layers mattered, and how often each was trained
  {run}/loss.png           training and validation loss over steps
  {run}/metrics.jsonl      loss, learning rate, memory, seconds per step
  {run}/importance.jsonl   every importance update
  {run}/run.json           status, configuration, versions
  {run}/after/held_out.jsonl   the held-out answers ({run}/before/held_out.jsonl: those of the base model)
  {run}/demo.json          the numbers above""")
PYTHON
