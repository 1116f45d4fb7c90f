"""Selection rules on one topology, all in one launch: `rules.launch(topology, work)`, by train_ist.py's own main."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from accelerate import PartialState

from support import reset_accelerate, warm_python
from support.methods import Watch, rest

STEPS, HALF = 20, 10
# A validation before each save: under FSDP it leaves gathered parameters in the place of sharded ones.
FULL = {"peft_method": "none", "validation_size": 6, "eval_steps": HALF}
ARMS = {
    "random": {"selection": "random"},
    "lisa": {"selection": "lisa", "lisa_interval": 4, "trained_layers": 2},
    "fixed": {"selection": "fixed", "fixed_layers": "0,2"},
    "first": {"selection": "first"},
    "last": {"selection": "last", "trained_layers": 2},
    "semantic": {"selection": "semantic"},
    "semantic+ist": {"selection": "semantic+ist", "semantic_budget": 0.75, "min_trained_layers": 2},
    "ist, cheap probe": {"selection": "ist", "probe": "cheap"},
    "ist, gradient probe": {"selection": "ist", "probe": "gradient", "probe_batch_size": 3},
    "ist, expected": {"score_rule": "expected", "score_lr": 5, "draw_interval": 3, "draw": "stratified"},
    "placebo": {"selection": "placebo", "anneal_to_fixed": 0.75},
    "gradient_norm": {"selection": "gradient_norm"},
    "all, full": {"selection": "all", **FULL},
    "lisa, full": {"selection": "lisa", "lisa_interval": 4, **FULL},
    "random, full": {"selection": "random", **FULL},
    "semantic, full": {"selection": "semantic", **FULL},
    "id3": {"selection": "id3", "id3_budget": 0.3},
    # At the second step B of LoRA is still zero, so that all of A scores 0; and shards of 3 and 2 rows.
    "id3, ties": {"selection": "id3", "id3_budget": 0.7, "id3_steps": 2, "lora_r": 5},
    "id3, full": {"selection": "id3", "id3_budget": 0.3, **FULL},
}
# Those without a state, and alike without adapters, are left out.
RESUMED_ON_ONE = [name for name in ARMS if name not in ("fixed", "first", "last", "all, full", "random, full")]
RESUMED_ON_TWO_RANKS = ["lisa", "semantic+ist", "ist, expected", "gradient_norm", "lisa, full", "id3"]


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def train(work: Path, name: str, run: Path, rows: int, **overrides) -> Watch:
    import train_ist

    values = {
        **{"model_name_or_path": work / "tiny", "train_file": work / "train.json", "output_dir": run},
        **{"report_to": "none", "max_steps": STEPS, "update_interval": 4, "trained_layers": 1, "score_lr": 1000},
        **{"learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 1, "lora_dropout": 0, "save_steps": HALF},
        **{"per_device_train_batch_size": rows, "weight_decay": 0.01, **ARMS[name], **overrides},
    }
    reset_accelerate()
    with Watch().inside() as watch, contextlib.redirect_stdout(io.StringIO()):
        code = train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))])
    assert code == 0, f"exit code {code}"
    return watch


def worker(topology: str, work: Path) -> None:
    """All rules on this rank; what was seen inside goes to {topology}.json."""
    seen = {}
    PartialState.destroy_process_group = lambda *_: None  # main ends with it; the next rule goes on with the group
    if topology == "fsdp2":
        from ist.benchmark.fsdp_on_cpu import turn_on_fsdp

        turn_on_fsdp()
    for name in ARMS:
        run, rows = work / topology / slug(name), 4 if topology == "one" else 2
        watch = train(work, name, run, rows)
        seen[name] = {"rest": rest(watch), "world_size": watch.world_size, "all_dtensors": watch.all_dtensors}
        if name in (RESUMED_ON_ONE if topology == "one" else RESUMED_ON_TWO_RANKS):
            train(work, name, Path(f"{run}-resumed"), rows, resume_from_checkpoint=run / f"checkpoints/step_{HALF:06d}")
        if os.environ.get("RANK", "0") == "0":
            (work / f"{topology}.json").write_text(json.dumps(seen))


def launch(topology: str, work: Path) -> dict[str, dict]:
    """What was seen of each rule on the configuration that ships, on CPU; the runs are in work/topology."""
    command = [warm_python(), __file__]
    if topology != "one":
        command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(ROOT / f"accelerate_configs/{topology}.yaml"), __file__]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHON_EXEC"] = warm_python()  # torchrun's, for the ranks
    command += [topology, str(work)]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work / f"{topology}.json").read_text())


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
