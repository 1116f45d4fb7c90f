"""Evaluations compared: accuracy per task and arm over seeds, differences in pairs; and the command itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ist.report.arms import read_arms
from ist.report.figures import plot_runs
from ist.report.side_by_side import side_by_side, side_by_side_tables
from ist.report.statistics import interval
from ist.selection import rule_fields
from ist.training.command_line import PlainParser, UsageError, command, expand_home, markdown_table
from ist.training.figures import drawn, plot_importance_panels
from ist.training.files import read_object, reading, write_json, write_text
from ist.training.packages import require_package
from ist.training.record import (
    IMPORTANCE,
    draw_importance,
    draw_loss,
    read_lines,
    require_writable,
)


def read_results(folder: Path) -> dict[str, Any]:
    """A result folder of `python -m ist.evaluate`: {file, model, arm, seed, right: {task: [0 or 1 for each row]}}.

    The arm is named by the run.json of the adapter's run: the method, and the selection unless it is all layers.

    Raises:
        UsageError: no finished evaluation.
    """
    file = folder / "summary.json"
    if not file.exists():
        raise UsageError(f"{folder} holds no finished evaluation (no summary.json): run python -m ist.evaluate.")
    summary = read_object(file, "--results")
    with reading(file, "the summary of a finished evaluation"):
        model, arm, seed = _arm_of(summary)
        right = {task: _right(folder / f"{task}.jsonl") for task in dict(summary["tasks"])}
    return {"file": str(file), "model": model, "arm": arm, "seed": seed, "right": right}


def _right(file: Path) -> list[int]:
    lines = read_lines(file)
    if not lines or not all(isinstance(line.get("right"), bool) for line in lines):
        raise UsageError(f"--results {file} holds no answers (lines with right: true or false); evaluate anew.")
    return [int(line["right"]) for line in lines]


def _arm_of(summary: dict[str, Any]) -> tuple[str, str, int | None]:
    """(the base model's name, the arm, the seed)."""
    training = summary["training"]
    settings = training["configuration"] if training else {}
    model = settings.get("model_name_or_path", summary["arguments"]["model_name_or_path"])  # of a model/: its base
    if not training:
        return Path(model).name, str(summary["arguments"]["adapter"] or "base"), None
    arm = (settings.get("adapter") or {"peft_type": settings["peft_method"]})["peft_type"].upper()
    arm = "FULL" if arm == "NONE" else arm
    if settings["selection"] != "all":
        arm += f" + {settings['selection']}"
        arm += "" if settings["trained_layers"] == 0.25 else f" ({settings['trained_layers']} layers)"
        keys = [k.name for k, _ in rule_fields() if settings.get(k.name) not in (None, k.default)]
        arm += "".join(f" {key} {settings[key]}" for key in keys)
    return Path(model).name, arm, settings["seed"]


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Accuracy per task and arm over seeds, and differences of a method's arms in pairs, from result folders.

    Raises:
        UsageError: a folder holds no finished evaluation, the folders have no task in common, or other rows of one.
    """
    results = [read_results(folder) for folder in folders]
    tasks = [task for task in results[0]["right"] if all(task in result["right"] for result in results)]
    if not tasks:
        raise UsageError("the result folders have no task in common, so there is nothing to compare.")
    for task in tasks:
        if len({len(result["right"][task]) for result in results}) > 1:
            raise UsageError(f"the result folders have different numbers of rows of {task}: evaluate the same ones.")
    arms: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        arms.setdefault((result["model"], result["arm"]), []).append(result)

    accuracy, differences = [], []
    for (model, arm), members in arms.items():
        values = np.array([[np.mean(result["right"][task]) for task in tasks] for result in members])
        values = np.column_stack([values, values.mean(axis=1)])
        spread = values.std(axis=0, ddof=1).tolist() if len(members) > 1 else [None] * values.shape[1]
        cells = zip([*tasks, "average"], values.mean(axis=0).tolist(), spread, strict=True)
        accuracy.append(
            {
                **{"model": model, "arm": arm, "seeds": [result["seed"] for result in members]},
                "accuracy": {task: {"mean": mean, "std": std} for task, mean, std in cells},
                "files": [result["file"] for result in members],
            }
        )
        method, _, selection = arm.partition(" + ")
        for other in (method, f"{method} + random") if selection and selection != "random" else ():
            by_seed = {result["seed"]: result for result in arms.get((model, other), [])}
            pairs = [(result, by_seed[result["seed"]]) for result in members if result["seed"] in by_seed]
            if pairs:
                points = [np.mean([np.mean(a["right"][t]) - np.mean(b["right"][t]) for a, b in pairs]) for t in tasks]
                points = [*map(float, points), float(np.mean(points))]
                differences.append(
                    {
                        **{"model": model, "arms": f"{arm} − {other}", "seeds": [one["seed"] for one, _ in pairs]},
                        "difference": dict(zip([*tasks, "average"], points, strict=True)),
                        "interval": interval(pairs, tasks),
                        "files": [result["file"] for pair in pairs for result in pair],
                    }
                )
    return {"tasks": tasks, "accuracy": accuracy, "differences": differences}


def comparison_table(comparison: dict) -> str:
    """Markdown: accuracy in percent with its spread over seeds, differences in points with their 95 % intervals."""

    def percent(cell: dict) -> str:
        return f"{100 * cell['mean']:.1f}" + ("" if cell["std"] is None else f" ± {100 * cell['std']:.1f}")

    columns = [*comparison["tasks"], "average"]
    rows = []
    for row in comparison["accuracy"]:
        cells = [percent(row["accuracy"][column]) for column in columns]
        rows.append([row["model"], row["arm"], str(len(row["files"])), *cells, ", ".join(row["files"])])
    lines = markdown_table(["model", "arm", "seeds", *columns, "from"], rows)
    rows = []
    for row in comparison["differences"]:
        cells = [f"{100 * row['difference'][column]:+.1f}" for column in columns]
        interval = " … ".join(f"{100 * end:+.1f}" for end in row["interval"])
        rows.append([row["model"], row["arms"], str(len(row["seeds"])), *cells, interval, ", ".join(row["files"])])
    if rows:
        lines += [
            "",
            *markdown_table(["model", "points", "seeds", *columns, "95 % interval of the average", "from"], rows),
        ]
    return "\n".join(lines)


def _compare_runs(folders: Sequence[Path], output_dir: Path) -> None:
    """comparison.json, .md and .png of two or more runs."""
    require_package("scipy", "a comparison of runs")
    arms = read_arms(folders)
    comparison = side_by_side(arms)
    table = side_by_side_tables(comparison)
    require_writable(output_dir)
    write_json(output_dir / "comparison.json", comparison)
    write_text(output_dir / "comparison.md", f"{table}\n")
    print(table, "", sep="\n")
    picture = output_dir / "comparison.png"
    pictures = [picture] if drawn(picture, plot_runs, picture, arms) else []
    print(*pictures, output_dir / "comparison.md", output_dir / "comparison.json", sep="\n")


def _draw_panels(items: Sequence[str], output_dir: Path) -> Path:
    """The heat maps of NAME=RUN_DIR side by side."""
    runs = {}
    for item in items:
        name, _, folder = ("", "", item) if Path(item).is_dir() else item.partition("=")
        runs[name or Path(folder).name] = updates = read_lines(Path(folder) / IMPORTANCE)
        if not updates:
            raise UsageError(f"--importance {item}: {folder} has no importance updates to draw.")
    require_writable(output_dir)
    with reading("--importance " + " ".join(items), "importance that can be drawn"):
        plot_importance_panels(output_dir / "importance-panels.png", runs)
    return output_dir / "importance-panels.png"


@command
def main(argv: Sequence[str]) -> int:
    parser = PlainParser(
        prog="python -m ist.report",
        description="One RUN: draws its importance.png and loss.png again, from its files. Two or more: lays them side "
        "by side in comparison.png, comparison.md and comparison.json; runs that differ in nothing but the seed are an "
        "arm, and arms are compared with that of the first RUN, in pairs of runs of the same seed. Or compares results "
        "of python -m ist.evaluate: accuracy per task and arm over seeds, and in pairs the differences to all layers "
        "and to random ones.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs (with a run.json)")
    parser.add_argument(
        "--importance", nargs="+", metavar="NAME=RUN", help="runs of several tasks, drawn side by side (Figure 4)"
    )
    parser.add_argument("--results", nargs="+", type=Path, metavar="DIR", help="result folders to compare")
    parser.add_argument(
        *("--output_dir", "--output"),
        type=Path,
        metavar="DIR",
        help="where the comparison goes; of runs the default is comparison/ in the current folder",
    )
    args = parser.parse_intermixed_args([expand_home(text) for text in argv])  # RUN --output_dir DIR RUN
    if sum(map(bool, (args.runs, args.results, args.importance))) != 1:
        parser.error("give RUN [RUN ...], or --results DIR [DIR ...], or --importance NAME=RUN [NAME=RUN ...]")
    if args.importance:
        if not args.output_dir:
            parser.error("--importance needs --output_dir")
        print(_draw_panels(args.importance, args.output_dir))
        return 0
    if len(args.runs) > 1:
        _compare_runs(args.runs, args.output_dir or Path("comparison"))
        return 0
    if args.runs:
        (run,) = args.runs
        if args.output_dir:
            raise UsageError(f"--output_dir {args.output_dir}: a single run is drawn in its own folder. Leave it out.")
        with reading(run, "a run that can be drawn"):
            print(draw_importance(run), draw_loss(run), sep="\n")
        return 0
    comparison = compare(args.results)
    print(comparison_table(comparison))
    if args.output_dir:
        require_writable(args.output_dir)
        write_json(args.output_dir / "comparison.json", comparison)
        write_text(args.output_dir / "comparison.md", comparison_table(comparison) + "\n")
    return 0
