"""Cheaper probes compared with the full one, at the updates of one run."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ist.benchmark.arms import reset, train
from ist.config import CHEAP
from ist.report.statistics import spearman
from ist.suppression import evaluation_mode
from ist.training.command_line import markdown_table
from ist.training.observer import Observer
from ist.tuner import PROBES, SparseTuner


class ProbeComparison(Observer):
    """At each update, the losses of every kind of probe on the candidates that are about to be compared.

    Attributes:
        updates: [{step, rewards: {probe: [N_L] sums of a layer's rewards}, seconds: {probe: seconds}}].
    """

    def __init__(self, rows: int, bf16: bool, say: Callable[[str], None]) -> None:
        self.rows, self.bf16, self.say, self.updates = rows, bf16, say, []

    def ready(self, tuner: SparseTuner, optimizer: torch.optim.Optimizer) -> None:
        self.tuner = tuner

    def first_rows(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The rows of a cheap probe: the first eighth of a full one's."""
        batch = next(iter(self.tuner.probe_batches(step)))
        yield {key: value[: max(1, self.rows // CHEAP)] for key, value in batch.items()}

    def before_step(self, step: int) -> None:
        tuner = self.tuner
        if not tuner.rule.due(step):
            return
        candidates, device = tuner.rule.candidates(step), next(tuner.model.parameters()).device
        kept = torch.tensor([[float(i in c) for i in range(tuner.layers.n_layers)] for c in candidates])
        record: dict[str, Any] = {"step": step, "rewards": {}, "seconds": {}}
        for name, probe in PROBES.items():
            batches = partial(tuner.probe_batches if name == "full" else self.first_rows, step)
            start = time.perf_counter()
            with evaluation_mode(tuner.model), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                sums = probe(tuner.model, tuner.layers, candidates, tuner.config.suppression, batches, tuner.loss)
            likelihood = torch.exp(-sums[:, 0] / sums[:, 1]).cpu()
            record["seconds"][name] = time.perf_counter() - start
            record["rewards"][name] = ((likelihood - likelihood.mean()).float() @ kept).tolist()
        self.updates.append(record)
        self.say(f"update at step {step}: {json.dumps(record['seconds'])}")


def probe_agreement(flags: dict, say: Callable[[str], None]) -> list[dict]:
    """At each update of a run of ist with the full probe: per-layer rewards of each probe, on identical candidates."""
    comparison = ProbeComparison(int(flags["per_device_train_batch_size"]), bool(flags.get("bf16")), say)
    with tempfile.TemporaryDirectory() as folder:
        reset()
        values = flags | {"output_dir": f"{folder}/run", "report_to": "none", "selection": "ist"}
        train(values, comparison)
    return comparison.updates


def rank_correlation(seen: list[dict], probe: str, draws: int = 2000) -> tuple[float, list[float]]:
    """(Spearman's rho of a probe's per-layer rewards with the full probe's, its 95 % interval by bootstrap of updates).

    Rho of each update, then the mean over updates.
    """
    rhos = [spearman(one["rewards"][probe], one["rewards"]["full"]) for one in seen]
    generator = np.random.default_rng(0)
    means = [np.mean(generator.choice(rhos, size=len(rhos))) for _ in range(draws)]
    return float(np.mean(rhos)), np.percentile(means, [2.5, 97.5]).tolist()


def probe_table(updates: list[dict]) -> str:
    """Markdown: rank correlation of each cheaper probe with the full one, and its share of the full one's seconds."""
    rows, full = [], sum(one["seconds"]["full"] for one in updates)
    for name in ("cheap", "gradient"):
        rho, (low, high) = rank_correlation(updates, name)
        share = sum(one["seconds"][name] for one in updates) / full
        rows.append([name, f"{rho:.2f}", f"{low:.2f} … {high:.2f}", f"{share:.3f}"])
    header = ["probe", f"Spearman's rho, mean of {len(updates)} updates", "95 % interval", "seconds / full probe's"]
    return "\n".join(markdown_table(header, rows))
