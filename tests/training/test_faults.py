"""Damaged files and killed launches; `python tests/support/damage.py` and `kills.py` draw more, on more topologies."""

import pytest
from support import damage, kills


@pytest.mark.parametrize(
    ("topology", "times"),
    [("one", 12), pytest.param("ddp", 4, marks=pytest.mark.slow), pytest.param("fsdp2", 4, marks=pytest.mark.slow)],
)
def test_a_damaged_run_refuses_or_reaches_the_undisturbed_end(topology, times, tmp_path):
    results = list(damage.launch(topology, tmp_path, times))
    assert [result["number"] for result in results] == list(range(times))
    assert not [result for result in results if "fault" in result]
    assert {result["outcome"] for result in results} <= {"refused", "fell back, equal", "equal"}


@pytest.mark.slow
def test_a_killed_run_reaches_the_undisturbed_end(tmp_path):
    results = list(kills.launch_all("one", tmp_path, 2, seed=11, steps=30, launcher=False))
    assert [result["outcome"] for result in results] == ["equal", "equal"], results
    assert all(result["kills"] for result in results)
