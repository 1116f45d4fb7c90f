"""The runs of an experiment: train_ist.py and ist.evaluate as processes; tuning over a grid, then all seeds."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from ist.benchmark.arms import arguments_of, as_argv
from ist.config import ISTConfig
from ist.training.command_line import UsageError
from ist.training.continuing import adapter_digest
from ist.training.files import IMPORTANCE, model_digest, read_lines, read_object, write_json
from ist.training.record import differing_keys, read_run
from launch.experiments.design import Arm, Experiment, file_stem, slug

ROOT = Path(__file__).parents[2]


@dataclass
class Where:
    """Where runs are made: the model, the folder, how many at a time, and the topology of each."""

    model_name_or_path: str
    output_dir: Path
    jobs: int = 0
    accelerate_config: str | None = None


class Runner:
    """Runs train_ist.py and ist.evaluate as processes, some at a time; what is finished is not run again."""

    def __init__(self, where: Where, experiment: Experiment, files: dict[str, Path]) -> None:
        self.where, self.experiment, self.files = where, experiment, files
        self.folder = where.output_dir / "runs"
        cores = len(os.sched_getaffinity(0))
        self.jobs = where.jobs or (1 if where.accelerate_config else torch.cuda.device_count() or min(8, cores))
        self.base = {"model_name_or_path": where.model_name_or_path, "train_file": files["train"], **experiment.recipe}
        all_devices = ",".join(map(str, range(torch.cuda.device_count())))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_devices).split(",")
        self.model_digest = cache(model_digest)  # of one command: the base is that of all runs
        self.error: BaseException | None = None  # of the first run that failed
        self.processes: set[subprocess.Popen] = set()  # that are running
        self.devices: Queue[str] = Queue()
        for i in range(self.jobs):
            self.devices.put(visible[i % len(visible)])

    def flags(self, arm: Arm, values: dict[str, Any], seed: int) -> dict[str, Any]:
        """The keys of one run; the reported loss is that of rows which no tuning has seen."""
        part = "tuning" if seed == self.experiment.tuning_seed else "test"
        by_row = self.experiment.measure == "rows" and part == "test"
        named = values | ({"fixed_layers": ",".join(map(str, arm.settings["fixed_layers"]))} if arm.top_of else {})
        where = self.folder / arm.name.replace(" ", "_") / f"{slug(named)}-seed={seed}"
        own = {"seed": seed, "validation_file": self.files[part], "output_dir": where}
        if part == "tuning" or by_row:
            own["eval_steps"] = None  # of a trial only the end counts
        if by_row:
            own["validation_file"] = None
        flags = {**self.base, **arm.settings, **values, **own, "logging_steps": 1, "report_to": "none"}
        return {key: value for key, value in flags.items() if value is not None}

    def run(self, flags: dict[str, Any], label: str) -> dict:
        """Do a run, if it is not done, as soon as a device is free; its run.json.

        Raises:
            UsageError: it was stopped, or failed; its log says why. Then no other run of this Runner is begun.
        """
        try:
            run = self._run(flags)
        except BaseException as error:
            self.error = self.error or error
            raise
        name = Path(flags["output_dir"]).relative_to(self.folder)
        loss = run.get("final_validation_loss")
        ended = f"after {run['steps']} steps" if run["status"] == "finished" else run["error"]
        print(f"{label}  {name}  " + (ended if loss is None else f"validation loss {loss:.4f}"), flush=True)
        return run

    def stop(self, *_: Any) -> None:
        """Have the runs save and end, and begin no other."""
        self.error = self.error or UsageError("stopped; the same command goes on from here.")
        for process in list(self.processes):
            process.terminate()

    def _run(self, flags: dict[str, Any]) -> dict:
        where = Path(flags["output_dir"])

        def diverged() -> bool:
            """A trial whose loss is not finite is one that is worse than all others."""
            run = read_run(where)
            return flags["seed"] == self.experiment.tuning_seed and bool(run and run.get("diverged"))

        if not diverged() and ((run := read_run(where)) is None or run["status"] != "finished"):
            values = flags | {"resume_from_checkpoint": "auto", "save_total_limit": 1}
            values |= {} if "save_steps" in flags else {"save_steps": 20}
            launch = ["-m", "accelerate.commands.launch", "--config_file", self.where.accelerate_config]
            argv = [*(launch if self.where.accelerate_config else []), "train_ist.py", *as_argv(values)]
            self._process(argv, where, may_fail=diverged)
        run = read_run(where)
        # Without keys that the model decides.
        asked = {k: v for k, v in vars(arguments_of(flags)).items() if v not in (None, "auto")}
        differing = differing_keys(run["configuration"], asked)
        # A run may go on with other values of these; results in one table may not.
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps"):
            if key in asked and run["configuration"][key] != asked[key]:
                differing += f"{', ' if differing else ''}{key} ({run['configuration'][key]} there, {asked[key]} here)"
        if differing:
            raise UsageError(f"{where} holds a run of another configuration: {differing}. Choose another --output_dir.")
        if self.evaluates and flags["seed"] != self.experiment.tuning_seed:
            self.evaluate(where)
        return run

    @property
    def evaluates(self) -> bool:
        return self.experiment.evaluate is not None or self.experiment.measure == "rows"

    def evaluate(self, run: Path | None) -> None:
        """Answers of a run's result on the test rows, or of the base model; or the loss of each."""
        where = run / "evaluation" if run else self.folder / "base"
        tests = [file for name, file in self.files.items() if name.startswith("test/")] or [self.files["test"]]
        keys = self.experiment.evaluate or {}
        values = {"model_name_or_path": self.where.model_name_or_path, "test_file": tests if keys else None}
        if self.experiment.measure == "rows":
            values |= {"loss_file": self.files["test"], "max_length": self.base.get("max_length", 256)}
        values |= {"prompt_template": self.base.get("prompt_template", "alpaca"), "output_dir": where}
        values |= {"dtype": self.base.get("dtype", "auto"), **keys}
        if run and (run / "adapter").exists():
            values["adapter"] = run / "adapter"
        elif run:
            values["model_name_or_path"] = run / "model"
        if (where / "summary.json").exists():
            there = read_object(where / "summary.json").get("arguments")
            there = there if isinstance(there, dict) else {}
            if any(there.get(key) != value for key, value in keys.items()):
                raise UsageError(f"{where} holds answers of another `evaluate`: remove it.")
            now = {"model_digest": self.model_digest(str(values["model_name_or_path"]))}
            now["adapter_digest"] = adapter_digest(values.get("adapter"))
            if differing := [key for key, value in now.items() if there.get(key) != value]:
                raise UsageError(f"{where} holds answers of another {', '.join(differing)}: remove it.")
            return
        values = {key: value for key, value in values.items() if value is not None}
        self._process(["-m", "ist.evaluate", *as_argv(values)], where)

    def _process(self, argv: list[str], where: Path, may_fail: Callable[[], bool] = lambda: False) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        device = self.devices.get()
        try:
            if self.error:
                raise self.error
            if device and not self.where.accelerate_config:
                environment["CUDA_VISIBLE_DEVICES"] = device
            where.parent.mkdir(parents=True, exist_ok=True)
            log = where.parent / f"{where.name}.log"
            with open(log, "a") as file:
                process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=environment, stdout=file, stderr=file)
                self.processes.add(process)
                code = process.wait()
            self.processes.discard(process)
            if code and self.error:
                raise self.error
            if code and not may_fail():
                last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
                self.error = UsageError(f"a run ended with exit code {code}; {log} ends: {last}")
                raise self.error
        finally:
            self.devices.put(device)


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def lowest(tried: dict[float, float]) -> float:
    """The value with the lowest loss, the first of equals; if all diverge the smallest."""
    return min(tried, key=lambda value: (tried[value], value if tried[value] == math.inf else 0))


