"""Adapters for analyses."""

import torch


def noise(model, std: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
