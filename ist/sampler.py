"""The importance scores: how layers are drawn from them (Eq. 6-7) and how losses change them (Eq. 9-10)."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

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

    Attributes:
        total_steps: of the run, for `anneal_to_fixed`.
    """

    MAX_REDRAWS = 100
    plans = True

    def __init__(self, n_layers: int, config: ISTConfig) -> None:
        self.config = config
        self.counts = config.counts(n_layers)
        self.scores = torch.zeros(n_layers, dtype=torch.float64)
        self.total_steps: int | None = None
        self._drawn: dict[int, list[int]] = {}  # first step of an interval of `draw_interval` steps -> its layers

    @property
    def importance(self) -> Tensor:
        """[N_L] higher is more important under either rule: the released score counts unimportance."""
        return -self.scores if self.config.score_rule == "released" else self.scores.clone()

    def due(self, step: int) -> bool:
        """Whether an importance update comes before optimizer step `step`."""
        learns = self.config.selection in ("ist", "placebo") and not self._annealed(step)
        return learns and step > 0 and step % self.config.update_interval == 0

    @property
    def probed(self) -> list[int]:
        """The layers whose responses an update measures."""
        return list(range(self.counts.n_layers))

    @property
    def mean_gate(self) -> float:
        """What a layer's response is multiplied by in the mean over uniform candidate sets."""
        kept = self.counts.kept / self.counts.n_layers
        return kept + self.config.suppression * (1 - kept)

    def trained(self, step: int) -> list[int]:
        """S: the N_u layers trained at `step`, ascending (Eq. 7)."""
        interval = self.config.draw_interval
        start = step // interval * interval
        if interval > 1 and start in self._drawn:
            return self._drawn[start]
        generator = seeded_generator(self.config.seed, start, "trained")
        if self._annealed(step):
            # Ties, such as those of scores that never moved, are broken as a draw would.
            keys = torch.stack([self.importance, self._keys(torch.zeros_like(self.scores), generator)])
            order = sorted(range(self.counts.n_layers), key=lambda i: tuple(keys[:, i].tolist()), reverse=True)
            return sorted(order[: self.counts.trained])
        layers = self._draw_trained(generator)
        if interval > 1:
            # Scores may move before the interval ends; its layers stay. Those of the past are forgotten.
            past = start - interval - self.config.update_interval
            self._drawn = {first: kept for first, kept in self._drawn.items() if first >= past} | {start: layers}
        return layers

    def _draw_trained(self, generator: torch.Generator) -> list[int]:
        count, n_layers = self.counts.trained, self.counts.n_layers
        if self.config.draw == "independent":
            return self._draw(self.importance, count, generator)
        keys = self._keys(self.importance, generator)
        edges = [band * n_layers // count for band in range(count + 1)]
        return [first + int(keys[first:end].argmax()) for first, end in pairwise(edges)]

    def _annealed(self, step: int) -> bool:
        """Whether the best layers stay from now on."""
        share = self.config.anneal_to_fixed
        if share is None:
            return False
        if self.total_steps is None:
            raise ValueError("anneal_to_fixed is a share of the run: set the rule's total_steps")
        return step >= share * self.total_steps

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
        if self.config.reward_scale == "sd":
            rewards = rewards / likelihood.std().clamp_min(torch.finfo(torch.float64).tiny)
        kept = torch.zeros(len(candidates), len(self.scores), dtype=torch.float64)
        for row, layers in zip(kept, candidates, strict=True):
            row[list(layers)] = 1
        if self.config.score_rule == "released":
            p = torch.sigmoid(self.scores)
            self._move(self.config.score_lr * (rewards @ (1 - kept)) * p * (1 - p))
        else:
            self._move(self.config.score_lr * (rewards @ kept))
        return rewards.tolist()

    def learn(self, effects: Tensor, standard_errors: Tensor | None) -> dict | None:
        """Move the scores by the mean of Eq. 9-10 over uniform candidate sets, none of which is drawn.

        With exp(-L_j) = const + sum over kept i of a_i, and p = N_v / N_L, the mean of sum_j r_j [i in S_c^j] is
        (N_c - 1) p (1 - p) N_L / (N_L - 1) (a_i - mean a). reward_scale sd divides by the standard deviation of
        exp(-L_j) over sets; shrink multiplies by the positive-part James-Stein factor, 1 - (N_L - 3) / sum (a / se)^2.

        Args:
            effects: [N_L] a_i - mean a, float64.
            standard_errors: [N_L] theirs; None where there was one row.
        """
        n_layers, p = self.counts.n_layers, self.counts.kept / self.counts.n_layers
        spread = p * (1 - p) * n_layers / max(1, n_layers - 1)
        moved = effects * (self.config.candidates - 1) * spread
        if self.config.reward_scale == "sd":
            moved = moved / (spread * effects.square().sum()).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        if self.config.shrink:
            moved = moved * shrinkage(effects, standard_errors)
        self._move(self.config.score_lr * moved)
        return None

    def _move(self, by: Tensor) -> None:
        self.scores = self.config.score_decay * self.scores + by

    def state_dict(self) -> dict:
        """JSON-ready and exact: Python writes floats so that they read back bit for bit."""
        drawn = {str(first): layers for first, layers in self._drawn.items()}
        return {"scores": self.scores.tolist()} | ({"drawn": drawn} if drawn else {})

    def load_state_dict(self, state: dict) -> None:
        scores = torch.tensor(state["scores"], dtype=torch.float64)
        if scores.shape != self.scores.shape:
            raise ValueError(f"the state holds {len(scores)} scores, the model has {len(self.scores)} layers")
        self.scores = scores
        self._drawn = {int(first): list(layers) for first, layers in state.get("drawn", {}).items()}

    def _draw_kept(self, generator: torch.Generator) -> list[int]:
        scores = torch.zeros_like(self.scores) if self.config.uniform_candidates else self.scores
        if self.config.score_rule != "released":
            return self._draw(scores, self.counts.kept, generator)
        suppressed = self._draw(scores, self.counts.n_layers - self.counts.kept, generator)
        return sorted(set(range(self.counts.n_layers)) - set(suppressed))

    def _draw(self, scores: Tensor, count: int, generator: torch.Generator) -> list[int]:
        """`count` layers, those with the largest keys."""
        keys = self._keys(scores, generator)
        return sorted(torch.argsort(keys, descending=True, stable=True)[:count].tolist())

    def _keys(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        """[N_L], one for each layer. Everything in logarithms: sigmoid(-800) is 0, its log is not.

        paper:    p_i ~ U(0, sigmoid(I_i)), key log p_i (Eq. 6)
        released: multinomial without replacement on sigmoid(scores), as a race of exponential clocks
        """
        log_u = torch.log1p(-torch.rand(len(scores), dtype=torch.float64, generator=generator))
        return logsigmoid(scores) + (-torch.log(-log_u) if self.config.score_rule == "released" else log_u)


def shrinkage(effects: Tensor, standard_errors: Tensor | None) -> float:
    """Positive-part James-Stein factor of effects around their mean: 0 where they are as large as their errors."""
    if standard_errors is None:
        return 0.0
    ratio = (effects / standard_errors.clamp_min(torch.finfo(torch.float64).tiny)).square().sum().item()
    return max(0.0, 1 - (len(effects) - 3) / ratio) if ratio > 0 else 0.0
