"""The tables and pictures of an experiment, made of its folder of results alone.

    python -m launch.experiments.tables [FOLDER ...] [--readme FILE.md]

FOLDER: launch/experiments/results/* by default. With --readme the tables go into that file, between the markers
<!-- NAME --> and <!-- /NAME -->, NAME being the folder's, and the pictures go into the folder.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ist.report.figures import plot_arms
from ist.report.statistics import paired
from ist.report.tables import insert_table, require_place
from ist.training.command_line import PlainParser, UsageError, command, markdown_table, run_command
from ist.training.figures import drawn, plot_importance_panels
from ist.training.files import reading
from launch.experiments.results import SUMMARY, read_results
from launch.experiments.runner import lowest
from launch.experiments.verdicts import draw_rows, is_by_rows, rows_table

RESULTS = Path(__file__).parent / "results"


def mean_sd(values: Sequence[float | None], digits: str, scale: float = 1) -> str:
    """Mean and standard deviation over seeds."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):{digits}}" + (f" ± {statistics.stdev(known):{digits}}" if len(known) > 1 else "")


def _pair(
    one: str, two: str, name: str, values: dict[str, dict[int, float]], digits: str, scale: float
) -> list[list[str]]:
    """The row of a pair of arms and a measure, if both arms have it."""
    seeds = [seed for seed in values[one] if seed in values[two]]
    if not seeds:
        return []
    found = paired([values[one][seed] for seed in seeds], [values[two][seed] for seed in seeds])
    ends = [f"{scale * end:+{digits}}" for end in found["interval"] or ()]
    spread = "" if found["sd"] is None else f" ± {scale * found['sd']:{digits}}"
    return [[f"{one} − {two}", name, f"{scale * found['mean']:+{digits}}{spread}", " … ".join(ends)]]


def experiment_table(folder: Path) -> str:
    """Markdown: arms with their tuned values; paired differences of losses and of answers; rows, seeds, hardware."""
    results = read_results(folder)
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
    kinds = (("validation loss", final, ".4f", 1), (f"{answered}, points", exact, ".1f", 100))
    if pairs := [row for pair in results["pairs"] for kind in kinds for row in _pair(*pair, *kind)]:
        lines += ["", *markdown_table(["paired over seeds", "of", "mean ± sd", "95 % interval"], pairs)]
    seeds = map(str, results["seeds"])
    lines += [
        "",
        f"Of {results['test_rows']} rows that neither training nor tuning has seen, mean ± standard deviation over the "
        f"seeds {', '.join(seeds)}. Intervals: Student's t over the seeds, on the same rows. Of losses less is better, "
        f"of answers more. Seconds: arms take turns step by step, after all runs, on all cores. "
        + where_and_when(results),
    ]
    return "\n".join(lines)


def table_of(folder: Path) -> str:
    """The table of a folder of results: with costs, or of rows with verdicts."""
    results = read_results(folder)
    return rows_table(results) + "\n\n" + where_and_when(results) if is_by_rows(results) else experiment_table(folder)


def where_and_when(results: dict[str, Any]) -> str:
    """Date, commit and hardware of the runs, whenever their table is made."""
    hardware = ", ".join(f"{key} {value}" for key, value in results["hardware"].items())
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    tuned = f" (tuned at {results['tuning_commit']})" if results["tuning_commit"] not in ("", results["commit"]) else ""
    return f"Runs of {results['date']}, commit {results['commit']}{tuned}; {hardware}; {versions}."


def tuning_table(trials: Sequence[dict]) -> str:
    """Every trial; the best of an arm and key are marked, and those at an end of what was tried."""
    rows = []
    for one in trials:
        values = [other for other in trials if (other["arm"], other["key"]) == (one["arm"], one["key"])]
        losses = {other["values"][one["key"]]: math.inf if other["loss"] is None else other["loss"] for other in values}
        best = lowest(losses) == one["values"][one["key"]]
        at_end = best and len(losses) > 1 and one["values"][one["key"]] in (min(losses), max(losses))
        mark = "best, at an end of the grid" if at_end else "best" if best else ""
        loss = "diverged" if one["loss"] is None else f"{one['loss']:.4f}"
        rows.append([one["arm"], ", ".join(f"{k} {v}" for k, v in one["values"].items()), loss, mark])
    return "\n".join(markdown_table(["arm", "values", "loss on the tuning rows", ""], rows))


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """curves.png: losses over steps and over time, and bytes (paper, Figure 1); importance.png (Figure 4).

    Those that were drawn; why another was not is a line on stderr.
    """
    if is_by_rows(results):
        return draw_rows(results, folder)
    learned = {name: arm["runs"][0]["updates"] for name, arm in results["arms"].items() if arm["runs"][0]["updates"]}
    curves, importance = folder / "curves.png", folder / "importance.png"
    pictures = [curves] if drawn(curves, plot_arms, curves, results["arms"]) else []
    if learned and drawn(importance, plot_importance_panels, importance, learned):
        pictures.append(importance)
    return pictures


@command
def main(argv: Sequence[str]) -> int:
    parser = PlainParser(prog="python -m launch.experiments.tables", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="results; default: all in results/")
    parser.add_argument("--readme", type=Path, metavar="FILE.md", help="write the tables into it, between markers")
    args = parser.parse_args(argv)
    folders = args.folders or sorted(path.parent for path in RESULTS.glob(f"*/{SUMMARY}"))
    if args.readme and not args.readme.is_file():
        raise UsageError(f"--readme {args.readme}: no such file.")
    for folder in folders:
        if args.readme:
            require_place(args.readme, folder.name)
        with reading(folder, "a folder with the results of an experiment"):
            table = table_of(folder)
        print(table)
        if args.readme:
            insert_table(args.readme, folder.name, table)
            draw(read_results(folder), folder)
    return 0


if __name__ == "__main__":
    run_command(main)
