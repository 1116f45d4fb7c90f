"""How the candidate losses of an importance update are measured (Eq. 8), or estimated.

Each function gives [N_c, 2] float64 for this rank's share of the probe rows: (sum of token losses, predicted tokens) of
every candidate set. `batches()` is this rank's share of the probe rows, the same at each call. Call them within
`suppression.evaluation_mode`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ist.adapters.support import ROW_GATES, limit
from ist.layers import LayerMap, drop_input_grad_hooks
from ist.loss import Loss, predicted_tokens, row_loss_sums, row_predicted_tokens, token_loss, total_loss
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


class GateDerivatives(NamedTuple):
    """Of U rows (batches, where rows cannot have a gate each) of this rank, float64.

    Attributes:
        loss: [U] sums of token losses.
        by_gate: [U, n] their derivatives by the gates of n layers.
        tokens: [U] predicted tokens.
    """

    loss: Tensor
    by_gate: Tensor
    tokens: Tensor


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Activations are computed again in the backward, which then needs the memory of one layer's."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    served = getattr(base, "supports_gradient_checkpointing", False)
    if not served or base.is_gradient_checkpointing:
        yield
        return
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    drop_input_grad_hooks(model)
    try:
        yield
    finally:
        base.gradient_checkpointing_disable()


def gate_derivatives(
    model: nn.Module,
    layers: LayerMap,
    probed: Sequence[int],
    gate: float,
    batches: Iterable[dict[str, Tensor]],
    loss: Loss = token_loss,
) -> GateDerivatives:
    """Losses with the responses of the `probed` layers multiplied by `gate`, and their derivatives by these gates.

    Rows have a gate each where the adapters allow, the loss is `token_loss`, and no rows are packed into one.
    """
    by_row = loss is token_loss and not any(limit(config, ROW_GATES) for config in model.peft_config.values())
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with _all_frozen(model), _checkpointed(model), torch.enable_grad():
        for batch in batches:
            try:
                if not by_row or "position_ids" in batch:
                    raise RowsMixed
                parts.append(_derivatives(model, layers, probed, gate, batch, loss, len(batch["labels"])))
            except RowsMixed:
                parts.append(_derivatives(model, layers, probed, gate, batch, loss, None))
    return GateDerivatives(*(torch.cat(tensors).double() for tensors in zip(*parts, strict=True)))


def _derivatives(
    model: nn.Module,
    layers: LayerMap,
    probed: Sequence[int],
    gate: float,
    batch: dict[str, Tensor],
    loss: Loss,
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """([U] losses, [U, n] derivatives, [U] tokens) of a batch: of each of its `rows`, or (None) of all together."""
    device = next(model.parameters()).device
    shape, length = ((), 1) if rows is None else ((rows,), batch["labels"].shape[1])
    gates = [torch.full(shape, gate, device=device, requires_grad=True) for _ in probed]
    with ExitStack() as hooks:
        for i, of_layer in zip(probed, gates, strict=True):
            hooks.enter_context(suppress(layers.modules[i], of_layer, length))
        if rows is None:
            losses, tokens = loss(model, batch)
        else:
            losses, tokens = row_loss_sums(model, batch), row_predicted_tokens(model, batch)
        by_gate = torch.autograd.grad(losses.sum(), gates)  # here: checkpointing runs layers again, with their hooks
    tokens = torch.as_tensor(tokens, device=device)
    return losses.detach().reshape(-1), torch.stack(by_gate, dim=-1).reshape(-1, len(probed)), tokens.reshape(-1)


def estimated(
    model: nn.Module,
    layers: LayerMap,
    candidates: Sequence[Sequence[int]],
    suppression: float,
    batches: Batches,
    loss: Loss = token_loss,
    probed: Sequence[int] | None = None,
) -> Tensor:
    """Losses to first order around the mean gate g0: L(g0) + sum over layers of (g_ij - g0) dL/dg_i. Not the paper's.

    At g = 1 the loss is flat in every gate; at the mean gate its derivatives tell layers apart.

    Args:
        probed: the layers that candidate sets choose from; default: all. The others keep their response.
    """
    probed = range(layers.n_layers) if probed is None else probed
    kept = sum(i in candidates[0] for i in probed) / len(probed)
    mean_gate = kept + suppression * (1 - kept)
    loss_of, by_gate, tokens = gate_derivatives(model, layers, probed, mean_gate, batches(), loss)
    gates = torch.tensor([[1.0 if i in kept else suppression for i in probed] for kept in candidates])
    losses = loss_of.sum() + (gates.to(by_gate) - mean_gate) @ by_gate.sum(dim=0)
    return torch.stack([losses, tokens.sum().expand_as(losses)], dim=1)


def effect_sums(found: GateDerivatives) -> Tensor:
    """What `effects` needs of this rank's rows, to be summed over ranks: [4 + 2 + 5 n] float64."""
    loss, by_gate, tokens = found
    centred = by_gate - by_gate.mean(dim=1, keepdim=True)
    halves = [centred[half::2].sum(dim=0) for half in (0, 1)]
    counts = torch.stack([loss.sum(), tokens.sum(), (tokens > 0).sum(), tokens.square().sum()])
    of_halves = torch.stack([tokens[half::2].sum() for half in (0, 1)])
    products = [centred.sum(dim=0), centred.square().sum(dim=0), (centred * tokens[:, None]).sum(dim=0)]
    return torch.cat([counts, of_halves, *products, *halves])


class Effects(NamedTuple):
    """What keeping a layer is worth, of n layers, float64.

    Attributes:
        loss: the mean over predicted tokens at the mean gate.
        effects: [n] a_i - mean a, with a_i = exp(-L) (1 - beta) (-dL/dg_i): how much exp(-L) gains where the layer
            keeps its response, to first order.
        standard_errors: [n] theirs, by the spread over rows; None with fewer than two.
        split_half: correlation over layers of the effects of one half of the rows with the other's; None likewise.
    """

    loss: float
    effects: Tensor
    standard_errors: Tensor | None
    split_half: float | None


def effects(sums: Tensor, suppression: float) -> Effects:
    """From the sum over ranks of `effect_sums`."""
    (loss, tokens, rows, squares, *of_halves), products = sums[:6].tolist(), sums[6:].view(5, -1)
    total, square, by_tokens, *halves = products
    mean = total / tokens
    factor = -math.exp(-loss / tokens) * (1 - suppression)
    if rows < 2:
        return Effects(loss / tokens, factor * mean, None, None)
    # Of a ratio of sums over rows, to first order: its residuals are those of each row.
    residuals = square - 2 * mean * by_tokens + mean.square() * squares
    errors = (rows / (rows - 1) * residuals.clamp_min(0)).sqrt() / tokens
    both = all(count > 0 for count in of_halves) and len(mean) > 2
    agreement = torch.corrcoef(torch.stack(halves))[0, 1].item() if both else None
    agreement = None if agreement is not None and math.isnan(agreement) else agreement
    return Effects(loss / tokens, factor * mean, abs(factor) * errors, agreement)
