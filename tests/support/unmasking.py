"""ID3 on tiny models, and a dense float64 reference of it."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from ist import ISTConfig
from ist.adapters import ParallelConfig, SeriesConfig
from ist.selection import StepwiseUnmasking
from ist.selection.packed_adamw import PackedAdamW
from support import tiny_config

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "series": SeriesConfig(bottleneck_size=4),
    "parallel": ParallelConfig(bottleneck_size=4),
    "none": None,
}


def tiny_model(adapter: str = "lora", dtype: torch.dtype = torch.float32) -> nn.Module:
    """In float64 weights are those of float32, so that two precisions start from the same point."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(2, vocab_size=100))
    if config := ADAPTERS[adapter]:
        model = get_peft_model(model, copy.deepcopy(config))
    return model.train().to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rule_on(
    parameters: dict[str, nn.Parameter], max_steps: int, lr: float = 1e-2, weight_decay: float = 0.1, **options
) -> StepwiseUnmasking:
    rule = StepwiseUnmasking(2, ISTConfig(selection="id3", **options))
    rule.attach(parameters, PackedAdamW(parameters.values(), lr=lr, weight_decay=weight_decay), max_steps)
    return rule


def masks_of(rule: StepwiseUnmasking) -> list[torch.Tensor]:
    """[numel] bool of each parameter, True where unmasked."""
    masks = [torch.zeros(parameter.numel(), dtype=torch.bool) for parameter in rule.parameters]
    for mask, parameter in zip(masks, rule.parameters, strict=True):
        mask[rule.optimizer.chosen(parameter).long()] = True
    return masks


class DenseId3:
    """The method on dense float64 tensors, by the book: one score for every scalar, one sort, moments for all."""

    def __init__(self, parameters, budget, steps, exponent=1.0, eps=1e-3, lr=1e-2, weight_decay=0.1):
        self.parameters, self.budget, self.steps = list(parameters), budget, steps
        self.exponent, self.eps, self.lr, self.weight_decay = exponent, eps, lr, weight_decay
        self.mask = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.bool)
        self.m, self.v, self.updates = (torch.zeros(len(self.mask), dtype=torch.float64) for _ in range(3))

    @torch.no_grad()
    def step(self, t: int) -> None:
        theta = torch.cat([p.flatten() for p in self.parameters]).double()
        grad = torch.cat([p.grad.flatten() for p in self.parameters]).double()
        score = grad.abs() / (theta.abs() + self.eps) ** self.exponent
        due = self.budget * min(t + 1, self.steps) // self.steps - int(self.mask.sum())
        score[self.mask] = -1
        self.mask[torch.sort(score, descending=True, stable=True).indices[:due]] = True
        self.updates += self.mask
        self.m = torch.where(self.mask, 0.9 * self.m + 0.1 * grad, 0)
        self.v = torch.where(self.mask, 0.999 * self.v + 0.001 * grad**2, 0)
        update = (self.m / (1 - 0.9**self.updates)) / ((self.v / (1 - 0.999**self.updates)).sqrt() + 1e-8)
        moved = theta * (1 - self.lr * self.weight_decay) - self.lr * update
        theta = torch.where(self.mask, moved, theta)
        for p, part in zip(self.parameters, theta.split([p.numel() for p in self.parameters])):
            p.copy_(part.view_as(p))
