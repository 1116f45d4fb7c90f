"""Steps that some runs add to each optimizer step: AdaLoRA's budget, ID3's masks, moments of resting layers."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import Tensor, nn

from ist.adapters.adalora import AdaLoraAllocation
from ist.selection import GradientNorm, StepwiseUnmasking
from ist.training.job import Job
from ist.training.resting_state import RestingState
from ist.tuner import SparseTuner


class Extension:
    """Called by the loop of train_ist.py at each step and save; does nothing."""

    def messages(self, max_steps: int) -> list[str]:
        """Lines for the start of a run."""
        return []

    def begin_step(self, trained: Sequence[int]) -> None:
        """The layers of the step are chosen."""

    def after_backward(self, step: int) -> dict[str, Any]:
        """Gradients are those of the global batch; the returned values go into the step's line of metrics.jsonl."""
        return {}

    def after_optimizer_step(self, finished: int) -> None:
        """Gradients are still there; `finished` counts steps from 1."""

    def before_save(self) -> None:
        """The optimizer must hold all of its state."""

    def tensors(self) -> dict[str, Tensor]:
        """Of the checkpoint, the same on every rank."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Of the checkpoint, JSON-ready, under names of its own."""
        return {}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Load the results of the two above."""

    def finish(self) -> None:
        """Before the adapter is saved."""

    def facts(self) -> dict[str, Any]:
        """For run.json. All ranks call it."""
        return {}


class AdaLora(Extension):
    def __init__(self, model: nn.Module, config: AdaLoraConfig) -> None:
        self.config, self.allocation = config, AdaLoraAllocation(model)

    def messages(self, max_steps: int) -> list[str]:
        total = self.config.total_step
        return [f"AdaLoRA's schedule has {total} steps (total_step), the run {max_steps}."] * (total != max_steps)

    def after_backward(self, step: int) -> dict[str, Any]:
        self.allocation.add_regularization()
        return {}

    def after_optimizer_step(self, finished: int) -> None:
        self.allocation.step(finished)

    def tensors(self) -> dict[str, Tensor]:
        return self.allocation.tensors()

    def state_dict(self) -> dict[str, Any]:
        return {"allocation": self.allocation.state_dict()}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.allocation.load(tensors, state["allocation"])

    def finish(self) -> None:
        self.allocation.keep_what_trained()


class Unmasking(Extension):
    """ID3: its masks are the optimizer's state, its schedule the rule's."""

    def __init__(self, rule: StepwiseUnmasking, tuner: SparseTuner) -> None:
        self.rule, self.tuner = rule, tuner

    def messages(self, max_steps: int) -> list[str]:
        rule = self.rule
        return [
            f"id3: {rule.budget:,} of {rule.candidates:,} scalars are unmasked over {rule.steps} steps, "
            f"{rule.unmasked:,} so far"
        ]

    def after_backward(self, step: int) -> dict[str, Any]:
        return {"unmasked_scalars": self.rule.unmask(step)}

    def facts(self) -> dict[str, Any]:
        return {"id3": self.rule.summary(self.tuner.layers.parameters)}


class GradientNorms(Extension):
    """The rule that draws by the gradient norms of the layers."""

    def __init__(self, tuner: SparseTuner) -> None:
        self.tuner = tuner

    def after_backward(self, step: int) -> dict[str, Any]:
        self.tuner.observe_gradients()
        return {}


class Resting(Extension):
    def __init__(self, optimizer: torch.optim.Optimizer, tuner: SparseTuner, policy: str) -> None:
        self.state, self.tuner = RestingState(optimizer, tuner.layers, policy), tuner

    def begin_step(self, trained: Sequence[int]) -> None:
        self.state.switch(trained)

    def before_save(self) -> None:
        self.state.restore()


class Extensions(Extension):
    """Several as one, in their order."""

    def __init__(self, members: Sequence[Extension]) -> None:
        self.members = members

    @staticmethod
    def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {key: value for part in parts for key, value in part.items()}

    def messages(self, max_steps: int) -> list[str]:
        return [line for member in self.members for line in member.messages(max_steps)]

    def begin_step(self, trained: Sequence[int]) -> None:
        for member in self.members:
            member.begin_step(trained)

    def after_backward(self, step: int) -> dict[str, Any]:
        return self._joined([member.after_backward(step) for member in self.members])

    def after_optimizer_step(self, finished: int) -> None:
        for member in self.members:
            member.after_optimizer_step(finished)

    def before_save(self) -> None:
        for member in self.members:
            member.before_save()

    def tensors(self) -> dict[str, Tensor]:
        return self._joined([member.tensors() for member in self.members])

    def state_dict(self) -> dict[str, Any]:
        return self._joined([member.state_dict() for member in self.members])

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        for member in self.members:
            member.load(tensors, state)

    def finish(self) -> None:
        for member in self.members:
            member.finish()

    def facts(self) -> dict[str, Any]:
        return self._joined([member.facts() for member in self.members])


def make_extensions(
    job: Job, tuner: SparseTuner, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Extensions:
    """Those that this run needs; `optimizer` is torch's, not Accelerate's wrapper of it."""
    members: list[Extension] = []
    if job.config.anneal_to_fixed:
        tuner.rule.total_steps = job.max_steps
    if isinstance(job.peft_config, AdaLoraConfig):
        members.append(AdaLora(tuner.model, job.peft_config))
    if isinstance(tuner.rule, StepwiseUnmasking):
        tuner.rule.attach(parameters, optimizer, job.max_steps)
        members.append(Unmasking(tuner.rule, tuner))
    if isinstance(tuner.rule, GradientNorm):
        members.append(GradientNorms(tuner))
    if job.args.optimizer_state != "keep":
        members.append(Resting(optimizer, tuner, job.args.optimizer_state))
    return Extensions(members)
