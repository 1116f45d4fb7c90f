"""What to train at each step: the answers that IST's is compared with, behind the interface that its sampler has."""

from ist.config import ISTConfig
from ist.sampler import ImportanceSampler
from ist.selection.fixed import FixedLayers
from ist.selection.id3 import StepwiseUnmasking
from ist.selection.lisa import LisaSampler
from ist.selection.rule import CalibratedRule, SelectionRule
from ist.selection.semantic import SemanticFreezing

__all__ = ["CalibratedRule", "FixedLayers", "LisaSampler", "SelectionRule", "SemanticFreezing", "make_rule"]

_RULES = {
    "lisa": LisaSampler,
    "id3": StepwiseUnmasking,
    **dict.fromkeys(("fixed", "first", "last"), FixedLayers),
    **dict.fromkeys(("semantic", "semantic+ist"), SemanticFreezing),
}


def make_rule(n_layers: int, config: ISTConfig) -> SelectionRule:
    """The rule that config.selection names, for a model with `n_layers` layers.

    Raises:
        UsageError: the rule's keys do not fit so many layers.
    """
    return _RULES.get(config.selection, ImportanceSampler)(n_layers, config)
