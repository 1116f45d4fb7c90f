"""Importance-aware Sparse Tuning (arXiv 2410.11772) for any PEFT training loop.

`from ist import ISTConfig, ImportanceSampler, SparseTuner, ISTCallback`; names are resolved on first use, so that
importing `ist` costs nothing that is not needed.
"""

import importlib
from typing import Any

_HOME = {"ISTConfig": "config", "ImportanceSampler": "sampler", "SparseTuner": "tuner", "ISTCallback": "callback"}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ist' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ist.{_HOME[name]}"), name)
