"""ID3, step-by-step unmasking (Agarwal et al., TACL 2025, arXiv 2408.14470): it chooses scalars, not layers.

Everything is masked at first. Over T steps a budget of B scalars is unmasked in equal instalments, each time those of
highest score H = |grad| / (|theta| + eps)^exp among the masked scalars, over all tensors together; an unmasked one
trains from that step on and is never masked again. Masked scalars do not move at all.

The score, its name (D3) and the schedule are the paper's. Ours: the remainder of B / T is spread over all T steps;
equal scores go by parameter order, then by position; moments and bias correction begin when a scalar is unmasked; on
any number of ranks the budget is met to the scalar.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ist.config import ConfigError
from ist.distributed import require_agreement
from ist.selection.keys import ID3Config
from ist.selection.packed_adamw import PackedAdamW
from ist.selection.rule import Unlearned
from ist.selection.shards import all_parts, flat_part, flat_range, part_of, sum_over_parts

# A float32 of 0 or more orders as its bits do: 31 of them, compared in two halves.
HIGH, LOW = 16, 15


class StepwiseUnmasking(Unlearned):
    """`id3`. All layers train; which of their scalars is chosen from the gradients of each of the first T steps.

    Args:
        n_layers: N_L.
        config: `id3_budget` (B), `id3_steps` (T), `id3_exponent` (exp), `id3_eps` (eps).

    Attributes:
        budget, steps: B and T, once attached.
        unmasked: scalars unmasked so far, on all ranks together.
    """

    def __init__(self, n_layers: int, config: ID3Config) -> None:
        self.config = config
        self.counts = config.counts(n_layers)._replace(trained=n_layers)
        self._optimizer: PackedAdamW | None = None

    def schedule(self, candidates: int, max_steps: int) -> tuple[int, int]:
        """(B, T) for a run of `max_steps` optimizer steps, where so many scalars are candidates.

        Raises:
            ConfigError: B is more than there are, or T more than there will be.
        """
        steps = self.config.id3_steps or max_steps
        if steps > max_steps:
            raise ConfigError(
                f"`id3_steps={steps}` is more than the run's {max_steps} steps: the budget would never be reached. "
                "Lower it.",
                "id3_steps",
            )
        return self.config.scalar_budget(candidates), steps

    def attach(self, parameters: Mapping[str, nn.Parameter], optimizer: PackedAdamW, max_steps: int) -> None:
        """Take the scalars of `parameters` for candidates, in this order. Call it before the first step.

        Raises:
            ConfigError: as `schedule`.
            RuntimeError: a parameter is sharded otherwise than by its rows.
        """
        self.parameters = list(parameters.values())
        for parameter in self.parameters:
            flat_range(parameter)
        self.candidates = sum(parameter.numel() for parameter in self.parameters)
        self.budget, self.steps = self.schedule(self.candidates, max_steps)
        self._optimizer = optimizer
        self._unmasked: int | None = None  # counted when a checkpoint, if any, has been loaded

    def trained(self, step: int) -> list[int]:
        """All layers.

        Raises:
            RuntimeError: not attached: everything would train, unmasked.
        """
        _ = self.optimizer
        return list(range(self.counts.n_layers))

    @property
    def optimizer(self) -> PackedAdamW:
        if self._optimizer is None:
            raise RuntimeError("selection id3 chooses scalars: attach the rule to a PackedAdamW, as train_ist.py does")
        return self._optimizer

    @property
    def unmasked(self) -> int:
        if self._unmasked is None:
            self._unmasked = int(self._chosen().sum())
        return self._unmasked

    def _chosen(self) -> Tensor:
        """[parameters] int64, scalars unmasked in each, on all ranks together."""
        counts = torch.tensor([len(self.optimizer.chosen(p)) for p in self.parameters], device=self._device)
        return sum_over_parts(counts, self.parameters[0]).cpu()

    @property
    def _device(self) -> torch.device:
        return flat_part(self.parameters[0]).device

    @torch.no_grad()
    def unmask(self, step: int) -> int:
        """Unmask what is due at `step` (from 0), and zero the gradient of the scalars that stay masked.

        Call it between backward and clipping, when gradients are those of the global batch: the norm is then that of
        what moves.

        Returns:
            Scalars unmasked so far: B (step + 1) / T, rounded down, and B from step T - 1 on.

        Raises:
            RuntimeError: ranks disagree on the scalars to unmask.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # an expert that no token went to; GradientReducer does the same on ranks
                parameter.grad = torch.zeros_like(parameter)
        due = self.budget * min(step + 1, self.steps) // self.steps
        if (wanted := due - self.unmasked) > 0:
            self._unmask(wanted, step)
            self._unmasked = due
        for parameter in self.parameters:
            gradient, chosen = flat_part(parameter.grad), self.optimizer.chosen(parameter)
            kept = gradient[chosen]
            gradient.zero_()[chosen] = kept
        return due

    def state_dict(self) -> dict:
        """The schedule. The masks themselves are the indices of the optimizer's state."""
        return {} if self._optimizer is None else {"id3_budget": self.budget, "id3_steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the schedule of a checkpoint."""
        self.budget, self.steps = state["id3_budget"], state["id3_steps"]
        self._unmasked = None

    def summary(self, layers: list[list[nn.Parameter]]) -> dict:
        """Where the budget went, for run.json: of each layer, and as a whole. All ranks call it."""
        counts = {id(p): int(count) for p, count in zip(self.parameters, self._chosen(), strict=True)}
        return {
            **{"budget": self.budget, "steps": self.steps, "candidates": self.candidates},
            "unmasked": sum(counts.values()),
            "unmasked_by_layer": [sum(counts[id(parameter)] for parameter in layer) for layer in layers],
        }

    def _score_bits(self, parameter: nn.Parameter) -> Tensor:
        """[this rank's part, flattened] H as a float32's bits, int32; -1 where unmasked.

        Made anew for each look: kept, the scores of all tensors would be a copy of the model.
        """
        score = flat_part(parameter.grad).abs()
        score /= flat_part(parameter).abs().add_(self.config.id3_eps).pow_(self.config.id3_exponent)
        bits = score.float().view(torch.int32).bitwise_and_(2**31 - 1)  # no sign, that of a NaN included
        bits[self.optimizer.chosen(parameter)] = -1
        return bits

    def _cut(self, wanted: int) -> tuple[int, int]:
        """(bits of the lowest score to unmask, how many of those with this very score), for `wanted` scalars in all.

        Ranks add up histograms of their own scores, first by the high bits, then by the low ones within the bin where
        the cut falls: exact, and no score travels.
        """
        counts = torch.zeros(2**HIGH, dtype=torch.int64, device=self._device)
        for parameter in self.parameters:
            bins = (self._score_bits(parameter) >> LOW) + 1  # 0: unmasked
            counts += torch.bincount(bins, minlength=2**HIGH + 1)[1:]
        high, wanted = self._last_bin(counts, wanted)
        counts = torch.zeros(2**LOW, dtype=torch.int64, device=self._device)
        for parameter in self.parameters:
            bits = self._score_bits(parameter)
            counts += torch.bincount(bits[(bits >> LOW) == high] & (2**LOW - 1), minlength=2**LOW)
        low, wanted = self._last_bin(counts, wanted)
        return (high << LOW) + low, wanted

    def _last_bin(self, counts: Tensor, wanted: int) -> tuple[int, int]:
        """(the bin in which the `wanted` highest end, how many of them are in it)."""
        at_least = sum_over_parts(counts, self.parameters[0]).cpu().flip(0).cumsum(0)
        last = int(torch.searchsorted(at_least, wanted))
        above = int(at_least[last - 1]) if last else 0
        return len(counts) - 1 - last, wanted - above

    def _unmask(self, wanted: int, step: int) -> None:
        cut, left = self._cut(wanted)
        above, equal = [], []
        for parameter in self.parameters:
            bits = self._score_bits(parameter)
            above.append((bits > cut).nonzero().view(-1))
            equal.append((bits == cut).nonzero().view(-1)[:left])  # more are never taken
        # Those of equal score go by parameter, then by position; parts of a parameter follow each other in rank order.
        ties = torch.tensor([len(indices) for indices in equal], device=self._device)
        ties = all_parts(ties, self.parameters[0]).T.cpu()  # [parameters, parts]
        before = (ties.flatten().cumsum(0).view_as(ties) - ties)[:, part_of(self.parameters[0])]
        digest = hashlib.sha256(f"{step} {cut} {left} {ties.tolist()}".encode())
        new = [torch.cat([a, e[: max(0, left - int(b))]]) for a, e, b in zip(above, equal, before, strict=True)]
        if ties.shape[1] == 1:  # each rank has all of each parameter, and must choose the same
            for indices in new:
                digest.update(indices.cpu().numpy().tobytes())
        require_agreement(f"the scalars of step {step}", digest.hexdigest()[:16])
        for parameter, indices in zip(self.parameters, new, strict=True):
            self.optimizer.choose(parameter, indices)
