"""The same layers at every step: a list, the first, the middle or the last N_u."""

from dataclasses import dataclass, field

from ist.config import ISTConfig, LayerCounts, check
from ist.selection.rule import Unlearned


@dataclass
class FixedConfig(ISTConfig):
    fixed_layers: list[int] | None = field(
        default=None, metadata={"help": "fixed: the layers to train, from 0. Default: N_u at equal distances."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed_layers is not None:
            given = self.fixed_layers if isinstance(self.fixed_layers, (list, tuple)) else [self.fixed_layers]
            parts = [part for item in given for part in str(item).split(",") if part]
            whole = bool(parts) and all(part.isdecimal() for part in parts)
            check(whole, "fixed_layers", "layer numbers, from 0", " ".join(map(str, given)))
            self.fixed_layers = sorted({int(part) for part in parts})


class FixedLayers(Unlearned):
    """`fixed`, `first`, `middle` and `last`: the same layers at every step.

    `last` is the cheapest choice of N_u layers there is: nothing below them is kept for the backward.

    Args:
        n_layers: N_L.
        config: `fixed_layers` (default: N_u layers at equal distances, the middles of N_u equal parts) or
            `trained_layers`.

    Raises:
        ConfigError: a layer of `fixed_layers` is not one of the model's.
    """

    def __init__(self, n_layers: int, config: ISTConfig) -> None:
        given = getattr(config, "fixed_layers", None)  # a key of `fixed` alone
        count = config.counts(n_layers).trained if given is None else 0
        if config.selection == "first":
            self._layers = list(range(count))
        elif config.selection == "last":
            self._layers = list(range(n_layers - count, n_layers))
        elif config.selection == "middle":
            start = (n_layers - count) // 2
            self._layers = list(range(start, start + count))
        elif given is None:
            self._layers = [(2 * i + 1) * n_layers // (2 * count) for i in range(count)]
        else:
            self._layers = list(given)
        if beyond := [i for i in self._layers if i >= n_layers]:
            allowed = f"layers from 0 to {n_layers - 1} (the model has {n_layers})"
            check(False, "fixed_layers", allowed, ", ".join(map(str, beyond)))
        self.counts = LayerCounts(n_layers, len(self._layers), n_layers)

    def trained(self, step: int) -> list[int]:
        return list(self._layers)
