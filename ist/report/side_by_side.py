"""Runs side by side: the numbers of their arms, and differences from the first arm in pairs of seeds."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ist.instruments import effective_layers
from ist.report.arms import SAME_TASK, Arm, Run, cell, differing_settings
from ist.report.statistics import paired
from ist.training.command_line import markdown_table
from ist.training.files import reading
from ist.training.record import CONTENT

LAST = 0.1  # of the steps, whose mean is the training loss at the end: that of one step depends on its rows


class Measure(NamedTuple):
    title: str
    digits: str
    scale: float = 1
    paired: bool = True
    relative: bool = False


MEASURES = {
    "training_loss": Measure("training loss", ".4f"),
    "validation_loss": Measure("validation loss", ".4f"),
    "best_validation_loss": Measure("best validation loss", ".4f"),
    "step_seconds": Measure("seconds per step", ".3g", relative=True),
    "tokens_per_second": Measure("tokens per second", ".0f", paired=False),
    "peak_memory_bytes": Measure("peak memory, MB", ".0f", 1e-6, relative=True),
    "effective_layers": Measure("effective layers", ".1f", paired=False),  # the last: tables say of how many
}


def measures(run: Run, until: float = math.inf, validated: Iterable[float] | None = None) -> dict[str, float | None]:
    """The numbers of a run; None of what its files do not have.

    training_loss is the mean over the logged steps of the last tenth; validation losses are those after step 0;
    step_seconds the mean of all steps, importance updates included, validations and saves not.

    Args:
        until: steps up to this one alone.
        validated: validations of these steps alone.
    """
    found: dict[str, float | None] = dict.fromkeys(MEASURES)
    steps, losses = (values[run.series("loss")[0] <= until] for values in run.series("loss"))
    if steps.size:
        found["training_loss"] = float(losses[steps > (1 - LAST) * steps[-1]].mean())
    at, losses = run.series("validation_loss")
    shown = (at > 0) & (at <= until) & (True if validated is None else np.isin(at, list(validated)))
    if shown.any():
        found["validation_loss"] = float(losses[shown][-1])
        found["best_validation_loss"] = float(losses[shown].min())
    at, seconds = (values[run.seconds()[0] <= until] for values in run.seconds())
    if at.size:
        found["step_seconds"] = float(seconds[-1] / at[-1])
        tokens_at, tokens = run.series("tokens")
        if (there := tokens[tokens_at == at[-1]]).size and seconds[-1]:
            found["tokens_per_second"] = float(there[0] / seconds[-1])
    at, memory = run.series("peak_memory_bytes")
    if (memory := memory[at <= until]).size:
        found["peak_memory_bytes"] = float(memory.max())
    if any(counts := run.record.get("trained_counts") or []):
        found["effective_layers"] = float(effective_layers(counts))
    return found


def like_noise(run: Run) -> bool | None:
    """Whether what its importance updates measured is not distinguishable from noise (`ist.instruments.remarks`)."""
    last = run.updates[-1] if run.updates else {}
    mean, error = last.get("mean_correlation"), last.get("mean_correlation_error")
    return None if mean is None or error is None else mean < 2 * error


def _pair(one: Run, two: Run) -> tuple[float | None, list[dict[str, float | None]]]:
    """(the step up to which two runs are compared, None for their ends; the numbers of both).

    Two finished runs are compared at their ends, others at the last steps that both have.
    """
    if one.finished and two.finished:
        return None, [measures(one), measures(two)]
    until = min(one.last_step, two.last_step)
    validated = set(one.series("validation_loss")[0]) & set(two.series("validation_loss")[0])
    return until, [measures(run, until, validated) for run in (one, two)]


def _differences(arm: Arm, reference: Arm) -> list[dict[str, Any]]:
    """{arm, measure, mean, sd, interval, seeds, relative, until} of each measure, in pairs of runs of a seed."""
    others = {run.seed: run for run in reference.counted}
    pairs = {run.seed: _pair(run, others[run.seed]) for run in arm.counted if run.seed in others}
    found = []
    for name, measure in MEASURES.items():
        known = {
            seed: [numbers[name] for numbers in both]
            for seed, (_, both) in pairs.items()
            if all(numbers[name] is not None for numbers in both)
        }
        if not known or not measure.paired:
            continue
        one, two = zip(*known.values(), strict=True)
        base = statistics.mean(two)
        difference = paired(one, two)
        found.append(
            {
                **{"arm": arm.name, "reference": reference.name, "measure": name},
                **{**difference, "seeds": list(known)},
                "relative": difference["mean"] / base if base else None,
                "until": {str(seed): pairs[seed][0] for seed in known if pairs[seed][0] is not None},
            }
        )
    return found


def side_by_side(arms: Sequence[Arm]) -> dict[str, Any]:
    """The comparison of two or more runs, JSON-ready: {reference, arms, differences, settings, runs, notes}.

    Raises:
        ReadError: a file is damaged.
    """
    rows, runs = [], []
    for arm in arms:
        measured: dict[Path, dict[str, float | None]] = {}
        judged: dict[Path, bool | None] = {}
        for run in arm.runs:
            with reading(run.folder, "a run that can be compared"):
                measured[run.folder], judged[run.folder] = measures(run), like_noise(run)
        numbers = [measured[run.folder] for run in arm.counted]
        noise = [one for run in arm.counted if (one := judged[run.folder]) is not None]
        rows.append(
            {
                **{"arm": arm.name, "control": arm.control, "runs": len(arm.runs)},
                "finished": sum(run.finished for run in arm.runs),
                "seeds": [run.seed for run in arm.counted],
                "steps": [run.last_step for run in arm.counted],
                "numbers": {name: mean_sd([one[name] for one in numbers]) for name in MEASURES},
                "like_noise": [sum(noise), len(noise)],
                "layers": max((len(run.record.get("trained_counts") or ()) for run in arm.counted), default=0),
            }
        )
        runs += [
            {
                **{"arm": arm.name, "seed": run.seed, "folder": str(run.folder), "status": run.record["status"]},
                **{"error": run.record.get("error"), "step": run.last_step, "max_steps": run.record.get("max_steps")},
                **{"counted": run in arm.counted, "left_out": run.left_out, "numbers": measured[run.folder]},
            }
            for run in arm.runs
        ]
    return {
        "reference": arms[0].name,
        "arms": rows,
        "differences": [one for arm in arms[1:] for one in _differences(arm, arms[0])],
        "settings": differing_settings(arms),
        "runs": runs,
        "notes": _notes(arms),
    }


def mean_sd(values: Sequence[float | None]) -> dict[str, float | None]:
    """{mean, sd} of what is known; sd is None of one value."""
    known = [value for value in values if value is not None]
    sd = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.mean(known) if known else None, "sd": sd}


def _notes(arms: Sequence[Arm]) -> list[str]:
    """What keeps numbers from being compared, and what is missing, a sentence each."""
    runs, notes = [run for arm in arms for run in arm.runs], []
    for key in SAME_TASK:
        if len({str(run.settings[key]) for run in runs if key in run.settings}) > 1:
            notes.append(f"Arms differ in {CONTENT[key]} ({key}): their losses are not of the same task.")
    if len(arms) == 1:
        notes.append("One arm: its runs differ in nothing but the seed, so there is nothing to compare it with.")
    facts = [run.facts() for run in runs]
    for key in dict.fromkeys(key for one in facts for key in one):
        values = list(dict.fromkeys(str(one.get(key, "unknown")) for one in facts))
        if len(values) > 1:
            effect = "" if key == "commit" else ": seconds and memory may differ by that"
            notes.append(f"Runs differ in {key} ({', '.join(values)}){effect}.")
    notes += [note for arm in arms for note in _notes_of(arm, arms[0])]
    ends = {run.last_step for arm in arms for run in arm.counted}
    if len(ends) > 1:
        notes.append(f"Runs end at different steps: {', '.join(str(end) for end in sorted(ends))}.")
    for what, has in (
        ("validation losses after step 0", lambda run: (run.series("validation_loss")[0] > 0).any()),
        ("importance updates", lambda run: run.updates),
        ("seconds", lambda run: run.seconds()[0].size),
        ("peak memory", lambda run: run.series("peak_memory_bytes")[0].size),
    ):
        if without := [arm.name for arm in arms if not any(map(has, arm.runs))]:
            notes.append(f"No {what} in {'any run' if len(without) == len(arms) else '; '.join(without)}.")
    damaged = "lines of metrics.jsonl left out, as they are damaged or not whole"
    notes += [f"{run.folder}: {damaged} ({run.left_out})." for run in runs if run.left_out]
    return notes


def _notes_of(arm: Arm, reference: Arm) -> list[str]:
    notes = []
    if not arm.counted:
        notes.append(f"{arm.name}: no run has a logged step.")
    elif not arm.counted[0].finished:
        notes.append(f"{arm.name}: no run is finished; its numbers are those of its last steps so far.")
    elif left := len(arm.runs) - len(arm.counted):
        notes.append(
            f"{arm.name}: {left} of {len(arm.runs)} runs unfinished or without a logged step, and not in its numbers."
        )
    shared = {run.seed for run in arm.counted} & {run.seed for run in reference.counted}
    if arm.counted and reference.counted and not shared:
        notes.append(f"{arm.name} and {reference.name} have no seed in common: no differences in pairs.")
    return notes + ([f"{arm.name}: {arm.control}."] if arm.control else [])


def _number(value: float | None, name: str, sign: str = "") -> str:
    return "" if value is None else f"{MEASURES[name].scale * value:{sign}{MEASURES[name].digits}}"


def side_by_side_tables(comparison: dict[str, Any]) -> str:
    """Markdown, of `side_by_side` alone: arms, differences in pairs, settings in which arms differ, runs, notes."""
    arms, runs, reference = comparison["arms"], comparison["runs"], comparison["reference"]
    rows = []
    for arm in arms:
        cells = [_number(arm["numbers"][name]["mean"], name) for name in MEASURES]
        spreads = [_number(arm["numbers"][name]["sd"], name) for name in MEASURES]
        cells = [f"{mean} ± {sd}" if sd else mean for mean, sd in zip(cells, spreads, strict=True)]
        cells[-1] += f" of {arm['layers']}" if cells[-1] else ""
        steps = sorted(set(arm["steps"]))
        noise, judged = arm["like_noise"]
        rows.append(
            [
                arm["arm"] + (" (control)" if arm["control"] else ""),
                f"{arm['finished']} of {arm['runs']}",
                ", ".join(map(str, arm["seeds"])),
                " to ".join(map(str, dict.fromkeys([*steps[:1], *steps[-1:]]))),
                *cells,
                f"{noise} of {judged}" if judged else "",
            ]
        )
    titles = [measure.title for measure in MEASURES.values()]
    header = ["arm", "finished", "seeds", "steps", *titles, "scores like noise"]
    lines = ["## Arms", "", *_table(header, rows)]
    lines += ["", "Mean ± standard deviation over seeds. The training loss is the mean of the last tenth of the steps."]
    if len(arms) > 1:
        lines += ["", f"## Differences from {reference}", "", *_difference_lines(comparison)]
    if comparison["settings"]:
        names = [arm["arm"] for arm in arms]
        settings = [[key, *(cell(key, value) for value in values)] for key, values in comparison["settings"].items()]
        lines += ["", "## Settings in which arms differ", "", *_table(["key", *names], settings)]
    rows = []
    for run in runs:
        status = run["status"] + (f": {run['error']}" if run["error"] else "")
        steps = f"{run['step']} of {run['max_steps']}" if run["max_steps"] else str(run["step"])
        numbers = [_number(run["numbers"][name], name) for name in MEASURES]
        rows.append([run["arm"], str(run["seed"]), status, steps, *numbers, run["folder"]])
    header = ["arm", "seed", "status", "steps", *titles, "folder"]
    lines += ["", "## Runs", "", *_table(header, rows)]
    if comparison["notes"]:
        lines += ["", *(f"- {' '.join(note.split())}" for note in comparison["notes"])]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose cells may hold anything; without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = ([" ".join(row[i].split()).replace("|", "\\|") for i in kept] for row in (header, *rows))
    return markdown_table(next(lines), lines)


def _difference_lines(comparison: dict[str, Any]) -> list[str]:
    """A row for each arm; one more where a measure is of fewer pairs, as runs without validation are."""
    rows: dict[tuple, dict[str, dict]] = {}
    for one in comparison["differences"]:
        until = sorted({int(step) for step in one["until"].values()})
        seeds = ", ".join(map(str, one["seeds"])) + ("" if one["interval"] else " (one seed: no interval)")
        rows.setdefault((one["arm"], seeds, ", ".join(map(str, until)) or "end"), {})[one["measure"]] = one
    if not rows:
        return ["No two runs of the same seed have a number in common."]
    names = [name for name, measure in MEASURES.items() if measure.paired]
    cells = [
        [arm, *(_difference(name, found.get(name)) for name in names), seeds, until]
        for (arm, seeds, until), found in rows.items()
    ]
    header = [f"arm − {comparison['reference']}", *(MEASURES[name].title for name in names), "seeds", "at step"]
    return [
        *_table(header, cells),
        "",
        "Mean difference in pairs of runs of the same seed [95 % interval, Student's t over seeds]. Runs that are not "
        "finished are compared up to the last step that both have.",
    ]


def _difference(name: str, one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    ends = ", ".join(_number(end, name, "+") for end in one["interval"] or ())
    share = f" ({100 * one['relative']:+.1f} %)" if MEASURES[name].relative and one["relative"] is not None else ""
    return _number(one["mean"], name, "+") + share + (f" [{ends}]" if ends else "")
