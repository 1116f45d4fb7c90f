"""Where a run is, and the checkpoints it has: saved when due, resumed from, pruned."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ist.distributed import from_main, require_equal_replicas
from ist.layers import adapter_state
from ist.training.checkpoint import (
    STATE,
    Damaged,
    checkpoint_steps,
    last_checkpoint,
    load_adapter,
    load_optimizer,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    step_name,
)
from ist.training.command_line import UsageError, brief
from ist.training.extensions import Extension
from ist.training.files import discard, sweep, writing
from ist.training.job import Job
from ist.tuner import SparseTuner


@dataclass
class Progress:
    """Where a run is, as the loop resumes from it; tuner, optimizer and schedule have states of their own.

    Attributes:
        step: finished optimizer steps.
        tokens: of all ranks, so far.
        loss: of the last logged step.
        validation_loss: of the last validation.
        best: {step, validation_loss} of the checkpoint of lowest validation loss, where the run wants it.
        lowest: validation loss so far, but for the one before the first step.
        unimproved: validations since one that was lower than all before it by more than the threshold.
    """

    step: int = 0
    tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    best: dict | None = None
    lowest: float | None = None
    unimproved: int = 0

    @classmethod
    def of(cls, state: dict) -> "Progress":
        """Of a checkpoint's state.

        Raises:
            ValueError: one of its values is missing, or of another type.
        """
        state = {"unimproved": 0, **state}  # which older ones do not have
        progress = cls(**{key.name: state.get(key.name) for key in fields(cls)})
        best = {"step": 0, "validation_loss": 0.0} if progress.best is None else progress.best
        counts = (progress.step, progress.tokens, progress.unimproved, best["step"])
        losses = (progress.loss, progress.validation_loss, progress.lowest)
        losses = (*(loss or 0.0 for loss in losses), best["validation_loss"])
        if any(type(count) is not int for count in counts) or not all(isinstance(one, (int, float)) for one in losses):
            raise ValueError("step, tokens, a loss, unimproved or best is missing, or of another type")
        return progress

    def advance(self, tokens: int) -> None:
        """A step is finished; its global batch had so many tokens."""
        self.step += 1
        self.tokens += tokens

    def count_improvement(self, threshold: float) -> None:
        """Of `validation_loss`; as transformers.EarlyStoppingCallback counts."""
        loss = self.validation_loss
        improved = self.lowest is None or self.lowest - loss > threshold
        self.unimproved = 0 if improved else self.unimproved + 1
        self.lowest = loss if self.lowest is None else min(self.lowest, loss)

    def stops_early(self, patience: int | None) -> bool:
        return patience is not None and self.unimproved >= patience


class WholeAdapter:
    """All tensors of the adapter by name, trainable or not; without an adapter, the trainable parameters.

    Make it before the first forward: after one without gradients FSDP has other objects in the place of some
    parameters.

    Args:
        model: unwrapped, its adapter whole: no layer is frozen yet.

    Attributes:
        parameters: {name: parameter} of all that train at some step; each parameter once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._trained = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self) -> dict[str, Tensor]:
        return adapter_state(self.model) | self._trained


class Checkpoints:
    """The checkpoints of one run. Every rank makes one and calls it alike; the main process writes.

    Args:
        job: its configuration is kept in each checkpoint.
        optimizer: torch's, not Accelerate's wrapper of it.
    """

    def __init__(
        self,
        job: Job,
        adapter: WholeAdapter,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        tuner: SparseTuner,
        extensions: Extension,
    ) -> None:
        self.output_dir, self.folder = job.output_dir, job.output_dir / "checkpoints"
        self.adapter, self.parameters, self.optimizer, self.scheduler = (
            adapter,
            adapter.parameters,
            optimizer,
            scheduler,
        )
        self.tuner, self.extensions, self.configuration = tuner, extensions, job.configuration
        self.keep = job.args.save_total_limit
        self.write = PartialState().is_main_process
        self.saved: int | None = None  # the step of the last one
        self.checksum = require_equal_replicas("the weights to begin with", self.parameters.values())

    def resume(self, checkpoint: tuple[Path, dict] | None) -> Progress:
        """Put a checkpoint's state in place, and remove later checkpoints and temporary folders."""
        progress = Progress()
        if checkpoint:
            path, state = checkpoint
            load_optimizer(path, state, self.optimizer, self.parameters)
            try:
                progress = Progress.of(state)
                self.extensions.load(load_adapter(path, self.adapter()), state)
                if missing := {"_last_lr", "last_epoch"} - state["scheduler"].keys():
                    raise ValueError(f"scheduler has no {missing.pop()}")
                self.scheduler.load_state_dict(state["scheduler"])
                scheduler = self.scheduler  # whose rate of this step is another one where the run has more steps now
                rates = [
                    base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)
                ]
                scheduler._last_lr = rates
                for group, learning_rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = float(learning_rate)
                self.tuner.load_state_dict(state["tuner"])
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # of an edited state
                reason = f"{STATE} does not fit this run ({brief(error)})"
                raise UsageError(f"--resume_from_checkpoint {path} cannot be used: {reason}.") from error
            best = progress.best
            if best and not from_main((self.folder / step_name(best["step"])).exists, UsageError):
                if self.write:
                    print(f"The best checkpoint so far, of step {best['step']}, is gone; looking for a new best.")
                progress.best = None
        if self.write:
            with writing(self.output_dir):
                sweep(self.output_dir)
                for later in (step for step in checkpoint_steps(self.output_dir) if step > progress.step):
                    discard(self.folder / step_name(later), self.output_dir)
        self.saved = progress.step
        return progress

    def save(self, progress: Progress) -> None:
        """After `progress.step` finished steps; the trained weights must be finite.

        Raises:
            RuntimeError: replicas of them differ between ranks.
        """
        self.checksum = require_equal_replicas(f"the weights after step {progress.step}", self.parameters.values())
        self.extensions.before_save()
        seed = self.configuration["seed"]
        state = {
            "configuration": self.configuration,
            "scheduler": self.scheduler.state_dict(),
            "tuner": self.tuner.state_dict(),
            "data": {"next_global_batch": progress.step},
            "rng": {"reseeded_by": ["seed", "step", "rank"], "seed": seed, "step": progress.step},
            **asdict(progress),
            **self.extensions.state_dict(),
        }
        tensors = self.adapter() | self.extensions.tensors()
        save_checkpoint(self.output_dir, progress.step, tensors, self.parameters, self.optimizer, state, self.write)
        self.extensions.begin_step(self.tuner.trained)
        if self.write:
            prune_checkpoints(self.output_dir, self.keep, progress.best["step"] if progress.best else None)
        self.saved = progress.step

    def load_best(self, step: int) -> None:
        """Put the adapter of the checkpoint of `step` in place."""
        path = self.folder / step_name(step)

        def read() -> dict:
            try:
                return read_state(path)
            except Damaged as error:
                raise UsageError(f"{path}, of the lowest validation loss, was damaged since: {error}.") from None

        state = from_main(read, UsageError)  # which has written it, perhaps where the other nodes do not see it
        self.extensions.load(load_adapter(path, self.adapter()), state)

    def last(self) -> str:
        """Where a failed run can go on from."""
        return last_checkpoint(self.output_dir)
