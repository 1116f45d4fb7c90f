"""What importance scores measure: their reliability and what they predict, on a model that trains; and without effect.

    python tests/support/importance.py reliability --model_name_or_path models/SmolLM2-135M-Instruct \
        --steps 20 80 300 --seeds 1 2 3 --output launch/results/reliability.json
    python tests/support/importance.py noise --output launch/results/noise.json

reliability: a run with random draws; every T_c steps the probes are measured beside it, which changes nothing in it. At
the steps that are named, on 48 held-out rows: the layers' effects by the derivative at the mean gate and at gate 1, the
scores that two independent series of full, and of cheap, probes have added up by then (paper rule, candidates drawn
uniformly), and exp(-L) of random candidate sets. The table has by estimator
  halves      correlation over layers of two halves: of the rows (derivatives), of the two series (probes)
  predicts    correlation over the sets of exp(-L) with the sum of the scores of the layers that a set keeps
each the mean over seeds with its 95 % interval (Student's, of Fisher's z). The files are written after each seed;
the same command, broken off, goes on with the seeds that are missing.

noise: layers without any effect. Derivatives of each row are permuted over the layers (expected), or candidate losses
are independent of the sets (paper); effective layers after 300 updates of 10 steps, 30 layers, 10 seeds.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from ist import probe
from ist.config import ISTConfig
from ist.instruments import effective_layers
from ist.sampler import ImportanceSampler, seeded_generator
from ist.selection import make_rule
from ist.suppression import evaluation_mode
from ist.training.command_line import markdown_table
from ist.training.observer import Observer
from ist.training.word_problems import arithmetic_rows
from support.suites import heading

HELD_OUT, SETS, ROWS = 48, 24, 4
ESTIMATORS = ("full", "cheap", "gradient at 1", "mean gate")


def correlation(one: Tensor, two: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1].item()


class Measurement(Observer):
    """Measures beside a run; `found` has a line for each of `steps` and estimator."""

    def __init__(self, steps: Sequence[int], seed: int, held_out: list[dict]) -> None:
        self.steps, self.seed, self.held_out, self.found = steps, seed, held_out, []

    def ready(self, tuner, optimizer) -> None:
        self.tuner, n_layers = tuner, tuner.layers.n_layers
        # Two series of each probe: other candidates and other rows, the same model.
        self.samplers = {
            (kind, half): ImportanceSampler(n_layers, ISTConfig(uniform_candidates=True, seed=2 * self.seed + half))
            for kind in ("full", "cheap")
            for half in (0, 1)
        }

    def before_step(self, step: int) -> None:
        interval = self.tuner.config.update_interval
        if step > 0 and step % interval == 0:
            for (kind, half), sampler in self.samplers.items():
                self._update(kind, half, sampler, step)
        if step in self.steps:
            self._measure(step)

    def _update(self, kind: str, half: int, sampler: ImportanceSampler, step: int) -> None:
        rows = list(self.tuner.probe_batches(f"{step} {half}"))
        if kind == "cheap":  # an eighth of a global batch of 4: one row, its last tokens left whole
            rows = [{key: value[:1] for key, value in batch.items()} for batch in rows[:1]]
        measure = {"full": probe.one_by_one, "cheap": probe.stacked}[kind]
        candidates = sampler.candidates(step)
        with evaluation_mode(self.tuner.model):
            sums = measure(self.tuner.model, self.tuner.layers, candidates, sampler.config.suppression, lambda: rows)
        sampler.update(candidates, (sums[:, 0] / sums[:, 1]).tolist())

    def _measure(self, step: int) -> None:
        tuner, beta = self.tuner, self.tuner.config.suppression
        n_layers, everything = tuner.layers.n_layers, range(tuner.layers.n_layers)
        generator = seeded_generator(self.seed, step, "sets")
        sets = [sorted(torch.randperm(n_layers, generator=generator)[: n_layers // 2].tolist()) for _ in range(SETS)]
        with evaluation_mode(tuner.model):
            sums = probe.one_by_one(tuner.model, tuner.layers, sets, beta, lambda: self.held_out)
            likelihood = torch.exp(-sums[:, 0] / sums[:, 1])
            mean_gate = 0.5 + beta * 0.5
            scores = {}
            for name, gate in (("gradient at 1", 1.0), ("mean gate", mean_gate)):
                found = probe.gate_derivatives(tuner.model, tuner.layers, everything, gate, self.held_out)
                halves = [-found.by_gate[half::2].sum(dim=0) for half in (0, 1)]
                scores[name] = halves[0] + halves[1], correlation(*halves)
        for kind in ("full", "cheap"):
            one, two = (self.samplers[kind, half].scores for half in (0, 1))
            scores[kind] = one, correlation(one, two)
        for name in ESTIMATORS:
            values, halves = scores[name]
            kept = torch.stack([values[kept].sum() for kept in sets])
            line = {"step": step, "estimator": name, "halves": halves, "predicts": correlation(kept, likelihood)}
            self.found.append({"seed": self.seed, **line})


def reliability(model: str, steps: Sequence[int], seeds: Sequence[int]) -> Iterator[list[dict]]:
    """[{seed, step, estimator, halves, predicts}] of each seed."""
    import train_ist
    from ist.training.data import collate
    from ist.training.encoding import encode_rows, load_tokenizer
    from ist.training.reading import load_rows
    from support import reset_accelerate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = arithmetic_rows(1024 + HELD_OUT, seed=1, held_out=False)
        (folder / "rows.json").write_text(json.dumps(rows[:1024]))
        (folder / "held_out.json").write_text(json.dumps(rows[1024:]))
        tokenizer = load_tokenizer("model_name_or_path", model)
        read = load_rows("train_file", [str(folder / "held_out.json")])
        encoded, _ = encode_rows(read, "train_file", "alpaca", tokenizer, 1024, True)
        batches = [
            collate(encoded["input_ids"][i : i + 8], encoded["labels"][i : i + 8], pad_token_id=0)
            for i in range(0, len(encoded["input_ids"]), 8)
        ]
        for seed in seeds:
            observer = Measurement(steps, seed, batches)
            values = {
                **{"model_name_or_path": model, "train_file": folder / "rows.json", "output_dir": folder / f"{seed}"},
                **{"selection": "random", "trained_layers": 0.25, "lora_r": 8, "learning_rate": 2e-3, "seed": seed},
                **{"per_device_train_batch_size": ROWS, "max_steps": max(steps) + 1, "warmup_steps": 5},
                **{
                    "completion_only_loss": True,
                    "report_to": "none",
                    "dtype": "float32",
                    "lr_scheduler_type": "constant_with_warmup",
                },
            }
            reset_accelerate()
            train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))], observer)
            yield observer.found


def interval(values: Sequence[float], correlations: bool = False) -> str:
    """The mean with its 95 % interval; of correlations by Fisher's z, which keeps it within -1 and 1."""
    sizes = np.arctanh(np.clip(values, -0.999999, 0.999999)) if correlations else np.array(values)
    back = np.tanh if correlations else float
    mean, text = sizes.mean(), "{:.2f}"
    if len(values) < 2:
        return text.format(back(mean))
    margin = student.ppf(0.975, len(values) - 1) * sizes.std(ddof=1) / len(values) ** 0.5
    return f"{back(mean):.2f} ({back(mean - margin):.2f} to {back(mean + margin):.2f})"


