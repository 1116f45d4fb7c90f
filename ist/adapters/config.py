"""The configurations of series and parallel adapters."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig, PeftType


@dataclass
class BottleneckConfig(PeftConfig):
    """The keys of both adapters; defaults are the paper's (Table 9) where it has one, else LLM-Adapters'.

    Raises:
        ValueError: at construction, naming the field.
    """

    method: ClassVar[str]

    bottleneck_size: int = field(default=256, metadata={"help": "Width of the hidden layer."})
    non_linearity: str = field(default="tanh", metadata={"help": "f: a name that transformers knows (relu, silu, …)."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    scaling: float = field(default=1.0, metadata={"help": "Factor on the adapter's response."})
    init_weights: bool = field(default=True, metadata={"help": "W_up = 0: the adapter starts as the identity."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a regular expression; default: those of the method, if the model has."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names not to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole, and save."})

    def __post_init__(self) -> None:
        from transformers.activations import ACT2FN  # here: the method itself stands on torch and PEFT alone

        super().__post_init__()
        self.peft_type = PeftType(self.method)
        for key in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, key), list):
                setattr(self, key, set(getattr(self, key)))
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size must be 1 or more; got {self.bottleneck_size}")
        if self.non_linearity not in ACT2FN:
            raise ValueError(f"non_linearity must be one of {', '.join(sorted(ACT2FN))}; got {self.non_linearity}")
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling must be a finite number; got {self.scaling}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used when target_modules is a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")


@dataclass
class SeriesConfig(BottleneckConfig):
    """Series Adapter (Houlsby et al. 2019), after the module: o = b + s f(b W_down) W_up with b = m(x) (Eq. 13).

    Default targets up and down. The authors' code, from LLM-Adapters, puts the adapter of `up` on its input instead.
    """

    method = "SERIES"


@dataclass
class ParallelConfig(BottleneckConfig):
    """Parallel Adapter (He et al. 2022), in parallel with the module: o = m(x) + s f(x W_down) W_up (Eq. 11).

    Default targets up and gate.
    """

    method = "PARALLEL"
