"""AdamW whose state is that of chosen scalars alone, so that a sparse choice costs a sparse choice's memory."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ist.selection.shards import flat_part, flat_range, gather_parts


class PackedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for the scalars that were chosen; the others do not move at all, weight decay included.

    A scalar's moments begin at zero when it is chosen, and its bias correction counts its own updates: its first update
    is that of a fresh AdamW. With one count for all, a scalar chosen late would begin with a step of
    (1 - beta1) / sqrt(1 - beta2) = 3.2 times the learning rate.

    `state[parameter]` is of this rank's part of the parameter, flattened, k scalars of which are chosen:

    - indices [k]: int32 (int64 for parts of 2^31 scalars or more), in the order in which they were chosen;
    - exp_avg, exp_avg_sq [k]: the moments, in the parameter's dtype;
    - step [k]: int32, the updates that each has had.

    That is 16 bytes for each chosen float32 scalar; AdamW has 8 for each scalar.

    Args:
        params: parameters, or groups of them. They are made contiguous: indices count in their memory.
        lr, betas, eps, weight_decay: as AdamW's.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._updates = 0  # the most that any scalar has had
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.contiguous()

    def chosen(self, parameter: nn.Parameter) -> Tensor:
        """[k] indices into this rank's part of the parameter, flattened."""
        if parameter not in self.state:
            return torch.empty(0, dtype=torch.int32, device=flat_part(parameter).device)
        return self.state[parameter]["indices"]

    @torch.no_grad()
    def choose(self, parameter: nn.Parameter, indices: Tensor) -> None:
        """Let more scalars of this rank's part of the parameter move from now on; `indices` [j] are not chosen yet."""
        if not len(indices):
            return
        part = flat_part(parameter)
        new = {
            "indices": indices.to(torch.int32 if part.numel() < 2**31 else torch.int64),
            "exp_avg": part.new_zeros(len(indices)),
            "exp_avg_sq": part.new_zeros(len(indices)),
            "step": torch.zeros(len(indices), dtype=torch.int32, device=part.device),
        }
        old = self.state.get(parameter)
        self.state[parameter] = {key: torch.cat([old[key], new[key]]) for key in new} if old else new

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the chosen scalars (Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updates += 1
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            # By number of updates: a power for each scalar would cost more than all the rest.
            updates, like = torch.arange(self._updates + 1, dtype=torch.float64), flat_part(group["params"][0])
            step_sizes = (lr / (1 - beta1**updates)).to(like)
            roots = (1 - beta2**updates).sqrt().to(like)
            for parameter in group["params"]:
                if parameter.grad is None or parameter not in self.state:
                    continue
                state, part = self.state[parameter], flat_part(parameter)
                indices, exp_avg, exp_avg_sq = state["indices"], state["exp_avg"], state["exp_avg_sq"]
                gradient, weight = flat_part(parameter.grad)[indices], part[indices]
                state["step"] += 1
                exp_avg.lerp_(gradient, 1 - beta1)
                exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                denominator = exp_avg_sq.sqrt().div_(roots[state["step"]]).add_(group["eps"])
                weight.mul_(1 - lr * group["weight_decay"])
                part[indices] = weight.sub_(step_sizes[state["step"]].mul_(exp_avg).div_(denominator))
        return loss

    def state_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    def whole_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state as on one process: indices [k] (int64, ascending) into the whole parameter. All ranks call it."""
        state = self.state.get(parameter)
        whole = {}
        for key, dtype in (("step", torch.int32), ("exp_avg", parameter.dtype), ("exp_avg_sq", parameter.dtype)):
            dense = torch.zeros_like(flat_part(parameter), dtype=dtype)
            if state:
                dense[state["indices"]] = state[key]
            dense = gather_parts(dense, parameter)
            if key == "step":  # whatever is chosen was updated at once
                whole["indices"] = dense.nonzero().view(-1)
            whole[key] = dense[whole["indices"]]
        return whole if len(whole["indices"]) else {}

    def load_whole_state(self, parameter: nn.Parameter, whole: dict[str, Tensor]) -> None:
        """Load the state that `whole_state` gave, on any number of ranks."""
        start, stop = flat_range(parameter)
        mine = (whole["indices"] >= start) & (whole["indices"] < stop)
        device = flat_part(parameter).device
        self.choose(parameter, (whole["indices"][mine] - start).to(device))
        if parameter in self.state:
            values = {key: whole[key][mine].to(device) for key in ("exp_avg", "exp_avg_sq", "step")}
            self.state[parameter].update(values)
        self._updates = max(self._updates, int(whole["step"].max()))

    def load_state_dict(self, state_dict: dict) -> None:
        """For calls by torch and Accelerate before training. A state goes through `load_whole_state`.

        Raises:
            ValueError: there is a state in it; torch would make floats of its indices.
        """
        if state_dict["state"]:
            raise ValueError("PackedAdamW takes its state by load_whole_state, not by load_state_dict")
        super().load_state_dict(state_dict)
