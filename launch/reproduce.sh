#!/usr/bin/env bash
# One row of the paper's Table 2 or 3: train a recipe in one of its arms, then score it on the recipe's tasks.
#
#   launch/reproduce.sh RECIPE ARM [SEED] [--key value ...]      ARM: a selection: all (plain PEFT), random, ist ...
#   launch/reproduce.sh llama_7b_lora_commonsense ist 42 --model_name_or_path /weights/llama-7b-hf
#
# Needs the weights, and LLM-Adapters' files under $DATA (default data/): commonsense_170k.json or math_10k.json, and
# dataset/TASK/test.json. $CONFIG names the topology (accelerate_configs/single.yaml), $TASKS other tasks. Stopped at any moment,
# the same command goes on. Leaves runs/RECIPE-ARM-SEED/ and results/RECIPE-ARM-SEED/; then, over arms and seeds:
#   python -m ist.report --results results/RECIPE-*
set -euo pipefail
usage() { sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; }
case ${1:-} in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 2 ]; then usage >&2; exit 2; fi
cd "$(dirname "$0")/.."
recipe=$1 arm=$2
shift 2
seed=42
if [[ ${1:-} =~ ^[0-9]+$ ]]; then seed=$1; shift; fi
file=launch/recipes/$recipe.yaml
if [ ! -f "$file" ]; then
  recipes=(launch/recipes/*.yaml)
  recipes=("${recipes[@]##*/}")
  echo "error: no recipe $recipe; there are: ${recipes[*]%.yaml}" >&2
  exit 2
fi
case $arm in
all | random | ist | lisa | fixed | first | last | semantic | semantic+ist) ;;
*) echo "error: ARM must be a selection of train_ist.py (all, random, ist, lisa, ...); got $arm" >&2; exit 2 ;;
esac

data=${DATA:-data} config=${CONFIG:-accelerate_configs/single.yaml} name=$recipe-$arm-$seed
case " $* " in *" --peft_method none "* | *" --peft_method=none "*) name=$recipe-full-$arm-$seed ;; esac
python=python
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
case $recipe in
*math*) rows=math_10k.json tasks=${TASKS:-"gsm8k AQuA mawps SVAMP"} ;;
*) rows=commonsense_170k.json tasks=${TASKS:-"boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa"} ;;
esac
files=()
for task in $tasks; do
  if [ ! -f "$data/dataset/$task/test.json" ]; then echo "error: no $data/dataset/$task/test.json; set DATA" >&2; exit 2; fi
  files+=("$data/dataset/$task/test.json")
done

$python -m accelerate.commands.launch --quiet --config_file "$config" train_ist.py --config "$file" \
  --train_file "$data/$rows" --selection "$arm" --seed "$seed" --output_dir "runs/$name" \
  --resume_from_checkpoint auto "$@"
if [ -d "runs/$name/model" ]; then
  result=(--model_name_or_path "runs/$name/model")
else
  read_base='import json, os, sys; run = json.load(open(sys.argv[1], encoding="utf-8"))
sys.stdout.buffer.write(os.fsencode(run["configuration"]["model_name_or_path"]))'
  base=$($python -c "$read_base" "runs/$name/run.json")
  result=(--model_name_or_path "$base" --adapter "runs/$name/adapter")
fi
$python -m accelerate.commands.launch --quiet --config_file "$config" -m ist.evaluate "${result[@]}" \
  --test_file "${files[@]}" --output_dir "results/$name"
