"""Signals at random moments of steps, probes, evaluation and saves; each run, resumed, must reach the undisturbed end.

    python tests/support/preemption.py --times 20 [--seed 1] [--topologies one ddp fsdp2]

Runs are train_ist.py's own main, many in one launch per topology. A signal (to one rank of two, or to all) is raised
inside a call that belongs to the phase, half of the time a second one in the save that the first one leads to.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

import ist.loss
import ist.probe
import ist.training.checkpoint
import ist.tuner
import train_ist
from ist.training import objective
from ist.training.word_problems import arithmetic_rows
from support import make_tiny, read_lines, reset_accelerate

STEPS = 24
PHASES = ("step", "probe", "evaluation", "save")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
RANK = int(os.environ.get("RANK", "0"))
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
CLOCKS = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "probe_seconds")


class Interruptions:
    """Counts the calls of each phase, and raises the planned signals in them."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.begin(None, [])

    def begin(self, call: tuple[str, int] | None, signals: list[signal.Signals]) -> None:
        """From now on: `signals[0]` at the call (phase, number), the others in the next save."""
        self.calls = dict.fromkeys(PHASES, 0)
        self.call, self.signals, self.raised = call, list(signals), []

    def happen(self, phase: str) -> None:
        self.calls[phase] += 1
        first = not self.raised and (phase, self.calls[phase]) == self.call
        if self.signals and (first or (self.raised and phase == "save")):
            self.raised.append(phase)
            os.kill(os.getpid(), self.signals.pop(0))

    def within(self, phase: str, original):
        """`original`, whose inner calls are of this phase."""

        def call(*args, **kwargs):
            self.inside.append(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self.inside.pop()

        return call

    def at(self, original, phase: str | None = None):
        """`original`, a moment of this phase, or of the one that the process is in."""

        def call(*args, **kwargs):
            self.happen(phase or (self.inside[-1] if self.inside else "step"))
            return original(*args, **kwargs)

        return call

    def install(self) -> None:
        evaluation_mode = objective.evaluation_mode

        @contextlib.contextmanager
        def evaluation(model):
            self.inside.append("evaluation")
            try:
                with evaluation_mode(model):
                    yield
            finally:
                self.inside.pop()

        objective.evaluation_mode = evaluation
        tuner = ist.tuner.SparseTuner
        tuner.update_importance = self.within("probe", tuner.update_importance)
        objective.token_loss_sum = self.at(objective.token_loss_sum)
        ist.loss.token_loss_sum = self.at(ist.loss.token_loss_sum)
        ist.probe.row_loss_sums = self.at(ist.probe.row_loss_sums)
        for name in ("gathered", "_split_optimizer", "save_file", "write_json", "publishing"):
            setattr(ist.training.checkpoint, name, self.at(getattr(ist.training.checkpoint, name), "save"))


def train(work: Path, run: Path) -> int:
    values = {
        **{"model_name_or_path": work / "tiny", "train_file": work / "train.json", "output_dir": run},
        **{"report_to": "none", "max_steps": STEPS, "update_interval": 4, "score_lr": 1000, "lora_dropout": 0.1},
        **{"learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 1, "save_steps": 5, "eval_steps": 5},
        **{"validation_size": 8, "weight_decay": 0.01, "per_device_train_batch_size": 4 // RANKS},
        **{"save_total_limit": 2, "load_best_model_at_end": True, "resume_from_checkpoint": "auto"},
    }
    reset_accelerate()
    with contextlib.redirect_stdout(io.StringIO()):
        return train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))])


def worker(topology: str, work: Path, times: int, seed: int) -> None:
    """`times` interrupted runs on this rank; each one's plan, and what came of it, goes to {topology}-{number}.json."""
    PartialState.destroy_process_group = lambda *_: None  # main ends with it; the next run goes on with the group
    if topology == "fsdp2":
        from ist.benchmark.fsdp_on_cpu import turn_on_fsdp

        turn_on_fsdp()
    interruptions = Interruptions()
    interruptions.install()
    assert train(work, work / topology / "undisturbed") == 0
    calls = broadcast_object_list([interruptions.calls])[0]  # rank 0's: only it has the calls that write
    for i in range(times):
        draw = random.Random(f"{topology} {seed} {i}")  # the same on every rank
        phase = PHASES[i % len(PHASES)]
        number = draw.randint(1, int(0.6 * calls[phase]))  # the last ones leave no step to stop before
        signals = draw.choices(SIGNALS, k=draw.choice((1, 2)))
        ranks = draw.choice(([0], list(range(RANKS)), [RANKS - 1] if phase != "save" else [0]))
        interruptions.begin((phase, number), signals if RANK in ranks else [])
        run = work / topology / f"{i:02d}"
        code = train(work, run)
        record = json.loads((run / "run.json").read_text())
        raised = interruptions.raised
        interruptions.begin(None, [])
        resumed = train(work, run)
        if ranks[0] == RANK:
            seen = {"phase": phase, "signals": [each.name for each in signals], "ranks": ranks, "raised": raised}
            seen |= {"codes": [code, resumed], "status": record["status"], "steps": record["steps"]}
            (work / f"{topology}-{i:02d}.json").write_text(json.dumps(seen))


def launch(topology: str, work: Path, times: int, seed: int = 1) -> list[dict]:
    """What came of each interrupted run, its distance from the undisturbed one included; `work` gets all runs."""
    rows = arithmetic_rows(60, seed=1, held_out=False)
    if not (work / "train.json").exists():
        make_tiny(work / "tiny", rows)
        (work / "train.json").write_text(json.dumps(rows))
    command = [sys.executable, __file__]
    if topology != "one":
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(ROOT / f"accelerate_configs/{topology}.yaml"), __file__]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_DATASETS_CACHE": str(work / "datasets")}
    command += ["--worker", topology, "--work", str(work), "--times", str(times), "--seed", str(seed)]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, timeout=1800, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = []
    for i in range(times):
        seen = json.loads((work / f"{topology}-{i:02d}.json").read_text())
        results.append(
            {
                "topology": topology,
                **seen,
                **distance(*(work / topology / name for name in (f"{i:02d}", "undisturbed"))),
            }
        )
    return results


def distance(run: Path, whole: Path) -> dict[str, float]:
    """The largest differences in adapter weights, scores and losses of two runs; infinite where draws differ."""
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in (run, whole))
    assert one.keys() == two.keys()
    distances = {"adapter": max((one[name] - two[name]).abs().max().item() for name in one)}
    for name, key, ignored in (
        ("metrics.jsonl", "loss", {"loss", "validation_loss", "grad_norm", *CLOCKS}),
        ("importance.jsonl", "scores", {"scores", "probabilities", "losses", "rewards", *CLOCKS}),
    ):
        lines, expected = read_lines(run / name), read_lines(whole / name)
        rest = [[{k: v for k, v in line.items() if k not in ignored} for line in part] for part in (lines, expected)]
        distances[key] = 0.0 if rest[0] == rest[1] and lines else float("inf")
        for here, there in zip(lines, expected):
            for k in {"loss", "validation_loss", "scores"} & here.keys() & there.keys():
                pairs = zip(here[k], there[k]) if k == "scores" else [(here[k], there[k])]
                distances[key] = max(distances[key], *(abs(a - b) for a, b in pairs))
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--topologies", nargs="+", default=["one", "ddp"], choices=["one", "ddp", "fsdp2"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.work, args.times, args.seed)
        return
    with tempfile.TemporaryDirectory() as work:
        for topology in args.topologies:
            for result in launch(topology, Path(work), args.times, args.seed):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
