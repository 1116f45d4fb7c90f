"""How the candidate losses of an importance update are measured (Eq. 8), or estimated.

Each function gives [N_c, 2] float64 for this rank's share of the probe rows: (sum of token losses, predicted tokens) of
every candidate set. `batches()` is this rank's share of the probe rows, the same at each call. Call them within
`suppression.evaluation_mode`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ist.adapters.support import ROW_GATES, limit
from ist.layers import LayerMap
from ist.loss import Loss, predicted_tokens, row_loss_sums, token_loss, total_loss
from ist.sampler import seeded_generator
from ist.suppression import RowsMixed, suppress

Batches = Callable[[], Iterable[dict[str, Tensor]]]


def probe_rows(n_rows: int, count: int, seed: int, step: int | str) -> list[int]:
    """`count` distinct row indices (all rows when there are fewer) for the importance update of `step`.

    `step` "calibration" gives the rows of the pass before training.
    """
    return torch.randperm(n_rows, generator=seeded_generator(seed, step, "probe"))[:count].tolist()


def one_by_one(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    suppression: float,
    batches: Batches,
    loss: Loss = token_loss,
) -> Tensor:
    """The paper's probe: the loss once for each candidate set, with all layers outside the set suppressed."""
    sums = []
    for kept in candidates:
        with suppress(layers.tuners_outside(kept), suppression):
            sums.append(total_loss(model, batches(), loss))
    return torch.stack(sums)


def stacked(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    suppression: float,
    batches: Batches,
    loss: Loss = token_loss,
) -> Tensor:
    """All candidates in one forward a batch, which stands there once for each: N_c times fewer gathers when sharded.

    One by one where rows cannot have a gate each, and with a loss that is not `token_loss`.
    """
    sums = torch.zeros(len(candidates), 2, dtype=torch.float64, device=next(model.parameters()).device)
    mixed = loss is not token_loss or any(limit(config, ROW_GATES) for config in model.peft_config.values())
    flash = not mixed and "flash" in str(model.config._attn_implementation)  # it knows packed rows by a batch of one
    for batch in batches():
        try:
            if mixed or (flash and "position_ids" in batch):
                raise RowsMixed
            sums[:, 0] += _stacked_losses(model, layers, candidates, suppression, batch)
            sums[:, 1] += predicted_tokens(model, batch)
        except RowsMixed:
            sums += one_by_one(model, layers, candidates, suppression, partial(list, [batch]), loss)
    return sums


def _stacked_losses(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    suppression: float,
    batch: dict[str, Tensor],
) -> Tensor:
    """[N_c] float64, sums of token losses of a batch."""
    rows, length = batch["labels"].shape
    repeated = {key: value.repeat(len(candidates), *[1] * (value.dim() - 1)) for key, value in batch.items()}
    with ExitStack() as hooks:
        for i, modules in enumerate(layers.modules):
            gates = [1.0 if i in kept else suppression for kept in candidates]
            if set(gates) != {1.0}:
                by_row = torch.tensor(gates, device=model.device).repeat_interleave(rows)
                hooks.enter_context(suppress(modules, by_row, length))
        return row_loss_sums(model, repeated).double().view(len(candidates), rows).sum(dim=1)


@contextmanager
def _all_frozen(model: nn.Module) -> Iterator[None]:
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def gate_derivatives(
    model: nn.Module, layers: LayerMap, batches: Iterable[dict[str, Tensor]], loss: Loss = token_loss
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its derivatives by the layers' responses g_i at g = 1, predicted tokens): sums, float64; [], [N_L], []."""
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    derivatives = torch.zeros(layers.n_layers, dtype=torch.float64, device=device)
    tokens = torch.zeros_like(loss_sum)
    with _all_frozen(model), torch.enable_grad():
        for batch in batches:
            gates = [torch.ones((), device=device, requires_grad=True) for _ in layers.modules]
            with ExitStack() as hooks:
                for modules, gate in zip(layers.modules, gates, strict=True):
                    hooks.enter_context(suppress(modules, gate))
                batch_loss, predicted = loss(model, batch)
                by_layer = torch.autograd.grad(
                    batch_loss, gates
                )  # here: checkpointing runs layers again, with their hooks
            loss_sum += batch_loss.detach()
            derivatives += torch.stack(by_layer)
            tokens += predicted
    return loss_sum, derivatives, tokens


def estimated(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    suppression: float,
    batches: Batches,
    loss: Loss = token_loss,
) -> Tensor:
    """Losses to first order: L + sum over the suppressed layers of (suppression - 1) dL/dg_i. Not the paper's."""
    loss_sum, derivatives, tokens = gate_derivatives(model, layers, batches(), loss)
    outside = torch.tensor([[float(i not in kept) for i in range(layers.n_layers)] for kept in candidates])
    losses = loss_sum + (suppression - 1) * (outside.to(derivatives) @ derivatives)
    return torch.stack([losses, tokens.expand_as(losses)], dim=1)
