"""A linear layer with a bottleneck adapter after it (series) or in parallel with it."""

import math
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ist.adapters.config import BottleneckConfig

CANNOT_MERGE = "series and parallel adapters are not linear and cannot be merged into the base layer; keep the adapter."


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Base layer m and, per adapter, response(h) = s f(h W_down) W_up; subclasses define h.

    Shapes: x [..., n_in], m(x) [..., n_out]; W_down [bottleneck, n_h], W_up [n_out, bottleneck], as nn.Linear has them.

    Raises:
        ValueError: the base layer is not linear.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if isinstance(base, nn.Linear):  # bitsandbytes' quantised ones are
            self.in_features, self.out_features = base.in_features, base.out_features
        elif isinstance(base, Conv1D):
            self.in_features, self.out_features = base.weight.shape
        else:
            raise ValueError(f"target_modules must name linear layers; got a {type(base).__name__}")
        for container in self.adapter_layer_names:
            setattr(self, container, nn.ModuleDict())
        for container in self.other_param_names[:2]:  # with the method's prefix, by which PEFT 0.18 knows them
            setattr(self, container, nn.ModuleDict())
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def hidden_features(self) -> int:
        """Width of h."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter."""
        from transformers.activations import ACT2FN

        down = nn.Linear(self.hidden_features, config.bottleneck_size, bias=False)
        up = nn.Linear(config.bottleneck_size, self.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(up.weight)
        for container, linear in zip(self.adapter_layer_names, (down, up), strict=True):
            getattr(self, container)[adapter_name] = linear
        dropout, non_linearity = (getattr(self, container) for container in self.other_param_names[:2])
        dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        non_linearity[adapter_name] = ACT2FN[config.non_linearity]
        self.scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def response(self, adapter_name: str, h: Tensor) -> Tensor:
        down, up = (getattr(self, container)[adapter_name] for container in self.adapter_layer_names)
        dropout, non_linearity = (getattr(self, container)[adapter_name] for container in self.other_param_names[:2])
        h = dropout(self._cast_input_dtype(h, down.weight.dtype))
        return up(non_linearity(down(h))) * self.scaling[adapter_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = result = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.scaling:
                    result = result + self.response(name, self.adapter_input(x, base)).to(base.dtype)
        return result

    def adapter_input(self, x: Tensor, base: Tensor) -> Tensor:
        """h, from the module's input and its base layer's output."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(CANNOT_MERGE)


class SeriesLayer(BottleneckLayer):
    """After the module: h = m(x) (Eq. 13)."""

    adapter_layer_names = ("series_adapter_down", "series_adapter_up")
    other_param_names = ("series_adapter_dropout", "series_adapter_non_linearity", "scaling")

    @property
    def hidden_features(self) -> int:
        return self.out_features

    def adapter_input(self, x: Tensor, base: Tensor) -> Tensor:
        return base


class ParallelLayer(BottleneckLayer):
    """In parallel with the module: h = x (Eq. 11)."""

    adapter_layer_names = ("parallel_adapter_down", "parallel_adapter_up")
    other_param_names = ("parallel_adapter_dropout", "parallel_adapter_non_linearity", "scaling")

    @property
    def hidden_features(self) -> int:
        return self.in_features

    def adapter_input(self, x: Tensor, base: Tensor) -> Tensor:
        return x
