"""The importance scores: how layers are drawn from them (Eq. 6-7) and how losses change them (Eq. 9-10)."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ist.config import ISTConfig


def seeded_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone, e.g. (seed, step, purpose): the same on every rank and on resume."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class ImportanceSampler:
    """Scores of N_L layers, and every random draw of the method.

    Each draw comes from a generator seeded by (seed, step, purpose), so `scores` is the whole state: two samplers with
    equal config and scores draw equal layers at every step.

    In a training loop, at step t (counted from 0): if `due(t)`, draw `candidates(t)`, measure one loss per candidate
    set, call `update`; then train the layers of `trained(t)`.

    Args:
        n_layers: N_L, decoder layers that carry an adapter.
        config: hyper-parameters; `selection` "random" and "all" never update, so their scores stay zero.
    """

    MAX_REDRAWS = 100

    def __init__(self, n_layers: int, config: ISTConfig) -> None:
        self.config = config
        self.counts = config.counts(n_layers)
        self.scores = torch.zeros(n_layers, dtype=torch.float64)

    @property
    def importance(self) -> Tensor:
        """[N_L] higher is more important under either rule: the released score counts unimportance."""
        return -self.scores if self.config.score_rule == "released" else self.scores.clone()

    def due(self, step: int) -> bool:
        """Whether an importance update comes before optimizer step `step`."""
        return self.config.selection == "ist" and step > 0 and step % self.config.update_interval == 0

    def trained(self, step: int) -> list[int]:
        """S: the N_u layers trained at `step`, ascending (Eq. 7)."""
        return self._draw(self.importance, self.counts.trained, seeded_generator(self.config.seed, step, "trained"))

    def candidates(self, step: int) -> list[list[int]]:
        """S_c^1 .. S_c^{N_c}: for each candidate set the N_v layers that keep their full response, ascending.

        A set that repeats an earlier one is redrawn up to `MAX_REDRAWS` times; with few layers duplicates stay.
        """
        generator = seeded_generator(self.config.seed, step, "candidates")
        sets: list[list[int]] = []
        for _ in range(self.config.candidates):
            for _ in range(1 + self.MAX_REDRAWS):
                kept = self._draw_kept(generator)
                if kept not in sets:
                    break
            sets.append(kept)
        return sets

    def update(self, candidates: Sequence[Sequence[int]], losses: Sequence[float]) -> list[float]:
        """Move the scores by the rewards of the candidate sets, and return the rewards (Eq. 9-10).

        paper:    r_j = exp(-L_j) - mean_k exp(-L_k);  I_i += mu r_j for every i in S_c^j
        released: s_i += mu r_j p_i (1 - p_i) for every i outside S_c^j, p = sigmoid(s) from before the update

        Raises:
            FloatingPointError: a loss is not finite; the scores are left as they were.
        """
        loss = torch.tensor(losses, dtype=torch.float64)
        if not loss.isfinite().all():
            raise FloatingPointError(f"a candidate loss of the importance update is not finite: {list(losses)}")
        likelihood = torch.exp(-loss)
        rewards = likelihood - likelihood.mean()
        kept = torch.zeros(len(candidates), len(self.scores), dtype=torch.float64)
        for row, layers in zip(kept, candidates, strict=True):
            row[list(layers)] = 1
        if self.config.score_rule == "released":
            p = torch.sigmoid(self.scores)
            self.scores += self.config.score_lr * (rewards @ (1 - kept)) * p * (1 - p)
        else:
            self.scores += self.config.score_lr * (rewards @ kept)
        return rewards.tolist()

    def state_dict(self) -> dict:
        """JSON-ready and exact: Python writes floats so that they read back bit for bit."""
        return {"scores": self.scores.tolist()}

    def load_state_dict(self, state: dict) -> None:
        scores = torch.tensor(state["scores"], dtype=torch.float64)
        if scores.shape != self.scores.shape:
            raise ValueError(f"the state holds {len(scores)} scores, the model has {len(self.scores)} layers")
        self.scores = scores

    def _draw_kept(self, generator: torch.Generator) -> list[int]:
        if self.config.score_rule == "paper":
            return self._draw(self.scores, self.counts.kept, generator)
        suppressed = self._draw(self.scores, self.counts.n_layers - self.counts.kept, generator)
        return sorted(set(range(self.counts.n_layers)) - set(suppressed))

    def _draw(self, scores: Tensor, count: int, generator: torch.Generator) -> list[int]:
        """`count` layers, those with the largest keys. Everything in logarithms: sigmoid(-800) is 0, its log is not.

        paper:    p_i ~ U(0, sigmoid(I_i)), key log p_i (Eq. 6)
        released: multinomial without replacement on sigmoid(scores), as a race of exponential clocks
        """
        log_u = torch.log1p(-torch.rand(len(scores), dtype=torch.float64, generator=generator))
        keys = logsigmoid(scores) + (log_u if self.config.score_rule == "paper" else -torch.log(-log_u))
        return sorted(torch.argsort(keys, descending=True, stable=True)[:count].tolist())