def tune_arm(runner: Runner, arm: Arm) -> tuple[dict[str, float], list[dict]]:
    """(its tuned values, every trial): a grid key by key, the others at the best so far or the middle of their list.

    Where there is one value of each there is nothing to try."""
    best, trials = {key: middle(values) for key, values in arm.tune.items()}, []
    named = any(other.top_of == arm.name for other in runner.experiment.arms.values())
    if runner.experiment.measure == "rows" and not named and all(len(values) == 1 for values in arm.tune.values()):
        return best, trials
    for key, values in arm.tune.items():
        tried: dict[float, float] = {}
        for value in values:
            run = runner.run(runner.flags(arm, best | {key: value}, runner.experiment.tuning_seed), "tuning")
            tried[value] = math.inf if run.get("diverged") else run["final_validation_loss"]
            loss = None if run.get("diverged") else tried[value]
            trial = {"arm": arm.name, "key": key, "values": best | {key: value}, "loss": loss, "commit": run["commit"]}
            trials.append(trial)
        best[key] = lowest(tried)
        if tried[best[key]] == math.inf:
            raise UsageError(f"{arm.name} diverges at every {key} of the grid: {', '.join(map(str, tried))}.")
    return best, trials


def top_layers(runner: Runner, arm: Arm, tuned: dict[str, float], count: str | int) -> list[int]:
    """The layers of highest importance at the end of the tuning run of an arm of IST."""
    flags = runner.flags(arm, tuned, runner.experiment.tuning_seed)
    scores = read_lines(Path(flags["output_dir"]) / IMPORTANCE)[-1]["scores"]
    trained = ISTConfig(trained_layers=str(count)).counts(len(scores)).trained
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:trained])


