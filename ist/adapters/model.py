"""The two tuners: they put an adapter on each targeted module of a model."""

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ist.adapters.config import BottleneckConfig
from ist.adapters.layer import BottleneckLayer, ParallelLayer, SeriesLayer
from ist.adapters.targets import default_target_modules


class BottleneckModel(BaseTuner):
    tuner_layer_cls: type[BottleneckLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict) -> BottleneckConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model, peft_config.method.lower())
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        new_module = self.tuner_layer_cls(target, adapter_name, config)
        if adapter_name not in self.active_adapters:  # an additional adapter trains when it is made active
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)


class SeriesModel(BottleneckModel):
    prefix = "series_adapter_"
    tuner_layer_cls = SeriesLayer


class ParallelModel(BottleneckModel):
    prefix = "parallel_adapter_"
    tuner_layer_cls = ParallelLayer
