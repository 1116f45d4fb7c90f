"""A run as main has checked and resolved it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ist.config import ISTConfig
from ist.training.arguments import Resolved
from ist.training.data import Data


@dataclass(frozen=True)
class Job:
    """A run's arguments, rows and checkpoint, checked and resolved."""

    args: Resolved
    config: ISTConfig
    data: Data
    peft_config: PeftConfig | None
    max_steps: int
    checkpoint: tuple[Path, dict] | None
    configuration: dict[str, Any]  # as run.json holds it
    scores: list[float] | None = None  # [N_L] that importance begins with, where it is not zero

    @property
    def batch_size(self) -> int:
        return self.configuration["global_batch_size"]

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)