def reliability_table(found: list[dict]) -> list[str]:
    rows = []
    for step in sorted({line["step"] for line in found}):
        for name in ESTIMATORS:
            lines = [line for line in found if line["step"] == step and line["estimator"] == name]
            rows.append(
                [str(step), name, *(interval([line[key] for line in lines], True) for key in ("halves", "predicts"))]
            )
    return markdown_table(["step", "estimator", "halves", "predicts exp(-L)"], rows)


def effective_without_effect(config: ISTConfig, seed: int, updates: int = 300, n_layers: int = 30) -> float:
    """Effective layers where measurements are noise: rows with derivatives each in an order of its own, or losses."""
    generator, rule = torch.Generator().manual_seed(seed), make_rule(n_layers, config)
    size = 0.02 * torch.randn(n_layers, generator=generator, dtype=torch.float64)
    counts = torch.zeros(n_layers, dtype=torch.int64)
    for update in range(updates):
        if config.score_rule == "expected":
            order = torch.stack([torch.randperm(n_layers, generator=generator) for _ in range(8)])
            tokens = torch.full((8,), 10.0).double()
            rows = probe.GateDerivatives(torch.full((8,), 5.0).double(), 10 * size[order], tokens)
            seen = probe.effects(probe.effect_sums(rows), config.suppression)
            rule.learn(seen.effects, seen.standard_errors)
        elif rule.due(10 * (update + 1)):  # not of random draws
            # The standard deviation of exp(-L) over candidate sets is that of runs on word problems, 0.0075.
            losses = 0.5 + 0.0075 / np.exp(-0.5) * torch.randn(config.candidates, generator=generator).double()
            rule.update(rule.candidates(update), losses.tolist())
        for step in range(10 * update, 10 * update + 10):
            counts[rule.trained(step)] += 1
    return effective_layers(counts.tolist())


