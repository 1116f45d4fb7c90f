"""Bad input of all kinds; `python tests/support/bad_input.py` draws more."""

import json
import re
import subprocess
import sys

import pytest
from support import ROOT
from support.bad_models import BAD_METHODS, BAD_PEFT, GOOD_PEFT

from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.model import plan_layers


def test_bad_input_of_every_kind_is_one_line(tmp_path):
    """In a process of its own, which forks one for each."""
    command = [sys.executable, str(ROOT / "tests/support/bad_input.py"), "--times", "48", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "48 bad inputs, 0 of them not as they must be" in done.stdout
    refused = len(re.findall(": refused$", done.stdout, re.MULTILINE))
    assert refused > 30


@pytest.mark.parametrize("change", [{}, *BAD_PEFT, *BAD_METHODS], ids=str)
def test_every_bad_adapter_configuration_is_refused(tiny, tmp_path, change):
    """All of the suite's; without a change the configuration is served."""
    file = tmp_path / "peft.json"
    file.write_text(json.dumps(change if change in BAD_METHODS else {**GOOD_PEFT, **change}))
    flags = ["--model_name_or_path", str(tiny), "--train_file", "x", "--report_to", "none", "--peft_config", str(file)]
    args, _, _ = parse_training_arguments(flags, "")
    if not change:
        assert plan_layers(args, sharded=False).layers.n_layers == 4
        return
    with pytest.raises(UsageError, match=f"--peft_config {file}"):
        plan_layers(args, sharded=False)
