"""Answers to "what to train" beside each other: each arm is tuned on a seed of its own, then trained on several seeds.

    python -m ist.experiment --experiment launch/experiments/arithmetic.yaml --train_file rows.json \\
        --model_name_or_path models/SmolLM2-135M-Instruct --output_dir runs/arithmetic

Every run is a `train_ist.py` of its own, goes on where it was stopped, and is not done twice. Leaves in the folder
experiment.json (every run's numbers), curves.png and importance.png, results.md and tuning.md.
"""

import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from queue import Queue
from typing import Any

from ist.training.command_line import quiet_known_warnings

quiet_known_warnings()

import torch
import yaml
from accelerate import Accelerator
from scipy import stats

from ist.benchmark.speed import WINDOW, arguments_of, as_argv, ratio_of, take_turns
from ist.config import ISTConfig
from ist.evaluate.command import task_name
from ist.report.figures import plot_arms
from ist.report.tables import joined, listed, publish, require_publishing
from ist.training.command_line import UsageError, brief, command, markdown_table, parse_arguments, require, run_command
from ist.training.data import load_rows
from ist.training.figures import plot_importance_panels
from ist.training.files import IMPORTANCE, METRICS, keep_lines, read_lines
from ist.training.memory import SavedByLayer, counting
from ist.training.model import plan_layers
from ist.training.peft_config import make_peft_config
from ist.training.record import differing_keys, read_run, require_writable

ROOT = Path(__file__).parent.parent
BESIDE = 3  # arms that are timed beside the first one at once: all are in memory
PIECE = 1200  # characters of a row made of plain text: more than max_length, so that none ends in the middle of a text


def _for_runs(path: str) -> str:
    """A path that means the same to runs, whose working directory is that of train_ist.py."""
    return path if Path.cwd() == ROOT else str(Path(path).absolute())


@dataclass
class ExperimentArguments:
    experiment: str = field(metadata={"help": "The file that says what is compared: launch/experiments/*.yaml."})
    model_name_or_path: str = field(metadata={"help": "The model of all arms."})
    train_file: list[str] = field(metadata={"help": "Rows as train_ist.py takes them; or plain text (.txt)."})
    output_dir: str = field(metadata={"help": "Where runs, results and pictures go."})
    test_file: list[str] | None = field(
        default=None,
        metadata={"help": "Rows or text that only the reported losses see; default: a part of train_file."},
    )
    arms: list[str] | None = field(default=None, metadata={"help": "Only these arms; default: all of the file."})
    jobs: int = field(default=0, metadata={"help": "Runs at a time; default: one per GPU, or per CPU core, up to 8."})
    known: str | None = field(
        default=None,
        metadata={"help": "Results of this experiment (experiment.json): their arms are not run or timed again."},
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Each run under accelerate launch with this file, one run at a time."}
    )
    publish: str | None = field(default=None, metadata={"help": "Also write the results to this JSON file."})
    readme: str | None = field(
        default=None, metadata={"help": "And the tables into this file, between <!-- NAME --> and <!-- /NAME -->."}
    )

    def __post_init__(self) -> None:
        require(self.jobs >= 0, "jobs", "0 (as many as there are devices) or more", self.jobs)
        require_publishing(self.publish, self.readme)
        if self.accelerate_config and not Path(self.accelerate_config).is_file():
            raise UsageError(f"--accelerate_config {self.accelerate_config}: no such file.")
        if Path(self.model_name_or_path).exists():  # runs have another working directory
            self.model_name_or_path = _for_runs(self.model_name_or_path)
        self.accelerate_config = self.accelerate_config and _for_runs(self.accelerate_config)
        self.output_dir = _for_runs(self.output_dir)


@dataclass
class Arm:
    """One answer: the keys of train_ist.py that make it; what of them is tuned, or which arm's values it takes over.

    Attributes:
        tune: {key: numbers}, of which `tune` tries some; the first key by itself, the next at the best of the first.
        tuned_as: the arm whose tuned values it takes, but for those that it sets itself.
        top_of: the arm whose tuning run names the layers of highest importance, which this one trains.
    """

    name: str
    settings: dict[str, Any]
    tune: dict[str, list]
    tuned_as: str | None = None
    top_of: str | None = None


