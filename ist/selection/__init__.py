"""Selection rules: the layers, or scalars, that train at each step, all with the interface of ImportanceSampler.

A rule is a file with its class, the class of its own keys where it has some, and a line in `RULES`.
"""

import importlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ist.config import ConfigError, ISTConfig

_KEYS = "ist.selection.keys"  # of rules that import torch, which these must not: `--help` lists them

# name -> (module, class of the rule, class of its keys: of the same module, or with its module before it)
_SAMPLER = ("ist.sampler", "ImportanceSampler", None)
_FIXED = ("ist.selection.fixed", "FixedLayers", None)
_SEMANTIC = ("ist.selection.semantic", "SemanticFreezing", f"{_KEYS}.SemanticConfig")
RULES: dict[str, tuple[str, str, str | None]] = {
    "ist": _SAMPLER,
    "random": _SAMPLER,
    "all": _SAMPLER,
    "lisa": ("ist.selection.lisa", "LisaSampler", f"{_KEYS}.LisaConfig"),
    "fixed": (*_FIXED[:2], "FixedConfig"),
    "first": _FIXED,
    "middle": _FIXED,
    "last": _FIXED,
    "semantic": _SEMANTIC,
    "semantic+ist": _SEMANTIC,
    "gradient_norm": ("ist.selection.gradient_norm", "GradientNorm", f"{_KEYS}.GradientNormConfig"),
    "placebo": ("ist.selection.controls", "Placebo", None),
    "oracle": ("ist.selection.controls", "Oracle", f"{_KEYS}.OracleConfig"),
    "id3": ("ist.selection.id3", "StepwiseUnmasking", f"{_KEYS}.ID3Config"),
}
_HOME = {"CalibratedRule": "ist.selection.rule", "SelectionRule": "ist.selection.rule"}
_HOME |= {name: module for module, *names in RULES.values() for name in names if name and "." not in name}
_HOME |= dict.fromkeys(("LisaConfig", "SemanticConfig", "ID3Config", "GradientNormConfig", "OracleConfig"), _KEYS)
__all__ = ["RULES", "config_class", "make_rule", "rule_fields", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ist.selection' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def _config_of(selection: str) -> type[ISTConfig]:
    module, _, config = RULES[selection]
    if config is None:
        return ISTConfig
    elsewhere, _, name = config.rpartition(".")
    return getattr(importlib.import_module(elsewhere or module), name)


def rule_fields() -> Iterator[tuple[Any, list[str]]]:
    """(dataclass field, names of its rules) of every key that belongs to some rules alone."""
    configs: dict[type[ISTConfig], list[str]] = {}
    for selection in RULES:
        configs.setdefault(_config_of(selection), []).append(selection)
    own = {key.name for key in fields(ISTConfig)}
    for config, selections in configs.items():
        yield from ((key, selections) for key in fields(config) if key.name not in own)


def config_class(selection: str, keys: dict[str, Any]) -> type[ISTConfig]:
    """The class of the keys of a rule; `keys` are those that are given.

    Raises:
        ConfigError: a key is another rule's. IST's own may stand in a recipe that all rules share.
    """
    if selection not in RULES:
        return ISTConfig  # whose check names the allowed values
    config = _config_of(selection)
    if foreign := keys.keys() - {key.name for key in fields(config)}:
        for key, selections in rule_fields():
            if key.name in foreign:
                where = " and ".join(selections)
                raise ConfigError(
                    f"`{key.name}` must be left out with `selection={selection}`: it is for {where}; "
                    f"got {keys[key.name]}.",
                    key.name,
                )
    return config


def make_rule(n_layers: int, config: ISTConfig) -> Any:
    """The SelectionRule that config.selection names, for a model with `n_layers` layers.

    Raises:
        ConfigError: the rule's keys do not fit so many layers.
    """
    module, rule, _ = RULES[config.selection]
    return getattr(importlib.import_module(module), rule)(n_layers, config)
