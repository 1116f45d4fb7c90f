#!/usr/bin/env bash
# The tables of launch/experiments/README.md: selection rules on real rows, and which layers matter.
#
#   launch/evidence.sh DATA [PART ...]
#
# DATA is a folder with math/train.json (rows of word problems with worked answers, in LLM-Adapters' format) and
# wikitext-2/valid.txt and test.txt, and of commonsense/ {ARC-Challenge,ARC-Easy,boolq}/{train,test}.json and
# openbookqa/train.json. Parts, all of the first round if none is named: arithmetic, wikitext-2, commonsense, layers; of
# the second: oracle, concentration, length, gemma, gsm8k (needs math/gsm8k/test.json), clock. Hours each on two CPU cores;
# stopped at any time, it goes on from there. Results, tables and pictures go to launch/experiments/ and launch/results/.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ -d "${1:-}" ] || { echo "error: DATA must be a folder; got ${1:-nothing}. See launch/evidence.sh --help" >&2; exit 2; }
data=$(realpath --relative-to="$(dirname "$0")/.." -s "$1")
shift
cd "$(dirname "$0")/.."
for part in "$@"; do
  case $part in
    arithmetic | wikitext-2 | commonsense | layers | oracle | concentration | length | gemma | gsm8k | clock) ;;
    *) echo "error: unknown part $part; see launch/evidence.sh --help" >&2; exit 2 ;;
  esac
done
parts=${*:-arithmetic wikitext-2 commonsense layers}
launch/setup.sh --model
case " $parts " in *" gemma "*) launch/setup.sh --gemma ;; esac
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
model=models/SmolLM2-135M-Instruct

experiment() { # NAME [--key value ...]
  local base=$model
  case $1 in
    gemma) base=models/gemma-3-270m ;;
  esac
  case $1 in
    arithmetic | oracle | concentration | length | gemma | clock) set -- "$@" --train_file "$data/math/train.json" ;;
    gsm8k) set -- "$@" --train_file "$data/math/train.json" --test_file "$data/math/gsm8k/test.json" ;;
    wikitext-2) set -- "$@" --train_file "$data/wikitext-2/valid.txt" --test_file "$data/wikitext-2/test.txt" ;;
    commonsense)
      set -- "$@" --train_file "$data/commonsense/"{ARC-Challenge,ARC-Easy,boolq,openbookqa}/train.json \
        --test_file "$data/commonsense/"{ARC-Challenge,ARC-Easy,boolq}/test.json
      ;;
  esac
  .venv/bin/python -m launch.experiments.run --experiment "launch/experiments/$1.yaml" --model_name_or_path "$base" \
    --output_dir "runs/$1" "${@:2}"
}

folder() { # EXPERIMENT RUN: of a run, by its file of results without .json
  .venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["folder"])' "runs/$1/results/$2.json"
}

layers() { # of both experiments; with "publish", into launch/results/ and launch/experiments/README.md
  local ranks name full adapter
  ranks=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
  if [ "$ranks" = 0 ]; then export ACCELERATE_USE_CPU=true; ranks=$(nproc); fi
  for name in arithmetic wikitext-2; do
    [ -f "runs/$name/results/experiment.json" ] || { echo "error: run the part $name first" >&2; exit 2; }
    case $name in
      arithmetic) text=(--rows_file runs/arithmetic/data/tuning.json) ;; # arms may train by what is found: not on test rows
      wikitext-2) text=(--text_file "$data/wikitext-2/test.txt" --max_length 256) ;;
    esac
    adapter=$(folder $name lora-1)/adapter
    full=$(folder $name full-fine-tuning-1)/model
    importance=()
    for seed in 1 2 3; do importance+=("$(folder $name "ist-8-$seed")"); done
    .venv/bin/accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes "$ranks" \
      -m ist.analyze --model_name_or_path $model --adapter "$adapter" --dtype bfloat16 \
      "${text[@]}" --max_tokens 1024 --output_dir "runs/layers/$name" --importance "${importance[@]}" \
      --lines "full fine-tuning=$full" ${1:+--publish "launch/results/layers-$name.json" --readme launch/experiments/README.md}
  done
}

# First everything is run, then all is published: a new table makes a checkout differ from its commit.
for part in $parts; do
  if [ "$part" = layers ]; then layers; else experiment "$part"; fi
done
for part in $parts; do
  if [ "$part" = layers ]; then
    # Figure 4: the scores of both tasks side by side.
    .venv/bin/python -m ist.report --importance "arithmetic=$(folder arithmetic ist-8-1)" \
      "wikitext-2=$(folder wikitext-2 ist-8-1)" --output_dir launch/results
    layers publish
  else
    experiment "$part" --publish "launch/experiments/results/$part" --readme launch/experiments/README.md
  fi
done
