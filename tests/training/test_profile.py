"""--profile true: a trace of three steps, and the same run."""

import json

import pytest
from support import read_lines, reset_accelerate
from support.runs import assert_same_adapter, without_times

import train_ist


@pytest.mark.parametrize(("steps", "traced"), [(8, 3), (4, 3), (2, 1)])
def test_three_steps_are_traced(arguments, tmp_path, capsys, steps, traced):
    for name, flags in (("plain", []), ("traced", ["--profile", "true"])):
        reset_accelerate()
        assert train_ist.main([*arguments(output_dir=tmp_path / name, max_steps=steps), *flags]) == 0
    reset_accelerate()
    folder = tmp_path / "traced/profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == traced
    assert "aten::mm" in names and "aten::mm" in (folder / "operations.txt").read_text()
    assert f"profile: {folder / 'trace.json'}" in capsys.readouterr().out
    assert not (tmp_path / "plain/profile").exists()
    assert_same_adapter(tmp_path / "plain", tmp_path / "traced")
    plain, with_trace = (without_times(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("plain", "traced"))
    assert plain == with_trace


def test_a_run_of_one_step_is_not_traced_and_ends(arguments, tmp_path):
    reset_accelerate()
    assert train_ist.main([*arguments(max_steps=1), "--profile", "true"]) == 0
    reset_accelerate()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"


def test_a_resumed_run_may_be_traced(arguments, tmp_path):
    reset_accelerate()
    assert train_ist.main(arguments(max_steps=8, save_steps=4)) == 0
    reset_accelerate()
    checkpoint = tmp_path / "run/checkpoints/step_000004"
    flags = [*arguments(max_steps=8, save_steps=4, output_dir=tmp_path / "again", resume_from_checkpoint=checkpoint)]
    assert train_ist.main([*flags, "--profile", "true"]) == 0
    reset_accelerate()
    assert (tmp_path / "again/profile/trace.json").exists()
    assert_same_adapter(tmp_path / "run", tmp_path / "again")