@dataclass
class Experiment:
    """A file of launch/experiments/: recipe, arms, seeds, tuning, what is compared in pairs, how answers are had."""

    recipe: dict[str, Any]
    arms: dict[str, Arm]
    seeds: list[int]
    tuning_seed: int
    pairs: list[list[str]]
    split: dict[str, int]
    evaluate: dict[str, Any] | None
    answer_texts: bool  # answers in words instead of their labels

    @classmethod
    def read(cls, path: str, only: Sequence[str] | None) -> "Experiment":
        """
        Raises:
            UsageError: not such a file, or an arm refers to one that is not there.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
            tuning = values["tuning"]
            arms = {}
            for name, settings in values["arms"].items():
                extra = {key: settings.pop(key, None) for key in ("tune", "tuned_as", "top_of")}
                grid = {} if extra["tuned_as"] else dict(tuning["grid"])
                arms[name] = Arm(name, settings, grid | (extra["tune"] or {}), extra["tuned_as"], extra["top_of"])
            experiment = cls(
                values["recipe"],
                arms,
                values["seeds"],
                tuning["seed"],
                values.get("pairs", []),
                values["split"],
                values.get("evaluate"),
                values.get("answer_texts", False),
            )
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}.") from error
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not like the files of launch/experiments/: {brief(error)}.") from error
        _check(path, values, arms, experiment)
        wanted = list(only or arms)
        for name in wanted:  # grows as arms name others
            if name not in arms:
                raise UsageError(f"{path} has no arm {name!r}; it has {', '.join(arms)}.")
            wanted += [other for other in (arms[name].tuned_as, arms[name].top_of) if other and other not in wanted]
        experiment.arms = {name: arm for name, arm in arms.items() if name in wanted}
        experiment.pairs = [pair for pair in experiment.pairs if set(pair) <= set(wanted)]
        return experiment


def _check(path: str, values: dict, arms: dict[str, Arm], experiment: Experiment) -> None:
    """Raises UsageError for what would else show after hours."""
    for one, two in experiment.pairs:
        if missing := {one, two} - arms.keys():
            raise UsageError(f"{path}: pairs has no arm {missing.pop()!r}; it has {', '.join(arms)}.")
    for arm in arms.values():
        for key in ("tuned_as", "top_of"):
            other = arms.get(getattr(arm, key))
            if other and (other.tuned_as or (key == "top_of" and other.top_of)):
                raise UsageError(
                    f"{path}: {arm.name} cannot be {key} {other.name}, which takes from another arm itself."
                )
            if other and key == "top_of" and "ist" not in other.settings.get("selection", "ist"):
                raise UsageError(f"{path}: {arm.name} cannot be top_of {other.name}, which learns no importance.")
        lists = {key: many if isinstance(many, list) else [many] for key, many in arm.tune.items()}
        for key, value in [*arm.settings.items(), *((name, value) for name in lists for value in lists[name])]:
            if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
                raise UsageError(f"{path}: {key} {value} is text in YAML: write {value.replace('e', '.0e')}.")
        for key, many in arm.tune.items():
            if key in arm.settings:
                raise UsageError(f"{path}: {arm.name} sets {key} and tunes it; set it in an arm with tuned_as.")
            if not isinstance(many, list) or not many or not all(type(value) in (int, float) for value in many):
                raise UsageError(f"{path}: {arm.name} can tune {key} over a list of numbers only; got {many}.")
    whole = isinstance(experiment.seeds, list) and all(isinstance(seed, int) for seed in experiment.seeds)
    if not whole or not experiment.seeds or experiment.tuning_seed in experiment.seeds:
        raise UsageError(f"{path}: seeds must be a list of numbers without that of tuning; got {experiment.seeds}.")
    if set(experiment.split) != {"test", "tuning"}:
        raise UsageError(f"{path}: split must name test and tuning rows; got {experiment.split}.")


def read_known(path: str | None) -> dict[str, Any]:
    """Results of --known, {} without it.

    Raises:
        UsageError: not such a file.
    """
    try:
        known = json.loads(Path(path).read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"--known {path} cannot be read: {brief(error)}.") from error
    if path and not (
        isinstance(known, dict) and {"name", "recipe", "arms", "trials", "base", "command"} <= known.keys()
    ):
        raise UsageError(f"--known {path} is not an experiment.json of ist.experiment.")
    return known


def require_same(path: str | None, known: dict[str, Any], experiment: Experiment, facts: dict[str, Any]) -> None:
    """Raises UsageError unless the arms of `known` can stand beside those that are run here.

    Args:
        facts: what must be alike for all arms.
    """
    if not known:
        return
    if differing := [key for key, value in facts.items() if known.get(key) != value]:
        raise UsageError(f"--known {path} is of another experiment; they differ in {', '.join(differing)}.")
    if missing := known["arms"].keys() - experiment.arms.keys():
        raise UsageError(f"--known {path} has an arm {missing.pop()!r} that is not in the experiment's file.")
    for name, there in known["arms"].items():
        arm, settings = experiment.arms[name], dict(there["settings"])
        if arm.top_of:  # whose layers were found there
            settings.pop("fixed_layers", None)
        seeds = [run["seed"] for run in there["runs"]]
        same = [there["tuned_as"], there["top_of"], seeds] == [arm.tuned_as, arm.top_of, experiment.seeds]
        if not same or settings != arm.settings or not (arm.tuned_as or there["tuned"].keys() == arm.tune.keys()):
            raise UsageError(f"--known {path}: its {name} has other keys or seeds; run it anew without --known.")
        for key, values in arm.tune.items():
            found = [one for one in known["trials"] if (one["arm"], one["key"]) == (name, key)]
            tried = {one["values"][key]: math.inf if one["loss"] is None else one["loss"] for one in found}
            if not tried or not tried.keys() <= set(values) or next_value(values, tried) is not None:
                raise UsageError(f"--known {path}: its {name} is tuned over other values of {key}.")
    first = next(iter(experiment.arms))
    if next(iter(known["arms"])) != first:
        raise UsageError(f"--known {path} has no {first}, beside which seconds are measured.")


def slug(values: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in values.items()) or "defaults"


# ---------------------------------------------------------------------------------------------------------------- data


LISTED = re.compile(r"\s*\b(?:Answer|Solution|Ending|Option)\d: *")  # LLM-Adapters' choices in an instruction


def in_words(row: dict, where: str) -> dict:
    """A commonsense row of LLM-Adapters with its answer in words: {instruction, output, choices, answer}.

    A small model that is trained on "the correct answer is answer2" learns that format in the first hundreds of steps
    and nothing else. Here it is asked for the text of the answer, out of the texts of all.

    Raises:
        UsageError: not such a row.
    """
    asked, _, form = row["instruction"].rpartition("Answer format:")
    labels = form.strip().split("/")
    question, *texts = LISTED.split(asked.strip())
    outputs = [f" {text}" for text in texts or labels]  # true/false are words already
    if len(outputs) != len(labels) or row.get("answer") not in labels:
        raise UsageError(f"--{where}: answer_texts needs rows that list their answers; got {row['instruction']!r}.")
    answer = outputs[labels.index(row["answer"])]
    prompt = f"Question: {question.partition('question: ')[2] or question}\nAnswer:"
    return {"instruction": prompt, "input": "", "output": answer, "choices": outputs, "answer": answer}


def rows_of(key: str, files: Sequence[str], answer_texts: bool = False) -> list[dict]:
    """Rows of JSON or Parquet files; or plain text cut at white space into rows of an output.

    Raises:
        UsageError: as load_rows and in_words.
    """
    if not any(file.endswith(".txt") for file in files):
        rows = load_rows(key, files)
        if "instruction" not in rows.column_names:
            raise UsageError(f"--{key} needs the columns instruction and output; got {', '.join(rows.column_names)}.")
        return [in_words(row, f"{key} row {i}") if answer_texts else row for i, row in enumerate(rows)]
    if answer_texts or not all(file.endswith(".txt") for file in files):
        rows_wanted = "needs rows, for answer_texts" if answer_texts else "must not mix plain text with rows"
        raise UsageError(f"--{key} {rows_wanted}; got {', '.join(files)}.")
    rows = []
    for file in files:
        try:
            words = Path(file).read_text(encoding="utf-8").split(" ")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--{key} {file} cannot be read: {brief(error)}.") from error
        piece = ""
        for word in words:
            piece += word + " "
            if len(piece) >= PIECE:
                rows.append({"instruction": "", "output": piece})
                piece = ""
    return rows


def _question(row: dict) -> str:
    """What a row asks, whatever its spaces, points and capitals; of plain text, all of it."""
    asked = f"{row['instruction']} {row.get('input') or ''}" if row["instruction"] else row["output"]
    return re.sub(r"\W+", " ", asked.casefold()).strip()


def write_parts(
    args: ExperimentArguments, split: dict[str, int], folder: Path, answer_texts: bool = False
) -> dict[str, Path]:
    """Cut the rows into train, tuning and test; {name: file}. Of several test files each gives the same number of rows,
    and each is a part "test/<task>" too. No question stands in two parts, or twice in one.

    Raises:
        UsageError: there are not enough.
    """

    def shuffled(key: str, files: Sequence[str]) -> list[dict]:
        """Each question once, sorted by a hash of the row, so that every machine has the same."""
        rows = rows_of(key, files, answer_texts)
        rows.sort(key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest())
        return list({_question(row): row for row in reversed(rows)}.values())[::-1]

    rows = shuffled("train_file", args.train_file)
    parts: dict[str, list[dict]] = {}
    wanted = dict(split)
    if args.test_file:
        share = split["test"] // len(args.test_file)
        tasks = {f"test/{task_name(file)}": shuffled("test_file", [file])[:share] for file in args.test_file}
        parts["test"] = list(chain.from_iterable(tasks.values()))
        parts |= tasks if len(args.test_file) > 1 else {}
        wanted |= {"test": share * len(args.test_file)} | dict.fromkeys(tasks, share)
        seen = set(map(_question, parts["test"]))
        rows = [row for row in rows if _question(row) not in seen]
    else:
        parts["test"], rows = rows[: split["test"]], rows[split["test"] :]
    parts["tuning"], parts["train"] = rows[: split["tuning"]], rows[split["tuning"] :]
    for name, part in parts.items():
        if len(part) < wanted.get(name, 1):
            raise UsageError(f"the files leave too few rows for the part {name}: {len(part)} of {wanted.get(name, 1)}.")
    files = {name: folder / f"{name}.json" for name in parts}
    for name, part in parts.items():
        files[name].parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(part)
        if files[name].exists() and files[name].read_text() != text:
            raise UsageError(f"{files[name]} holds other rows: choose another --output_dir.")
        temporary = files[name].with_name(f".{files[name].name}.tmp")
        temporary.write_text(text)
        temporary.replace(files[name])
    return files


# ---------------------------------------------------------------------------------------------------------------- runs


class Runner:
    """Runs train_ist.py and ist.evaluate as processes, some at a time; what is finished is not run again."""

    def __init__(self, args: ExperimentArguments, experiment: Experiment, files: dict[str, Path]) -> None:
        self.args, self.experiment, self.files = args, experiment, files
        self.folder = Path(args.output_dir) / "runs"
        cores = len(os.sched_getaffinity(0))
        self.jobs = args.jobs or (1 if args.accelerate_config else torch.cuda.device_count() or min(8, cores))
        self.base = {"model_name_or_path": args.model_name_or_path, "train_file": files["train"], **experiment.recipe}
        all_devices = ",".join(map(str, range(torch.cuda.device_count())))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_devices).split(",")
        self.error: BaseException | None = None  # of the first run that failed
        self.processes: set[subprocess.Popen] = set()  # that are running
        self.devices: Queue[str] = Queue()
        for i in range(self.jobs):
            self.devices.put(visible[i % len(visible)])

    def flags(self, arm: Arm, values: dict[str, Any], seed: int) -> dict[str, Any]:
        """The keys of one run; the reported loss is that of rows which no tuning has seen."""
        part = "tuning" if seed == self.experiment.tuning_seed else "test"
        named = values | ({"fixed_layers": ",".join(map(str, arm.settings["fixed_layers"]))} if arm.top_of else {})
        where = self.folder / arm.name.replace(" ", "_") / f"{slug(named)}-seed={seed}"
        own = {"seed": seed, "validation_file": self.files[part], "output_dir": where}
        if part == "tuning":
            own["eval_steps"] = None  # of a trial only the end counts
        flags = {**self.base, **arm.settings, **values, **own, "logging_steps": 1, "report_to": "none"}
        return {key: value for key, value in flags.items() if value is not None}

    def run(self, flags: dict[str, Any], what: str) -> dict:
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
        print(f"{what}  {name}  " + (f"validation loss {loss:.4f}" if loss is not None else run["error"]), flush=True)
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
            launch = ["-m", "accelerate.commands.launch", "--config_file", self.args.accelerate_config]
            argv = [*(launch if self.args.accelerate_config else []), "train_ist.py", *as_argv(values)]
            self._process(argv, where, may_fail=diverged)
        run = read_run(where)
        # Not what the model decides.
        asked = {k: v for k, v in vars(arguments_of(flags)).items() if v not in (None, "auto")}
        differing = differing_keys(run["configuration"], asked)
        # A run may go on with other values of these; results beside each other may not have them.
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps"):
            if key in asked and run["configuration"][key] != asked[key]:
                differing += f"{', ' if differing else ''}{key} ({run['configuration'][key]} there, {asked[key]} here)"
        if differing:
            raise UsageError(f"{where} holds a run of another configuration: {differing}. Choose another --output_dir.")
        if self.experiment.evaluate and flags["validation_file"] == self.files["test"]:
            self.evaluate(where)
        return run

    def evaluate(self, run: Path | None) -> None:
        """Answers of a run's result on the test rows, or of the model as it is."""
        where = run / "evaluation" if run else self.folder / "base"
        tests = [file for name, file in self.files.items() if name.startswith("test/")] or [self.files["test"]]
        values = {"model_name_or_path": self.args.model_name_or_path, "test_file": tests}
        values |= {"prompt_template": self.base.get("prompt_template", "alpaca"), "output_dir": where}
        values |= {"dtype": self.base.get("dtype", "auto"), **self.experiment.evaluate}
        if run and (run / "adapter").exists():
            values["adapter"] = run / "adapter"
        elif run:
            values["model_name_or_path"] = run / "model"
        if (where / "summary.json").exists():
            there = json.loads((where / "summary.json").read_text())["arguments"]
            if any(there[key] != value for key, value in self.experiment.evaluate.items()):
                raise UsageError(f"{where} holds answers of another `evaluate`: remove it.")
            return
        self._process(["-m", "ist.evaluate", *as_argv(values)], where)

    def _process(self, argv: list[str], where: Path, may_fail: Callable[[], bool] = lambda: False) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        device = self.devices.get()
        try:
            if self.error:
                raise self.error
            if device and not self.args.accelerate_config:
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


