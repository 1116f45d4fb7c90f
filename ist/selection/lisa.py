"""LISA (Pan et al., NeurIPS 2024, arXiv 2403.17919): layers drawn uniformly, redrawn every K steps."""

import torch

from ist.sampler import seeded_generator
from ist.selection.keys import LisaConfig
from ist.selection.rule import Unlearned


class LisaSampler(Unlearned):
    """gamma layers (here N_u), uniformly without replacement, at steps 0, K, 2K, ...; they train until the next draw.

    LISA trains whole layers, and the embeddings and the head (all parameters outside the layers) at every
    step: that is `peft_method none`. With adapters it draws layers in the same way.

    K defaults to 20, as in the scripts of LMFlow, where LISA comes from. Moments of resting layers are kept.

    Args:
        n_layers: N_L.
        config: `trained_layers` and `lisa_interval` (K, in optimizer steps).
    """

    def __init__(self, n_layers: int, config: LisaConfig) -> None:
        self.config = config
        self.counts = config.counts(n_layers)

    def trained(self, step: int) -> list[int]:
        drawn_at = step - step % self.config.lisa_interval
        generator = seeded_generator(self.config.seed, drawn_at, "lisa")
        return sorted(torch.randperm(self.counts.n_layers, generator=generator)[: self.counts.trained].tolist())
