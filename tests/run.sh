#!/usr/bin/env bash
# Set up what is missing and run the tests: tests/run.sh [--all] [pytest arguments]
#
#   tests/run.sh          everything on tiny models, about 10 minutes on two cores; fetches nothing but packages
#   tests/run.sh --all    and the slow launches, with the demo's model (93 MB, fetched once)
#   tests/run.sh tests/test_sampler.py -k counts    only these
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
if [ "${1:-}" = --all ]; then
  shift
  launch/setup.sh --tests --model
  select=()
else
  launch/setup.sh --tests
  select=(-m "not slow")
fi
paths=(tests) # unless arguments name some
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then paths=(); fi
done
# Two workers of one thread: tiny models gain nothing from a second one.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/python -m pytest "${paths[@]}" -n 2 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@"
