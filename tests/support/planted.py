"""Updates until importance finds three layers of a real model that have nothing to say, by rule; and their seconds.

    python tests/support/planted.py --output launch/results/planted.json

SmolLM2-135M trains with all layers but three, whose adapters stay at their zero response; so the loss does not depend
on these, and the others must matter. Then the model stays as it is, and each rule updates its scores 12 times, with 10
seeds of candidates and probe rows. Found: all three are among the lowest third of the scores, from that update on to
the last; by chance one update in 34 has them there. Their mean place among 30 layers, from the lowest score, is 15.5 by
chance. Rules take turns, update by update, so that their seconds compare.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from ist import probe
from ist.config import ISTConfig
from ist.sampler import ImportanceSampler, seeded_generator
from ist.suppression import evaluation_mode
from ist.training.command_line import markdown_table
from ist.training.observer import Observer
from ist.training.word_problems import arithmetic_rows
from support.suites import heading

UPDATES = 12
RULES = {
    "paper, full probe, mu 100": {"score_lr": 100},
    "paper, full probe, mu 100, uniform_candidates": {"score_lr": 100, "uniform_candidates": True},
    "paper, cheap probe, mu 100": {"score_lr": 100, "probe": "cheap"},
    "expected": {"score_rule": "expected"},
    "expected, without shrink": {"score_rule": "expected", "shrink": False},
}


def updates_until_found(ranks: Sequence[Sequence[int]], n_layers: int) -> int | None:
    """The first update, from 1, from which on all ranks are among the lowest third; None where the last is not.

    Args:
        ranks: of each update, the places of the planted layers among the scores, ascending, from 0.
    """
    there = [max(one) < n_layers // 3 for one in ranks]
    return len(there) - there[::-1].index(False) + 1 if there[-1] and False in there else 1 if there[-1] else None


class Planted(Observer):
    """Measures before the step that is named, which is the last; `found` has a line for each rule and seed."""

    def __init__(self, step: int, planted: Sequence[int], seeds: Sequence[int]) -> None:
        self.step, self.planted, self.seeds, self.found = step, planted, seeds, []

    def ready(self, tuner, optimizer) -> None:
        self.tuner = tuner

    def before_step(self, step: int) -> None:
        if step != self.step:
            return
        with evaluation_mode(self.tuner.model):
            for seed in self.seeds:
                self._measure(seed)
                print(f"seed {seed} measured", flush=True)

    def _measure(self, seed: int) -> None:
        n_layers = self.tuner.layers.n_layers
        rules = {name: ImportanceSampler(n_layers, ISTConfig(seed=seed, **keys)) for name, keys in RULES.items()}
        ranks: dict[str, list[list[int]]] = {name: [] for name in rules}
        seconds: dict[str, list[float]] = {name: [] for name in rules}
        for update in range(UPDATES):
            rows = list(self.tuner.probe_batches(f"{seed} {update}"))
            seen: list[probe.Effects] = []
            for name, rule in rules.items():
                start = time.perf_counter()
                learn(self.tuner, rule, update, rows, seen)
                seconds[name].append(time.perf_counter() - start)
                places = rule.scores.argsort(stable=True).tolist()
                ranks[name].append([places.index(i) for i in self.planted])
        for name, rule in rules.items():
            line = {"seed": seed, "rule": name, "updates": updates_until_found(ranks[name], n_layers)}
            took = None if name == "expected, without shrink" else statistics.median(seconds[name])  # another's effects
            line |= {"seconds": took, "places": ranks[name][-1]}
            self.found.append(line | {"scores": [round(score, 5) for score in rule.scores.tolist()]})


def learn(tuner, rule: ImportanceSampler, update: int, rows: list[dict], seen: list[probe.Effects]) -> None:
    """One importance update of a rule, as SparseTuner does it on one rank.

    Args:
        seen: the effects on these rows, once they are measured, for the rules that learn from them.
    """
    config, model, layers = rule.config, tuner.model, tuner.layers
    if config.score_rule == "expected":
        if not seen:
            found = probe.gate_derivatives(model, layers, range(layers.n_layers), rule.mean_gate, rows)
            seen.append(probe.effects(probe.effect_sums(found), config.suppression))
        rule.learn(seen[0].effects, seen[0].standard_errors)
        return
    measure: Callable = probe.one_by_one
    if config.probe == "cheap":  # an eighth of a global batch of 4: one row
        rows, measure = [{key: value[:1] for key, value in batch.items()} for batch in rows[:1]], probe.stacked
    candidates = rule.candidates(update)
    sums = measure(model, layers, candidates, config.suppression, lambda: rows)
    rule.update(candidates, (sums[:, 0] / sums[:, 1]).tolist())


def planted(model: str, steps: int, seeds: Sequence[int]) -> tuple[list[int], list[dict]]:
    """(the planted layers, [{seed, rule, updates, seconds, places, scores}])."""
    from transformers import AutoConfig

    import train_ist
    from support import reset_accelerate

    n_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    layers = sorted(torch.randperm(n_layers, generator=seeded_generator(0, 0, "planted"))[:3].tolist())
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.json"
        file.write_text(json.dumps(arithmetic_rows(1024, seed=1, held_out=False)))
        observer = Planted(steps, layers, seeds)
        values = {
            **{"model_name_or_path": model, "train_file": file, "output_dir": Path(name) / "run", "seed": 1},
            **{"selection": "fixed", "fixed_layers": ",".join(str(i) for i in range(n_layers) if i not in layers)},
            **{"lora_r": 8, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "max_steps": steps + 1},
            **{"warmup_steps": 5, "completion_only_loss": True, "report_to": "none", "dtype": "bfloat16"},
            "lr_scheduler_type": "constant_with_warmup",
        }
        reset_accelerate()
        train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))], observer)
    return layers, observer.found


def as_table(found: list[dict], layers: Sequence[int]) -> list[str]:
    full = statistics.median(line["seconds"] for line in found if line["rule"] == next(iter(RULES)))
    rows = []
    for rule in RULES:
        lines = [line for line in found if line["rule"] == rule]
        updates = sorted(line["updates"] for line in lines if line["updates"] is not None)
        spread = f"{statistics.median(updates):g} ({updates[0]} to {updates[-1]})" if updates else ""
        took = [line["seconds"] for line in lines if line["seconds"] is not None]
        seconds = [f"{statistics.median(took):.2f}", f"{statistics.median(took) / full:.2f}"] if took else ["", ""]
        places = [1 + statistics.mean(line["places"]) for line in lines]
        place = f"{statistics.mean(places):.1f} ({min(places):.1f} to {max(places):.1f})"
        cells = [f"{len(updates)} of {len(lines)}", spread, place, *seconds]
        rows.append([rule, *cells])
    header = [
        "rule",
        "seeds that found them",
        "updates, median (range)",
        "their mean place at the end",
        "seconds an update",
    ]
    return [f"Planted: layers {', '.join(map(str, layers))} of 30.", "", *markdown_table([*header, "/ full"], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20, help="of training, before measuring")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10)])
    parser.add_argument("--output", type=Path, help="a .json file; the table goes beside it as .md")
    args = parser.parse_args()
    layers, found = planted(args.model_name_or_path, args.steps, args.seeds)
    table = as_table(found, layers)
    print(*table, sep="\n")
    if args.output:
        threads = torch.get_num_threads()
        command = (
            f"`python tests/support/planted.py {' '.join(sys.argv[1:])}`, {os.cpu_count()} CPU cores, {threads} threads"
        )
        args.output.write_text(json.dumps({"command": command, "planted": layers, "found": found}, indent=1) + "\n")
        text = [*heading("Layers with nothing to say, found", command), *table]
        args.output.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