def next_value(values: Sequence[float], tried: dict[float, float]) -> float | None:
    """What to try next: from the middle up while that lowers the loss, else down; None once both sides are worse.

    Args:
        tried: {value: loss}.
    """
    order = sorted(values)
    if not tried:
        return middle(values)
    best = order.index(lowest(tried))
    sides = [order[i] for i in (best + 1, best - 1) if 0 <= i < len(order)]
    return next((value for value in sides if value not in tried), None)


def tune_arm(runner: Runner, arm: Arm) -> tuple[dict[str, float], list[dict]]:
    """(its tuned values, every trial): key by key, the others at the best so far or the middle of their list."""
    best, trials = {key: middle(values) for key, values in arm.tune.items()}, []
    for key, values in arm.tune.items():
        tried: dict[float, float] = {}
        while (value := next_value(values, tried)) is not None:
            flags = runner.flags(arm, best | {key: value}, runner.experiment.tuning_seed)
            run = runner.run(flags, "tuning")
            tried[value] = math.inf if run.get("diverged") else run["final_validation_loss"]
            loss = None if run.get("diverged") else tried[value]
            trials.append({"arm": arm.name, "key": key, "values": best | {key: value}, "loss": loss})
        best[key] = lowest(tried)
        if tried[best[key]] == math.inf:
            raise UsageError(f"{arm.name} diverges at every {key} that was tried: {', '.join(map(str, tried))}.")
    return best, trials


