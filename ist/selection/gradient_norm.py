"""Layers by the gradient norms that they had (as GRASS, arXiv 2604.07808): no probes, a moving mean, a softmax draw."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ist.sampler import seeded_generator
from ist.selection.keys import GradientNormConfig


class GradientNorm:
    """`gradient_norm`: N_u layers without replacement, by softmax of the moving means of their gradient norms.

    A layer that has not trained yet has the largest mean of all, so that each is seen early. Means are standardised
    over layers: the softmax does not depend on the scale of the loss.

    Args:
        n_layers: N_L.
        config: `gradient_norm_decay`, `trained_layers`.

    Attributes:
        means: [N_L] float64; NaN before a layer has trained.
    """

    plans = False

    def __init__(self, n_layers: int, config: GradientNormConfig) -> None:
        self.config = config
        self.counts = config.counts(n_layers)
        self.means = torch.full((n_layers,), float("nan"), dtype=torch.float64)

    def due(self, step: int) -> bool:
        return False

    def observe(self, trained: Sequence[int], norms: Tensor) -> None:
        """The gradient norms [len(trained)] of the layers of a step."""
        index, decay = torch.tensor(list(trained), dtype=torch.long), self.config.gradient_norm_decay
        norms, before = norms.double().cpu(), self.means[index]
        self.means[index] = torch.where(before.isnan(), norms, decay * before + (1 - decay) * norms)

    def trained(self, step: int) -> list[int]:
        seen = self.means[~self.means.isnan()]
        scores = torch.zeros_like(self.means)
        if len(seen) > 1 and (spread := seen.std().item()) > 0:
            scores = ((self.means - seen.mean()) / spread).nan_to_num(nan=((seen.max() - seen.mean()) / spread).item())
        uniform = torch.rand(len(scores), dtype=torch.float64, generator=self._generator(step))
        keys = scores - torch.log(-torch.log(uniform))  # Gumbel noise: the largest are a draw without replacement
        return sorted(torch.argsort(keys, descending=True, stable=True)[: self.counts.trained].tolist())

    def _generator(self, step: int) -> torch.Generator:
        return seeded_generator(self.config.seed, step, "trained")

    def state_dict(self) -> dict:
        return {"means": [None if mean != mean else mean for mean in self.means.tolist()]}

    def load_state_dict(self, state: dict) -> None:
        means = [float("nan") if mean is None else mean for mean in state["means"]]
        if len(means) != len(self.means):
            raise ValueError(f"the state holds {len(means)} means, the model has {len(self.means)} layers")
        self.means = torch.tensor(means, dtype=torch.float64)
