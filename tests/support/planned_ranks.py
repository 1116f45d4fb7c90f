"""What `--plan` predicts for two ranks and what the allocator gave them: `planned_ranks.launch(topology, work)`."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
from accelerate import PartialState

from ist.training import plan
from support import reset_accelerate
from support.memory import peak_of_a_run

ARMS = {
    "all": {"selection": "all"},
    "last, bf16": {"selection": "last", "trained_layers": 2, "bf16": True},
    "checkpointing": {"selection": "all", "gradient_checkpointing": True},
}


def worker(topology: str, work: Path) -> None:
    """On each rank all arms, planned and run; rank 0 writes {arm: [predicted, allocated]} bytes.

    Under FSDP2 the least of three runs: how much it holds at once, gathered and reduced, is a matter of timing.
    """
    import train_ist

    seen = {}
    PartialState.destroy_process_group = lambda *_: None  # main ends with it; the next arm goes on with the group
    if topology == "fsdp2":
        from ist.benchmark.fsdp_on_cpu import turn_on_fsdp

        turn_on_fsdp()
    predictions, predict = [], plan.predict
    plan.predict = lambda *args, **options: predictions.append(predict(*args, **options)) or predictions[-1]
    for name, arm in ARMS.items():

        def train(**options) -> int:
            reset_accelerate()
            values = {
                **{"model_name_or_path": work / "model", "train_file": work / "rows.json", "report_to": "none"},
                **{"output_dir": work / topology, "prompt_template": "none"},
                **{"max_length": 100, "max_steps": 8, "warmup_steps": 1, "lora_r": 4, **options},
            }
            return train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))])

        assert train(plan=True, **arm) == 0
        peaks = []
        for turn in range(3 if topology == "fsdp2" else 1):
            with pytest.MonkeyPatch.context() as monkeypatch:
                peaks.append(peak_of_a_run(train, monkeypatch, 4, **arm, output_dir=work / f"{name}-{turn}"))
        if os.environ["RANK"] == "0":
            seen[name] = [predictions[-1].step.peak, min(peaks)]
            (work / f"{topology}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
