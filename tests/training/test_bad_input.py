"""Bad input of all kinds; `python tests/support/bad_input.py` draws more."""

import re
import subprocess
import sys

from support import ROOT


def test_bad_input_of_every_kind_is_one_line(tmp_path):
    """In a process of its own, which forks one for each."""
    command = [sys.executable, str(ROOT / "tests/support/bad_input.py"), "--times", "48", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "48 bad inputs, 0 of them not as they must be" in done.stdout
    refused = len(re.findall(": refused$", done.stdout, re.MULTILINE))
    assert refused > 30
