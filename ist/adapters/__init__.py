"""Series and parallel adapters as methods of PEFT. Import `ist.adapters` before loading one with `PeftModel`.

from ist.adapters import ParallelConfig
model = get_peft_model(model, ParallelConfig(bottleneck_size=64))
"""

from peft.utils import PeftType, register_peft_method

from ist.adapters.config import ParallelConfig, SeriesConfig
from ist.adapters.model import ParallelModel, SeriesModel

__all__ = ["ParallelConfig", "ParallelModel", "SeriesConfig", "SeriesModel"]


def _add_peft_type(name: str) -> None:
    """PEFT takes only names of its enumeration, and an enumeration with members cannot be subclassed."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)


for _name, _config, _model in (("series", SeriesConfig, SeriesModel), ("parallel", ParallelConfig, ParallelModel)):
    if _name.upper() not in PeftType.__members__:
        _add_peft_type(_name.upper())
        register_peft_method(name=_name, config_cls=_config, model_cls=_model, prefix=_model.prefix)