ARMS = {
    "expected": {"score_rule": "expected"},
    "expected, without shrink": {"score_rule": "expected", "shrink": False},
    "paper, mu 10": {},
    "paper, mu 100": {"score_lr": 100},
    "paper, mu 100, score_decay 0.95": {"score_lr": 100, "score_decay": 0.95},
    "paper, reward_scale sd, score_decay 0.95": {"reward_scale": "sd", "score_decay": 0.95},
    "random": {"selection": "random"},
}


def noise(seeds: Sequence[int]) -> dict[str, list[float]]:
    """{arm: effective layers by seed}."""
    return {
        name: [effective_without_effect(ISTConfig(seed=seed, **keys), seed) for seed in seeds]
        for name, keys in ARMS.items()
    }


def noise_table(found: dict[str, list[float]]) -> list[str]:
    rows = [[name, interval(values), f"{min(values):.1f}"] for name, values in found.items()]
    return markdown_table(["scores", "effective layers of 30, after 300 updates", "lowest seed"], rows)


def main() -> None:
    torch.set_num_threads(1 if "noise" in sys.argv else torch.get_num_threads())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reliability", "noise"])
    parser.add_argument("--model_name_or_path", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 80, 300])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 2 3; noise: 0 to 9")
    parser.add_argument("--output", type=Path, help="a .json file; the table goes beside it as .md")
    args = parser.parse_args()
    command = f"`python tests/support/importance.py {' '.join(sys.argv[1:])}`, {os.cpu_count()} CPU cores"
    if args.what == "noise":
        found = noise(args.seeds or range(10))
        write(args.output, command, found, "Scores without any effect to measure", noise_table(found))
        return
    saved = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    found = saved["found"] if saved.get("command") == command else []
    missing = [seed for seed in args.seeds or [1, 2, 3] if not any(line["seed"] == seed for line in found)]
    for lines in reliability(args.model_name_or_path, args.steps, missing):
        found += lines
        title = "Reliability of importance scores, and what they predict"
        write(args.output, command, found, title, reliability_table(found))


def write(output: Path | None, command: str, found: list | dict, title: str, table: list[str]) -> None:
    print(*table, sep="\n", flush=True)
    if output:
        output.write_text(json.dumps({"command": command, "found": found}, indent=1) + "\n")
        output.with_suffix(".md").write_text("\n".join([*heading(title, command), *table]) + "\n")


if __name__ == "__main__":
    main()
