"""The interface of a selection rule."""

from typing import Protocol

from ist.config import LayerCounts


class SelectionRule(Protocol):
    """What trains at each step; what must be observed for it; its state.

    Draws are seeded by (seed, step, purpose), so that ranks agree and a resumed run goes on with the same ones: the
    state is what was learned from observations, nothing else. Between two updates `trained` must not change.

    Attributes:
        counts: {N_L, N_u, N_v}; N_u is the number of layers that `trained` gives.
    """

    counts: LayerCounts

    def due(self, step: int) -> bool:
        """Whether candidates must be measured before `step`: then it has `candidates` and `update`, as
        ImportanceSampler."""

    def trained(self, step: int) -> list[int]:
        """The layers trained at `step`, ascending."""

    def state_dict(self) -> dict:
        """JSON-ready and exact."""

    def load_state_dict(self, state: dict) -> None: ...


class Unlearned:
    """The part of a rule that observes nothing: no updates, no state."""

    def due(self, step: int) -> bool:
        return False

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