def top_layers(runner: Runner, arm: Arm, tuned: dict[str, float], count: str | int) -> list[int]:
    """The layers of highest importance at the end of the tuning run of an arm of IST."""
    flags = runner.flags(arm, tuned, runner.experiment.tuning_seed)
    scores = read_lines(Path(flags["output_dir"]) / IMPORTANCE)[-1]["scores"]
    trained = ISTConfig(trained_layers=str(count)).counts(len(scores)).trained
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:trained])


def train_all(
    runner: Runner, arms: dict[str, Arm], seeds: Sequence[int], known: dict[str, dict]
) -> tuple[dict[str, dict], list[dict]]:
    """Tune every arm and train it on all seeds; ({arm: its tuned values}, every trial of tuning).

    Every arm goes on by itself, as soon as it has what it takes from another and a device is free.

    Args:
        known: arms that have been tuned and trained elsewhere.
    """
    tuned: dict[str, Future] = {name: Future() for name in arms}
    with ThreadPoolExecutor(len(arms) * (1 + len(seeds))) as pool:

        def tune_and_train(arm: Arm) -> list[Future]:
            try:
                if there := known.get(arm.name):
                    arm.settings = there["settings"]
                    if any(arm.name == other.top_of for other in arms.values() if other.name not in known):
                        runner.run(runner.flags(arm, there["tuned"], runner.experiment.tuning_seed), "tuning")
                    tuned[arm.name].set_result((there["tuned"], []))
                    return []
                if arm.top_of:
                    values, _ = tuned[arm.top_of].result()
                    wanted = arm.settings.get("trained_layers", 0.25)
                    arm.settings["fixed_layers"] = top_layers(runner, arms[arm.top_of], values, wanted)
                if arm.tuned_as:  # what an arm sets itself, it does not take over
                    taken, trials = tuned[arm.tuned_as].result()[0], []
                    values = {key: value for key, value in taken.items() if key not in arm.settings}
                else:
                    values, trials = tune_arm(runner, arm)
                tuned[arm.name].set_result((values, trials))
            except BaseException as error:
                tuned[arm.name].set_exception(error)
                raise
            return [pool.submit(runner.run, runner.flags(arm, values, seed), f"seed {seed}") for seed in seeds]

        started = [pool.submit(tune_and_train, arm) for arm in arms.values()]
        for run in (run for arm in started for run in arm.result()):
            run.result()
    found = {name: future.result() for name, future in tuned.items()}
    return {name: values for name, (values, _) in found.items()}, [
        one for _, trials in found.values() for one in trials
    ]


