"""The interface of a selection rule, in three parts: every rule, one that observes losses, one that observes a pass."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ist.config import LayerCounts

if TYPE_CHECKING:  # `--help` needs the keys of `fixed`, whose rule stands on this file: not torch
    from torch import Tensor, nn

    from ist.layers import LayerMap


class SelectionRule(Protocol):
    """The layers that train at each step, and the rule's state.

    Draws are seeded by (seed, step, purpose), so that ranks agree and a resumed run goes on with the same ones: the
    state holds the observations' result, nothing else. Between two updates `trained` must not change.

    Attributes:
        counts: {N_L, N_u, N_v}; N_u is the number of layers that `trained` gives.
        plans: whether `trained` is known up to the next update; else for the present step alone.
    """

    counts: LayerCounts
    plans: bool

    def due(self, step: int) -> bool:
        """Whether candidate losses must be measured before `step`; only a LearnedRule says yes."""

    def trained(self, step: int) -> list[int]:
        """The layers trained at `step`, ascending."""

    def state_dict(self) -> dict:
        """JSON-ready and exact."""

    def load_state_dict(self, state: dict) -> None: ...


class LearnedRule(SelectionRule, Protocol):
    """A rule that learns from losses with suppressed responses: ImportanceSampler's interface."""

    @property
    def importance(self) -> "Tensor":
        """[N_L] float64, higher is more important."""

    def candidates(self, step: int) -> list[list[int]]:
        """Sets of layers that keep their full response, one loss to be measured for each."""

    def update(self, candidates: Sequence[Sequence[int]], losses: Sequence[float]) -> list[float]:
        """Learn from the losses; the reward of each set."""

    @property
    def probed(self) -> list[int]:
        """The layers that candidate sets choose from; the others keep their response."""

    @property
    def mean_gate(self) -> float:
        """What their responses are multiplied by in the mean over uniform candidate sets."""

    def learn(self, effects: "Tensor", standard_errors: "Tensor | None") -> dict | None:
        """Learn from the effects of the probed layers ([n], centred, with their standard errors): score_rule expected.
        What is returned goes into the line of importance.jsonl."""


@runtime_checkable
class CalibratedRule(SelectionRule, Protocol):
    """A rule that must see a pass over training rows before its first `trained`."""

    calibrated: bool

    def calibrate(self, model: "nn.Module", layers: "LayerMap", batches: "Iterable[dict[str, Tensor]]") -> None:
        """Make the pass over this rank's share of the rows; called without gradients and dropout."""

    def summary(self) -> dict:
        """Observations and choice, JSON-ready, for run.json."""


class Unlearned:
    """The part of a rule that observes nothing: no updates, no state."""

    plans = True

    def due(self, step: int) -> bool:
        return False

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
