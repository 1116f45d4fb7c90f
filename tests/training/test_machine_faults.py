"""A disk that becomes full, a folder that goes away, signals and closed pipes: samples of tests/support/faults.py."""

import os
import signal

import pytest
from support import faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp("faults"))


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("REQUIRE_CLUSTER"), reason="only root can mount a disk of a size"
)


@needs_root
@pytest.mark.parametrize("share", [0.02, 0.55])
def test_a_full_disk_ends_a_run_with_one_line(bench, share):
    outcome = faults.full_disk(bench, int(bench.bytes * share))
    assert outcome["code"] in (1, 2)
    assert outcome["end"] == "equal"


@needs_root
@pytest.mark.parametrize("how", ["filled", "gone"])
def test_a_disk_that_fails_between_two_steps(bench, how):
    outcome = faults.failing_disk(bench, how)
    assert outcome["code"] == 1
    assert outcome["end"] == "equal"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_a_signal_saves(bench, number):
    assert faults.stopped(bench, number.name, number)["end"] == "equal"


@pytest.mark.parametrize("stream", ["stdout to head -1", "both closed"])
def test_streams_that_go_away_cost_nothing(bench, stream):
    outcome = faults.piped(bench, stream)
    assert (outcome["status"], outcome["end"]) == ("finished", "equal")