# ------------------------------------------------------------------------------------------------------------- results


def bytes_by_part(flags: dict[str, Any], trained: Sequence[Sequence[int]], tokens: float) -> dict[str, float]:
    """{weights, optimizer, gradients, saved: bytes}, counted as on a GPU; `saved` is what a forward leaves for the
    backward, its mean over steps in which the layers `trained` trained.

    Args:
        tokens: of a row of a micro-batch, which is counted without padding.
    """
    args = arguments_of(flags)
    args, layers, config, _ = plan_layers(args, sharded=False)
    n_layers, peft_config = layers.n_layers, make_peft_config(args)
    shape = (args.per_device_train_batch_size, round(tokens))
    with counting(args, peft_config, config, shape) as counter:
        count = max(1, n_layers // 4)
        last = range(n_layers - count, n_layers)
        sets = (range(n_layers), [0, *last[1:]], last)
        by_layer = SavedByLayer.solved(*map(counter.saved, sets), n_layers, count)
        step = counter.step(trained[0], set().union(*trained))
    saved = statistics.mean(by_layer.saved(layers, n_layers) for layers in trained)
    return {"weights": step.weights, "optimizer": step.optimizer, "gradients": step.gradients, "saved": saved}


def result_of(run: Path) -> dict[str, Any]:
    """What a table needs of a finished run: losses over steps, seconds per step, layers trained, answers."""
    record, lines = read_run(run), read_lines(run / METRICS)
    steps = [line for line in lines if "loss" in line]
    updates = read_lines(run / IMPORTANCE)
    result = {
        "folder": str(run),
        "validation": [[line["step"], line["validation_loss"]] for line in lines if "validation_loss" in line],
        "loss": [round(line["loss"], 5) for line in steps],
        "trained_counts": record["trained_counts"],
        "updates": [{"step": u["step"], "probabilities": [round(p, 5) for p in u["probabilities"]]} for u in updates],
        "commit": record["commit"],
    }
    file = run / "evaluation" / "summary.json"
    if file.exists():
        summary = json.loads(file.read_text())
        result |= {"exact": summary["average"], "tasks": {k: v["accuracy"] for k, v in summary["tasks"].items()}}
    return result | {"trained_layers": [line["trained_layers"] for line in steps]}


def measure_seconds(
    file: Path, arms: dict[str, dict[str, Any]], known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{arm: {step_seconds, ratio: to the first arm's, interval: 95 %, by bootstrap of steps}}.

    Each arm takes turns with the first one, step by step, a few arms at a time and nothing else: runs beside each other
    hold one another up. What `file` has is not measured again.

    Args:
        arms: {name: keys of train_ist.py}; those that differ only in what does not change a step are timed once.
        known: {name: what this returns of it} of arms that have been timed before.
    """

    def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in keys}

    own = ("output_dir", "max_steps", "validation_file", "eval_steps")
    settings = {name: without(flags, *own) for name, flags in arms.items()}
    alike = {name: without(flags, "seed", "learning_rate", "score_lr") for name, flags in settings.items()}
    text = {name: json.dumps(values, sort_keys=True, default=str) for name, values in alike.items()}
    first = next(iter(arms))
    lines = {line["settings"]: line for line in read_lines(file) if line.get("beside") == text[first]}
    lines |= {text[name]: one | {"first": known[first]["step_seconds"]} for name, one in known.items()}
    others = {text[name]: name for name in reversed(arms) if text[name] != text[first]} or {text[first]: first}
    names = [name for name in reversed(others.values()) if text[name] not in lines]
    steps = WINDOW * (11 if torch.cuda.is_available() else 3)
    keep_lines(file, lambda line: True)
    for i in range(0, len(names), BESIDE):
        group = {f"arm {name}": settings[name] for name in (first, *names[i : i + BESIDE])}
        found = take_turns(group, steps, False, lambda line: print(f"seconds  {line}", flush=True))
        for name in names[i : i + BESIDE]:
            this, beside = found[f"arm {name}"], found[f"arm {first}"]
            ratio, interval = ratio_of([this | {"bare": beside["turns"]}])
            line = {"settings": text[name], "beside": text[first], "seconds": this["total"], "first": beside["total"]}
            lines[text[name]] = line | {"ratio": ratio, "interval": interval}
            with open(file, "a") as stream:
                stream.write(json.dumps(lines[text[name]]) + "\n")
    reference = statistics.median(lines[text[name]]["first"] for name in known or arms if text[name] in lines)
    itself = {"ratio": 1.0, "interval": [1.0, 1.0]}
    kept = {name: itself if text[name] == text[first] else lines[text[name]] for name in arms}
    return {
        name: {"step_seconds": one["ratio"] * reference, "ratio": one["ratio"], "interval": one["interval"]}
        for name, one in kept.items()
    }


def mean_sd(values: Sequence[float | None], digits: str, scale: float = 1) -> str:
    """Mean and standard deviation over seeds."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):{digits}}" + (f" ± {statistics.stdev(known):{digits}}" if len(known) > 1 else "")


def paired(one: dict[int, float], two: dict[int, float]) -> dict[str, Any]:
    """Mean difference over the seeds of both, its standard deviation, and its 95 % interval (Student's t)."""
    differences = [one[seed] - two[seed] for seed in one if seed in two]
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "sd": None, "interval": None, "seeds": count}
    sd = statistics.stdev(differences)
    half = float(stats.t.ppf(0.975, count - 1)) * sd / math.sqrt(count)
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half], "seeds": count}


def tables(results: dict[str, Any]) -> str:
    """Markdown: arms with their tuned values; differences in pairs, of losses and of answers; how it was got."""
    arms, base = results["arms"], results["base"]
    final = {name: {run["seed"]: run["validation"][-1][1] for run in arm["runs"]} for name, arm in arms.items()}
    exact = {name: {r["seed"]: r["exact"] for r in arm["runs"] if "exact" in r} for name, arm in arms.items()}
    answers, text = any(exact.values()), results["text"]
    rows = []
    cells = [f"{base['validation']:.4f}", f"{math.exp(base['validation']):.2f}"]
    rows.append(["base model", "", "0", *cells, f"{100 * base.get('exact', 0):.1f}", "", "", ""])
    for name, arm in arms.items():
        runs, (low, high) = arm["runs"], arm["interval"]
        rows.append(
            [
                name,
                f"as {arm['tuned_as']}" if arm["tuned_as"] else ", ".join(f"{k} {v}" for k, v in arm["tuned"].items()),
                str(runs[0]["validation"][-1][0]),
                mean_sd(list(final[name].values()), ".4f"),
                mean_sd([math.exp(loss) for loss in final[name].values()], ".2f"),
                mean_sd(list(exact[name].values()), ".1f", 100),
                f"{arm['step_seconds']:.2f}",
                f"{arm['ratio']:.2f} ({low:.2f} … {high:.2f})" if arm["ratio"] != 1 else "1",
                f"{arm['bytes']['saved'] / 1e6:.0f}",
            ]
        )
    header = ["arm", "tuned", "steps", "validation loss", "perplexity"]
    answered = "exact answers" if results["scoring"] == "generation" else "right answers"
    header += [f"{answered}, %", "seconds per step", f"of {next(iter(arms))}'s", "saved for the backward, MB"]
    unknown = {"perplexity"} if not text else set()
    unknown |= {f"{answered}, %"} if not answers else set()
    keep = [i for i, name in enumerate(header) if name not in unknown]
    lines = markdown_table([header[i] for i in keep], [[row[i] for i in keep] for row in rows])
    pairs = []
    kinds = (("validation loss", final, ".4f", 1), (f"{answered}, points", exact, ".1f", 100))
    for one, two in results["pairs"]:
        for what, values, digits, scale in kinds:
            if set(values[one]) & set(values[two]):
                found = paired(values[one], values[two])
                ends = [f"{scale * end:+{digits}}" for end in found["interval"] or ()]
                spread = "" if found["sd"] is None else f" ± {scale * found['sd']:{digits}}"
                pairs.append([f"{one} − {two}", what, f"{scale * found['mean']:+{digits}}{spread}", " … ".join(ends)])
    if pairs:
        lines += ["", *markdown_table(["paired over seeds", "of", "mean ± sd", "95 % interval"], pairs)]
    seeds = [str(run["seed"]) for run in next(iter(arms.values()))["runs"]]
    lines += [
        "",
        f"Of {results['test_rows']} rows that neither training nor tuning has seen, mean ± standard deviation over the "
        f"seeds {', '.join(seeds)}. Intervals: Student's t over the seeds, on the same rows. Of losses less is better, "
        f"of answers more. Seconds: arms take turns step by step, after all runs, on all cores. "
        + where_and_when(results),
    ]
    return "\n".join(lines)


def where_and_when(results: dict[str, Any]) -> str:
    """Of the runs themselves, whenever and wherever their table is made."""
    hardware = ", ".join(f"{key} {value}" for key, value in results["hardware"].items())
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    tuned = f" (tuned at {results['tuning_commit']})" if results["tuning_commit"] not in ("", results["commit"]) else ""
    return f"Runs of {results['date']}, commit {results['commit']}{tuned}; {hardware}; {versions}."


def provenance(finals: Sequence[dict], trials: Sequence[dict], known: dict[str, Any]) -> dict[str, Any]:
    """{date, commit, tuning_commit, hardware, versions, global_batch_size} out of run.json of all runs, and of `known`.

    Raises:
        UsageError: batches or devices differ, so that the runs cannot stand beside each other.
    """

    sizes = {run["configuration"]["global_batch_size"] for run in [*finals, *trials]}
    sizes |= {known["global_batch_size"]} if known else set()
    if len(sizes) > 1:
        raise UsageError(f"runs differ in global_batch_size ({listed(sizes)}): choose another --output_dir.")
    heads = [run | {"date": run["end"][:10]} for run in finals] + ([known] if known else [])
    facts = joined(heads) | {"global_batch_size": sizes.pop()}
    for key in ("device", "cpu_cores"):
        if known and facts["hardware"][key] != str(known["hardware"][key]):
            raise UsageError(f"seconds of other hardware cannot stand beside those of --known: {facts['hardware']}.")
    tuning = [run["commit"] or "none" for run in trials] + ([known["tuning_commit"]] if known else [])
    return facts | {"tuning_commit": listed(commit for commit in tuning if commit)}


def tuning_table(trials: Sequence[dict]) -> str:
    """Every trial; the best of an arm and key are marked, and those at an end of what was tried."""
    rows = []
    for one in trials:
        values = [other for other in trials if (other["arm"], other["key"]) == (one["arm"], one["key"])]
        losses = {other["values"][one["key"]]: math.inf if other["loss"] is None else other["loss"] for other in values}
        best = lowest(losses) == one["values"][one["key"]]
        at_end = best and len(losses) > 1 and one["values"][one["key"]] in (min(losses), max(losses))
        mark = "best, at an end of what was tried" if at_end else "best" if best else ""
        loss = "diverged" if one["loss"] is None else f"{one['loss']:.4f}"
        rows.append([one["arm"], ", ".join(f"{k} {v}" for k, v in one["values"].items()), loss, mark])
    return "\n".join(markdown_table(["arm", "values", "loss on the tuning rows", ""], rows))


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """curves.png: losses over steps and over time, and bytes (paper, Figure 1); importance.png (Figure 4)."""
    plot_arms(folder / "curves.png", results["arms"])
    learned = {name: arm["runs"][0]["updates"] for name, arm in results["arms"].items() if arm["runs"][0]["updates"]}
    if not learned:
        return [folder / "curves.png"]
    plot_importance_panels(folder / "importance.png", learned)
    return [folder / "curves.png", folder / "importance.png"]


def run_arms(runner: Runner, known: dict[str, Any], facts: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Train and time the arms that `known` does not have; the results of all.

    Args:
        facts: what is alike for all arms.
        path: of `known`.

    Raises:
        UsageError: the arms cannot stand beside each other, or a run failed.
    """
    experiment, arms, there = runner.experiment, runner.experiment.arms, known.get("arms", {})
    before = signal.signal(signal.SIGTERM, runner.stop)
    try:
        if experiment.evaluate and not known:
            runner.evaluate(None)
        tuned, trials = train_all(runner, arms, experiment.seeds, there)
    finally:
        signal.signal(signal.SIGTERM, before)
    runs = [(arm, seed) for seed in experiment.seeds for arm in arms.values() if arm.name not in there]
    everything = [runner.flags(arm, tuned[arm.name], seed) for arm, seed in runs]

    finals = [read_run(Path(flags["output_dir"])) for flags in everything]
    tuning = [runner.flags(arms[one["arm"]], one["values"], experiment.tuning_seed) for one in trials]
    # Tables in a README make a checkout differ from its commit: what counts is where the runs were.
    results = facts | provenance(finals, [read_run(Path(flags["output_dir"])) for flags in tuning], known)
    results["trials"] = [one for one in known.get("trials", []) if one["arm"] in there] + trials
    trained: dict[str, dict] = {}
    record = finals[0]["configuration"]
    for (arm, seed), flags in zip(runs, everything, strict=True):
        entry = {"settings": arm.settings, "tuned": tuned[arm.name], "tuned_as": arm.tuned_as, "top_of": arm.top_of}
        entry = trained.setdefault(arm.name, entry | {"runs": [], "flags": flags})
        entry["runs"].append(result_of(Path(flags["output_dir"])) | {"seed": seed})
    for entry in trained.values():
        layers = [layers for run in entry["runs"] for layers in run.pop("trained_layers")]
        tokens = record["train_tokens"] / record["train_rows"]
        entry["bytes"] = bytes_by_part(entry.pop("flags"), layers, tokens)
        unmasked = read_run(Path(entry["runs"][0]["folder"])).get("id3")
        if unmasked:  # whose moments are kept with their positions, 16 bytes each
            entry["bytes"]["optimizer"] = 16 * unmasked["unmasked"]
    results["arms"] = {name: there.get(name) or trained[name] for name in arms}
    start = next(iter(trained.values()))["runs"][0]["validation"][0][1]
    results["base"] = known.get("base") or {"validation": start}
    if known and not math.isclose(start, results["base"]["validation"], rel_tol=0.01):  # not exactly: types differ
        raise UsageError(
            f"--known {path} is of another model: its loss is {results['base']['validation']:.4f} before training, "
            f"here {start:.4f}."
        )
    if experiment.evaluate and not known:
        summary = json.loads((runner.folder / "base" / "summary.json").read_text())
        results["base"]["exact"] = summary["average"]
    flags = {name: runner.flags(arm, tuned[name], experiment.seeds[0]) for name, arm in arms.items()}
    timed = measure_seconds(Path(runner.args.output_dir) / "seconds.jsonl", flags, there)
    for name, entry in trained.items():
        entry |= timed[name]
    return results


@command
def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([ExperimentArguments], argv, __doc__.split("\n")[0])
    known = read_known(args.known)
    experiment = Experiment.read(args.experiment, args.arms and [*args.arms, *known.get("arms", {})])
    folder = Path(args.output_dir)
    require_writable(folder)
    files = write_parts(args, experiment.split, folder / "data", experiment.answer_texts)
    facts = {"name": Path(args.experiment).stem, "model": Path(args.model_name_or_path).name}
    facts |= {"recipe": experiment.recipe, "evaluate": experiment.evaluate, "tuning_seed": experiment.tuning_seed}
    facts["data"] = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    facts["test_rows"] = len(json.loads(files["test"].read_text()))
    facts["text"] = all(file.endswith(".txt") for file in args.train_file)
    facts["scoring"] = (experiment.evaluate or {}).get("scoring", "generation")
    require_same(args.known, known, experiment, facts)
    runner = Runner(args, experiment, files)
    arms = experiment.arms
    for arm in arms.values():  # what any of them would be refused for, before the first is run
        first = {key: middle(values) for key, values in (arms[arm.tuned_as] if arm.tuned_as else arm).tune.items()}
        try:
            plan_layers(arguments_of(runner.flags(replace(arm, top_of=None), first, 0)), sharded=False)
        except UsageError as error:
            raise UsageError(f"{args.experiment}, {arm.name}: {error}") from error
    if known and arms.keys() <= known["arms"].keys():  # nothing to run, but tables and pictures to make
        results = {key: value for key, value in known.items() if key not in ("command", "earlier_commands")}
    else:
        results = run_arms(runner, known, facts, args.known)
    results["pairs"] = experiment.pairs
    if known:
        results["earlier_commands"] = [*known.get("earlier_commands", []), known["command"]]
    pictures = draw(results, folder)
    table = tables(results)
    print(table)
    command = "python -m ist.experiment " + shlex.join(argv)
    accelerator = Accelerator()
    publish(folder / "experiment.json", command, accelerator, table, **results)
    if args.publish:
        target = Path(args.publish)
        publish(target, command, accelerator, table, Path(args.readme) if args.readme else None, **results)
        for picture in pictures:
            (target.parent / f"{target.stem}-{picture.name}").write_bytes(picture.read_bytes())
    (folder / "results.md").write_text(f"{table}\n\n`{command}`\n")
    (folder / "tuning.md").write_text(tuning_table(results["trials"]) + "\n")
    print(f"{folder / 'results.md'}, {folder / 'tuning.md'}")
    return 0


if __name__ == "__main__":
    run_command(main)
