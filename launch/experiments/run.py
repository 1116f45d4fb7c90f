"""Arms of an experiment in one table: each arm is tuned on a seed of its own, then trained on several seeds.

    python -m launch.experiments.run --experiment launch/experiments/arithmetic.yaml --train_file rows.json \\
        --model_name_or_path models/SmolLM2-135M-Instruct --output_dir runs/arithmetic

Every run is a `train_ist.py` of its own, goes on where it was stopped, and is not done twice. Leaves results/ in the
folder (a file for each run, and experiment.json), curves.png and importance.png there, results.md and tuning.md.
"""

import hashlib
import json
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ist.training.command_line import quiet_known_warnings

quiet_known_warnings()

from ist.benchmark.arms import arguments_of
from ist.report.tables import insert_table, listed, require_place
from ist.training.command_line import UsageError, command, parse_arguments, require, run_command
from ist.training.files import model_digest, read_object, write_text
from ist.training.model import plan_layers
from ist.training.record import read_run, require_writable
from launch.experiments.design import Experiment
from launch.experiments.results import (
    SUMMARY,
    bytes_by_part,
    finish_run,
    measure_seconds,
    read_results,
    result_of,
    the_same,
    write_results,
    write_summary,
)
from launch.experiments.rows import write_parts
from launch.experiments.runner import ROOT, Runner, Where, middle, train_all, train_by_seed
from launch.experiments.tables import draw, table_of, tuning_table


def _for_runs(path: str) -> str:
    """A path for runs, whose working directory is that of train_ist.py."""
    return path if Path.cwd() == ROOT else str(Path(path).absolute())


@dataclass
class ExperimentArguments:
    experiment: str = field(metadata={"help": "The file of arms and pairs: launch/experiments/*.yaml."})
    model_name_or_path: str = field(metadata={"help": "The model of all arms."})
    train_file: list[str] = field(metadata={"help": "Rows as train_ist.py takes them; or plain text (.txt)."})
    output_dir: str = field(metadata={"help": "Where runs, results and pictures go."})
    test_file: list[str] | None = field(
        default=None,
        metadata={"help": "Rows or text that only the reported losses see; default: a part of train_file."},
    )
    arms: list[str] | None = field(default=None, metadata={"help": "Only these arms; default: all of the file."})
    jobs: int = field(default=0, metadata={"help": "Runs at a time; default: one per GPU, or per CPU core, up to 8."})
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Each run under accelerate launch with this file, one run at a time."}
    )
    publish: str | None = field(
        default=None, metadata={"help": "Also write results and pictures into this folder, experiments/results/NAME."}
    )
    readme: str | None = field(
        default=None, metadata={"help": "And the tables into this file, between <!-- NAME --> and <!-- /NAME -->."}
    )

    def __post_init__(self) -> None:
        require(self.jobs >= 0, "jobs", "0 (as many as there are devices) or more", self.jobs)
        if self.readme and not self.publish:
            raise UsageError("--readme needs --publish, whose name is that of the markers.")
        if self.readme:
            require_place(self.readme, Path(self.publish).name)
        if self.accelerate_config and not Path(self.accelerate_config).is_file():
            raise UsageError(f"--accelerate_config {self.accelerate_config}: no such file.")
        if Path(self.model_name_or_path).exists():  # runs have another working directory
            self.model_name_or_path = _for_runs(self.model_name_or_path)
        self.accelerate_config = self.accelerate_config and _for_runs(self.accelerate_config)
        self.output_dir = _for_runs(self.output_dir)


def run_arms(runner: Runner, facts: dict[str, Any], folders: Sequence[Path]) -> tuple[dict, list[dict[str, Any]]]:
    """Train and time the arms; (experiment.json, results of all runs).

    Args:
        facts: of all arms.
        folders: where results are kept.

    Raises:
        UsageError: the runs cannot be compared, or one failed.
    """
    experiment, arms = runner.experiment, runner.experiment.arms
    base, by_rows = {}, experiment.measure == "rows"
    before = signal.signal(signal.SIGTERM, runner.stop)
    try:
        if runner.evaluates:
            runner.evaluate(None)
            measured = read_object(runner.folder / "base" / "summary.json")
            base |= {"exact": measured["average"]} if experiment.evaluate else {}
            base |= {"validation": measured["losses"]["test"]["loss"]} if by_rows else {}
        tuned, trials = train_all(runner, arms, experiment.seeds)
        entries = {
            name: {"settings": {**arm.settings}, "tuned": tuned[name], "tuned_as": arm.tuned_as, "top_of": arm.top_of}
            | ({"scores_of": arm.scores_of} if arm.scores_of else {})
            | ({"seeds": arm.seeds} if arm.seeds else {})
            for name, arm in arms.items()
        }
        summary = {
            **facts,
            "tuning_commit": listed(one["commit"] for one in trials if one["commit"]),
            **{"seeds": experiment.seeds, "base": base, "pairs": experiment.pairs, "arms": entries, "trials": trials},
        }
        if by_rows:
            for folder in folders:  # so that the results which a stop leaves have a table
                write_summary(folder, summary)
            inputs = {**facts["data"], "model": model_digest(runner.where.model_name_or_path)}
            by_arm = train_by_seed(runner, tuned, finish_run(runner, inputs, folders))
    finally:
        signal.signal(signal.SIGTERM, before)
    if by_rows:
        runs = [run for several in by_arm.values() for run in several]
        batch = {run["global_batch_size"] for run in runs}
    else:
        runs, batch = add_costs(runner, entries)
        base["validation"] = runs[0]["validation"][0][1]
    return summary | {"global_batch_size": the_same(batch)}, runs


