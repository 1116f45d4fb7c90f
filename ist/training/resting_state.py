"""The optimizer's state of layers that rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ist.distributed import local_tensor, with_local
from ist.layers import LayerMap


def _to_host(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return pinned.copy_(tensor, non_blocking=True)


class RestingState:
    """Moments of layers that rest: dropped, or on the CPU until the layer trains again.

    drop: memory for the trained layers only; a layer that is drawn again starts with zero moments, as at first.
    offload: the same memory on the GPU, and the moments survive; they go and come when layers change.

    Args:
        optimizer: torch's, not Accelerate's wrapper of it.
        layers: whose parameters' state it is; parameters outside the layers keep theirs in place.
        policy: "keep" (nothing is done), "drop" or "offload".
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: LayerMap, policy: str) -> None:
        self.optimizer = optimizer
        self.layers = layers
        self.policy = policy
        self._away: dict[int, dict[torch.nn.Parameter, dict[str, Tensor]]] = {}

    def switch(self, trained: Sequence[int]) -> None:
        """Call when the layers of a step are known, before its optimizer.step."""
        if self.policy == "keep":
            return
        self._bring_back([i for i in trained if i in self._away])
        for i, parameters in enumerate(self.layers.parameters):
            states = {
                p: self.optimizer.state.pop(p) for p in parameters if i not in trained and p in self.optimizer.state
            }
            if states and self.policy == "offload":
                self._away[i] = {p: {key: self._host(p, value) for key, value in states[p].items()} for p in states}

    def restore(self) -> None:
        """Bring all moments back, for a checkpoint; `switch` sends them away again."""
        self._bring_back(list(self._away))

    @staticmethod
    def _host(parameter: torch.nn.Parameter, value: Tensor) -> Tensor:
        # A step count is a scalar on the CPU already.
        return _to_host(local_tensor(value)) if value.shape == parameter.shape else value

    def _bring_back(self, layers: Sequence[int]) -> None:
        for i in layers:
            for parameter, state in self._away.pop(i).items():
                shard = local_tensor(parameter).shape
                self.optimizer.state[parameter] = {
                    key: with_local(value.to(parameter.device, non_blocking=True), parameter)
                    if key != "step" and value.shape == shard
                    else value
                    for key, value in state.items()
                }
