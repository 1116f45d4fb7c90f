"""AdaLoRA's rank allocation where layers rest and parameters are sharded (arXiv 2303.10512).

PEFT's own arithmetic runs on whole tensors, and on gradients of the layers that trained.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from ist.distributed import full_tensor, like


class _Whole:
    """Stands in for the model in PEFT's RankAllocator: the adapter's parameters whole, with their gradients."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.parameters.items())


class RestingRankAllocator(RankAllocator):
    """PEFT's allocator; the statistics of a layer that rests stay as they were.

    The sensitivity is a running mean from zero, so it is corrected for each layer's own number of updates, or layers
    that trained rarely would lose their rank for that alone. (The uncertainty, its other factor, settles within some 20
    updates: a `tinit` in which each layer trains as often makes all comparable.) With all layers training, the order is
    PEFT's. A layer that has not trained at all by the final allocation keeps no rank.
    """

    def reset_ipt(self) -> None:
        super().reset_ipt()
        self.updates: dict[str, int] = {}

    def _element_score(self, n: str) -> Tensor:
        k = self.updates.get(n, 0)
        return super()._element_score(n) / (1 - self.beta1**k) if k else self.exp_avg_ipt[n]

    def _adapter(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if "lora_" in n and self.adapter_name in n}

    def update_ipt(self, model: nn.Module) -> None:
        trained = {}
        for name, parameter in self._adapter(model).items():
            if parameter.grad is not None:
                trained[name] = full_tensor(parameter).detach().clone()
                trained[name].grad = full_tensor(parameter.grad)
                self.updates[name] = self.updates.get(name, 0) + 1
            if name not in self.ipt:
                for statistics in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc):
                    statistics[name] = torch.zeros(parameter.shape, device=parameter.device)
        super().update_ipt(_Whole(trained))

    def _on_singular_values(self, model: nn.Module, allocate: Callable) -> Any:
        """Run `allocate` on whole copies, then put the singular values, which it masks, back."""
        whole = {name: full_tensor(p).detach().clone() for name, p in self._adapter(model).items()}
        result = allocate(_Whole(whole))
        for name, parameter in self._adapter(model).items():
            if "lora_E." in name:
                with torch.no_grad():
                    parameter.copy_(like(whole[name], parameter))
        return result

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict:
        mask = super().mask_to_budget
        return self._on_singular_values(model, lambda whole: mask(whole, budget))

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict) -> None:
        mask = super().mask_using_rank_pattern
        self._on_singular_values(model, lambda whole: mask(whole, rank_pattern))


class AdaLoraAllocation:
    """AdaLoRA's steps in a training loop: a gradient of its own, and the budget after each step."""

    def __init__(self, model: PeftModel) -> None:
        self.tuner = model.base_model
        self.config = model.peft_config[self.tuner.trainable_adapter_name]
        self.allocator = RestingRankAllocator(self.tuner.model, self.config, self.tuner.trainable_adapter_name)
        self.tuner.rankallocator = self.allocator

    def add_regularization(self) -> None:
        """Add the gradient of AdaLoRA's orthogonality term to the layers that train; call it after the backward.

        PEFT adds the term to the model's own loss, which a token-weighted global batch does not use:
        w / n * sum over the n matrices A and B of ||A A^T - I||_F or ||B^T B - I||_F.
        """
        names = [name for name in self.allocator._adapter(self.tuner.model) if "lora_A" in name or "lora_B" in name]
        for name in names:
            parameter = self.tuner.model.get_parameter(name)
            if parameter.grad is None:
                continue
            whole = full_tensor(parameter).detach().clone().requires_grad_()
            with torch.enable_grad():
                gram = whole @ whole.T if "lora_A" in name else whole.T @ whole
                term = torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
            (gradient,) = torch.autograd.grad(term, whole)
            parameter.grad += like(self.config.orth_reg_weight / len(names) * gradient, parameter)

    def step(self, step: int) -> None:
        """Update statistics and budget after optimizer step number `step`, from 1, while gradients are there."""
        self.tuner.update_and_allocate(step)

    def keep_what_trained(self) -> None:
        """Widen the rank pattern, by which PEFT cuts a saved adapter, to all that is not zero.

        Between two allocations, and in a schedule that was not finished, singular values outside it train again.
        """
        adapter = f".{self.allocator.adapter_name}"
        pattern = {name.replace(adapter, ""): kept for name, kept in (self.config.rank_pattern or {}).items()}
        for name, parameter in self.allocator._adapter(self.tuner.model).items():
            key = name.replace(adapter, "")
            if key in pattern:
                used = (full_tensor(parameter).view(-1) != 0).tolist()
                pattern[key] = [a or b for a, b in zip(pattern[key], used, strict=True)]
        self.config.rank_pattern = pattern or None

    def tensors(self) -> dict[str, Tensor]:
        """The statistics that a resumed run needs, whole, the same on every rank."""
        kinds = {"ipt": self.allocator.exp_avg_ipt, "unc": self.allocator.exp_avg_unc}
        return {f"adalora|{kind}|{name}": tensor for kind, values in kinds.items() for name, tensor in values.items()}

    def state_dict(self) -> dict:
        """The rest of the state, JSON-ready."""
        return {"rank_pattern": self.config.rank_pattern, "updates": self.allocator.updates}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        self.allocator.reset_ipt()
        self.allocator.updates = dict(state["updates"])
        kinds = {"ipt": self.allocator.exp_avg_ipt, "unc": self.allocator.exp_avg_unc}
        for key, tensor in tensors.items():
            if key.startswith("adalora|"):
                _, kind, name = key.split("|")
                kinds[kind][name] = tensor.to(self.tuner.model.get_parameter(name).device)
                self.allocator.ipt[name] = torch.zeros_like(kinds[kind][name])
        self.config.rank_pattern = state["rank_pattern"]
