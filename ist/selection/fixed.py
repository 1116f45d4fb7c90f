"""The same layers at every step: a list, the first or the last N_u."""

from ist.config import ISTConfig, LayerCounts, UsageError
from ist.selection.rule import Unlearned


class FixedLayers(Unlearned):
    """`fixed`, `first` and `last`: what training chosen layers comes to, without choosing anew.

    `last` is the cheapest choice of N_u layers there is: nothing below them is kept for the backward.

    Args:
        n_layers: N_L.
        config: `fixed_layers` (default: N_u layers at equal distances, the middles of N_u equal parts) or
            `trained_layers`.

    Raises:
        UsageError: a layer of `fixed_layers` is not one of the model's.
    """

    def __init__(self, n_layers: int, config: ISTConfig) -> None:
        count = config.counts(n_layers).trained if config.fixed_layers is None else 0
        if config.selection == "first":
            self._layers = list(range(count))
        elif config.selection == "last":
            self._layers = list(range(n_layers - count, n_layers))
        elif config.fixed_layers is None:
            self._layers = [(2 * i + 1) * n_layers // (2 * count) for i in range(count)]
        else:
            self._layers = list(config.fixed_layers)
        if beyond := [i for i in self._layers if i >= n_layers]:
            raise UsageError(
                f"--fixed_layers must be layers from 0 to {n_layers - 1} (the model has {n_layers}); got "
                f"{', '.join(map(str, beyond))}."
            )
        self.counts = LayerCounts(n_layers, len(self._layers), n_layers)

    def trained(self, step: int) -> list[int]:
        return list(self._layers)
