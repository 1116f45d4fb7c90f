#!/usr/bin/env bash
# Set up what is missing and run the tests: tests/run.sh [--all | --oldest | --oldest-but-torch] [pytest arguments]
#
#   tests/run.sh          everything on tiny models, about 10 minutes on two cores; fetches nothing but packages
#   tests/run.sh --all    and the slow launches, with the demo's model (93 MB, fetched once)
#   tests/run.sh --oldest             everything on tiny models, on the oldest versions that work (.venv-oldest, 7 GB)
#   tests/run.sh --oldest-but-torch   the same with the newest torch, that of .venv; CI runs some tests on it
#   tests/run.sh tests/test_sampler.py -k counts    only these
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^[^#]/q;s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
venv=.venv select=(-m "not slow")
case ${1:-} in
  --all) shift; launch/setup.sh --tests --model; select=() ;;
  --oldest | --oldest-but-torch) venv=.venv${1#-}; shift ;;
  *) launch/setup.sh --tests ;;
esac
oldest=tests/requirements-oldest.txt
if [ "$venv" != .venv ] && ! cmp -s $oldest "$venv/installed"; then
  echo "Installing $oldest into $venv"
  launch/setup.sh --tests # the Python, and for --oldest-but-torch what is not in the file
  rm -rf "$venv"
  .venv/bin/python -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  if [ "$venv" = .venv-oldest ]; then
    # What the file names is of its version; the other tools of the tests are the newest.
    named=$(sed -n 's/==.*//p' $oldest | paste -sd '|')
    "${pip[@]}" -r $oldest -r <(grep -vE "^($named)==" tests/requirements.txt)
    "${pip[@]}" --no-deps -r tests/requirements-no-deps.txt
  else
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$site" >"$("$venv/bin/python" -c "$site")/newest.pth"
    "${pip[@]}" --no-deps -r <(grep -v '^torch=' $oldest)
  fi
  cp $oldest "$venv/installed"
fi
paths=(tests) # unless arguments name some
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then paths=(); fi
done
# Two workers of one thread: tiny models gain nothing from a second one.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$venv/bin/python" -m pytest "${paths[@]}" -n 2 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@"