def train_all(
    runner: Runner, arms: dict[str, Arm], seeds: Sequence[int]
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Tune every arm and train it on all seeds; ({arm: its tuned values}, every trial of tuning). An experiment that
    measures rows is only tuned here.

    Every arm goes on by itself, as soon as it has the values of the arm that it depends on, and a device is free.
    """
    tuned: dict[str, Future] = {name: Future() for name in arms}
    with ThreadPoolExecutor(len(arms) * (1 + len(seeds))) as pool:

        def tune_and_train(arm: Arm) -> list[Future]:
            try:
                if arm.top_of:
                    values, _ = tuned[arm.top_of].result()
                    wanted = arm.settings.get("trained_layers", 0.25)
                    arm.settings["fixed_layers"] = top_layers(runner, arms[arm.top_of], values, wanted)
                if arm.tuned_as:  # an arm's own settings win over the values that it takes over
                    taken, trials = tuned[arm.tuned_as].result()[0], []
                    values = {key: value for key, value in taken.items() if key not in arm.settings}
                else:
                    values, trials = tune_arm(runner, arm)
                tuned[arm.name].set_result((values, trials))
            except BaseException as error:
                tuned[arm.name].set_exception(error)
                raise
            if runner.experiment.measure == "rows":  # by train_by_seed
                return []
            return [pool.submit(runner.run, runner.flags(arm, values, seed), f"seed {seed}") for seed in seeds]

        started = [pool.submit(tune_and_train, arm) for arm in arms.values()]
        for run in (run for arm in started for run in arm.result()):
            run.result()
    found = {name: future.result() for name, future in tuned.items()}
    trials = [one for _, trials in found.values() for one in trials]
    return {name: values for name, (values, _) in found.items()}, trials


def train_by_seed(
    runner: Runner, tuned: dict[str, dict[str, float]], finish: Callable[[Arm, dict[str, Any]], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """{arm: what `finish` makes of each run, by seed}: the first seed of all arms, then the next, so that what a stop
    leaves can be compared; before these the arms whose effects are the scores of others.

    Args:
        finish: does a run, if it is not known, by its arm and keys.
    """
    experiment, arms = runner.experiment, runner.experiment.arms
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    given = {arm.scores_of["arm"] for arm in arms.values() if arm.scores_of}
    for group in (given, arms.keys() - given):
        for arm in (arms[name] for name in arms if name in group and arms[name].scores_of):
            (first, *_) = found[arm.scores_of["arm"]]
            arm.settings["oracle_scores"] = write_scores(runner, arm, first["effects"])
        several = {name: experiment.seeds_of(arms[name]) for name in arms if name in group}
        order = [(i, name) for i in range(max(map(len, several.values()), default=0)) for name in several]
        with ThreadPoolExecutor(runner.jobs) as pool:
            futures = [
                (name, pool.submit(finish, arms[name], runner.flags(arms[name], tuned[name], several[name][i])))
                for i, name in order
                if i < len(several[name])
            ]
            for name, future in futures:
                found[name].append(future.result())
    return found


def write_scores(runner: Runner, arm: Arm, effects: Sequence[float]) -> str:
    """The file of an arm's oracle_scores: normal quantiles of the effects' ranks, times the arm's factor.

    Ranks, so that an order and its opposite concentrate draws alike, however skewed the effects are.
    """
    from scipy import stats

    scores = arm.scores_of["factor"] * stats.norm.ppf((stats.rankdata(effects) - 0.5) / len(effects))
    file = runner.where.output_dir / "scores" / f"{file_stem(arm.name)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [round(score, 4) for score in scores.tolist()])
    return str(file)