def add_costs(runner: Runner, entries: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], set[int]]:
    """(results of all runs, their global batch sizes); seconds and bytes of each arm go into its entry."""
    experiment, arms = runner.experiment, runner.experiment.arms
    flags = {
        name: [runner.flags(arm, entries[name]["tuned"], seed) for seed in experiment.seeds]
        for name, arm in arms.items()
    }
    finals = [read_run(Path(one["output_dir"])) for several in flags.values() for one in several]
    record, runs = finals[0]["configuration"], []
    for name in arms:
        found = [result_of(name, one) for one in flags[name]]
        layers = [layers for _, trained in found for layers in trained]
        sizes = bytes_by_part(flags[name][0], layers, record["train_tokens"] / record["train_rows"])
        unmasked = read_run(Path(flags[name][0]["output_dir"])).get("id3")
        if unmasked:  # whose moments are kept with their positions, 16 bytes each
            sizes["optimizer"] = 16 * unmasked["unmasked"]
        entries[name]["bytes"] = sizes
        runs += [result for result, _ in found]
    timed = measure_seconds(runner.where.output_dir / "seconds.jsonl", {name: one[0] for name, one in flags.items()})
    for name, entry in entries.items():
        entry |= timed[name]
    return runs, {run["configuration"]["global_batch_size"] for run in finals}


def require_all_arms(published: Path, experiment: Experiment) -> None:
    """Raises UsageError if publishing would drop an arm that is published, before anything is run."""
    if (published / SUMMARY).is_file():
        lost = read_results(published)["arms"].keys() - experiment.arms.keys()
        if lost:
            raise UsageError(
                f"--publish {published} has the arm {sorted(lost)[0]!r}, which this command does not run: run "
                "all arms, or publish into another folder."
            )


def facts_of(args: ExperimentArguments, experiment: Experiment, files: dict[str, Path]) -> dict[str, Any]:
    """The facts that are the same for all arms."""
    return {
        "name": Path(args.experiment).stem,
        "model": Path(args.model_name_or_path).name,
        "recipe": experiment.recipe,
        "evaluate": experiment.evaluate,
        "tuning_seed": experiment.tuning_seed,
        "data": {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()},
        "test_rows": len(json.loads(files["test"].read_text())),
        "text": all(file.endswith(".txt") for file in args.train_file),
        "scoring": (experiment.evaluate or {}).get("scoring", "generation"),
        "measure": experiment.measure,
        "margin": experiment.margin,
        "hypotheses": [asdict(hypothesis) for hypothesis in experiment.hypotheses],
    }


@command
def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([ExperimentArguments], argv, __doc__.split("\n")[0])
    experiment = Experiment.read(args.experiment, args.arms)
    if args.publish:
        require_all_arms(Path(args.publish), experiment)
    folder = Path(args.output_dir)
    require_writable(folder)
    files = write_parts(args.train_file, args.test_file, experiment.split, folder / "data", experiment.answer_texts)
    runner = Runner(Where(args.model_name_or_path, folder, args.jobs, args.accelerate_config), experiment, files)
    arms = experiment.arms
    for arm in arms.values():  # a bad arm is refused before the first is run
        first = {key: middle(values) for key, values in (arms[arm.tuned_as] if arm.tuned_as else arm).tune.items()}
        flags = runner.flags(replace(arm, top_of=None), first, 0)
        if arm.scores_of:  # which are not measured yet
            flags["selection"] = "random"
        try:
            plan_layers(arguments_of(flags), sharded=False)
        except UsageError as error:
            raise UsageError(f"{args.experiment}, {arm.name}: {error}") from error
    targets = [folder / "results", *([Path(args.publish)] if args.publish else [])]
    summary, runs = run_arms(runner, facts_of(args, experiment, files), targets)
    summary["command"] = "python -m launch.experiments.run " + shlex.join(argv)
    for target in targets:
        write_results(target, summary, runs)
    table = table_of(folder / "results")
    print(table)
    if args.readme:
        insert_table(Path(args.readme), Path(args.publish).name, table)
    write_text(folder / "results.md", f"{table}\n\n`{summary['command']}`\n")
    write_text(folder / "tuning.md", tuning_table(summary["trials"]) + "\n")
    for target in targets:  # last: a picture that fails costs no numbers
        draw(read_results(target), target)
    print(f"{folder / 'results.md'}, {folder / 'tuning.md'}")
    return 0


if __name__ == "__main__":
    run_command(main)
