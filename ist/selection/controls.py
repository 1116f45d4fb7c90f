"""Controls for experiments: importance without information, and importance that is given."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from ist.config import check
from ist.sampler import ImportanceSampler, seeded_generator
from ist.selection.keys import OracleConfig


class Placebo(ImportanceSampler):
    """`placebo`: IST whose candidate losses are permuted before the scores move by them; under `score_rule expected`
    the effects, over the layers. The same dynamics, the same concentration of updates, nothing learnt."""

    _step = 0

    def due(self, step: int) -> bool:
        self._step = step
        return super().due(step)

    def _permuted(self, count: int) -> list[int]:
        return torch.randperm(count, generator=seeded_generator(self.config.seed, self._step, "placebo")).tolist()

    def update(self, candidates: Sequence[Sequence[int]], losses: Sequence[float]) -> list[float]:
        """The rewards are those of the permuted losses."""
        order = self._permuted(len(losses))
        return super().update(candidates, [losses[i] for i in order])

    def learn(self, effects: Tensor, standard_errors: Tensor | None) -> dict | None:
        order = self._permuted(len(effects))
        super().learn(effects[order], None if standard_errors is None else standard_errors[order])
        return {"permutation": order}


class Oracle(ImportanceSampler):
    """`oracle`: layers are drawn by scores that are given, and do not move. Their negatives are its opposite.

    Raises:
        ConfigError: the file of `oracle_scores` does not hold N_L finite numbers.
    """

    def __init__(self, n_layers: int, config: OracleConfig) -> None:
        super().__init__(n_layers, config)
        try:
            with open(config.oracle_scores, encoding="utf-8") as file:
                scores = json.load(file)
        except (OSError, ValueError) as error:
            check(False, "oracle_scores", "a JSON file", f"{config.oracle_scores} ({error})")
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        fits = numbers and len(scores) == n_layers and all(abs(score) < float("inf") for score in scores)
        allowed = f"a JSON list of {n_layers} finite numbers, a score for each layer"
        told = (
            f"{config.oracle_scores} with {len(scores)} entries" if isinstance(scores, list) else config.oracle_scores
        )
        check(fits, "oracle_scores", allowed, told)
        self.scores = torch.tensor(scores, dtype=torch.float64)
