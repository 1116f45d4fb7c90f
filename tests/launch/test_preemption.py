"""Signals in the middle of steps, probes, evaluation and saves; `python tests/support/preemption.py` sends more."""

import pytest
from support import preemption


@pytest.mark.parametrize("topology", ["one", pytest.param("ddp", marks=pytest.mark.slow)])
def test_every_resume_reaches_the_undisturbed_end(topology, tmp_path):
    results = preemption.launch(topology, tmp_path, 3)
    assert [result["phase"] for result in results] == ["step", "probe", "evaluation"]
    for result in results:
        assert result["raised"][:1] == [result["phase"]]
        assert result["codes"] == [3, 0]
        assert (result["status"], 0 < result["steps"] < preemption.STEPS) == ("interrupted", True)
        assert max(result[key] for key in ("adapter", "loss", "scores")) <= (0 if topology == "one" else 1e-5)
