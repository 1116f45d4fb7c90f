"""How the candidate losses of an importance update are measured (Eq. 8), or estimated.

Each function gives [N_c, 2] float64 for this rank's share of the probe rows: (sum of token losses, predicted tokens) of
every candidate set. Call them within `suppression.measuring`.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftType
from torch import Tensor, nn

from ist.layers import LayerMap
from ist.loss import IGNORE, row_loss_sums, token_loss_sum
from ist.suppression import suppress

# Methods whose response to a row depends on the other rows of the batch: Lily's router takes means over all of it.
ROWS_MIX = {PeftType.LILY}


def one_by_one(
    layers: LayerMap, candidates: Sequence[Sequence[int]], beta: float, loss: Callable[[], Tensor]
) -> Tensor:
    """The paper's probe: `loss`, [2], once for each candidate set, with beta on all layers outside the set."""
    sums = []
    for kept in candidates:
        with suppress(layers.tuners_outside(kept), beta):
            sums.append(loss().double())
    return torch.stack(sums)


def _predicted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    return ((labels if model.config.is_encoder_decoder else labels[:, 1:]) != IGNORE).sum()


def stacked(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    beta: float,
    batches: Iterable[dict[str, Tensor]],
) -> Tensor:
    """All candidates in one forward a batch, which stands there once for each: N_c times fewer gathers when sharded."""
    sums = torch.zeros(len(candidates), 2, dtype=torch.float64, device=model.device)
    if any(config.peft_type in ROWS_MIX for config in model.peft_config.values()):

        def loss(batch: dict[str, Tensor]) -> Tensor:
            return torch.stack([token_loss_sum(model, batch), _predicted(model, batch)])

        for batch in batches:
            sums += one_by_one(layers, candidates, beta, lambda batch=batch: loss(batch))
        return sums
    response = torch.tensor([[1.0 if i in kept else beta for kept in candidates] for i in range(layers.n_layers)])
    for batch in batches:
        rows = len(batch["labels"])
        repeated = {key: value.repeat(len(candidates), *[1] * (value.dim() - 1)) for key, value in batch.items()}
        with ExitStack() as hooks:
            for modules, gates in zip(layers.modules, response.to(sums.device), strict=True):
                if not (gates == 1).all():
                    hooks.enter_context(suppress(modules, gates.repeat_interleave(rows)))
            sums[:, 0] += row_loss_sums(model, repeated).double().view(len(candidates), rows).sum(dim=1)
        sums[:, 1] += _predicted(model, batch)
    return sums


@contextmanager
def _all_frozen(model: nn.Module):
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def gate_derivatives(
    model: nn.Module, layers: LayerMap, batches: Iterable[dict[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its derivatives by the layers' responses g_i at g = 1, predicted tokens): sums, float64; [], [N_L], []."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    derivatives = torch.zeros(layers.n_layers, dtype=torch.float64, device=model.device)
    tokens = torch.zeros_like(loss_sum)
    with _all_frozen(model), torch.enable_grad():
        for batch in batches:
            rows = len(batch["labels"])
            gates = [torch.ones(rows, device=model.device, requires_grad=True) for _ in layers.modules]
            with ExitStack() as hooks:
                for modules, gate in zip(layers.modules, gates, strict=True):
                    hooks.enter_context(suppress(modules, gate))
                loss = token_loss_sum(model, batch)
                by_row = torch.autograd.grad(loss, gates)  # here: checkpointing runs layers again, with their hooks
            loss_sum += loss.detach()
            derivatives += torch.stack(by_row).double().sum(dim=1)
            tokens += _predicted(model, batch)
    return loss_sum, derivatives, tokens


def estimated(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    beta: float,
    batches: Iterable[dict[str, Tensor]],
) -> Tensor:
    """Candidate losses to first order: L + sum over the suppressed layers of (beta - 1) dL/dg_i. Not the paper's."""
    loss_sum, derivatives, tokens = gate_derivatives(model, layers, batches)
    outside = torch.tensor([[float(i not in kept) for i in range(layers.n_layers)] for kept in candidates])
    losses = loss_sum + (beta - 1) * (outside.to(derivatives) @ derivatives)
    return torch.stack([losses, tokens.expand_as(losses)], dim=1)
