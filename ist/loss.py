"""The training loss: cross entropies summed over predicted tokens, and how many tokens those are."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

IGNORE = -100  # the label of a token that is not predicted, as in torch's cross_entropy
CHUNK = 2**24  # logits that are float32 at a time: 64 MiB; on a CPU 1 MiB, which stays in its cache (2.4 times as fast)
CPU_CHUNK = 2**18


def _chunk_rows(logits: Tensor) -> int:
    return max(1, (CPU_CHUNK if logits.device.type == "cpu" else CHUNK) // logits.shape[1])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of [N, V] logits that are narrower than float32, computed in float32 chunk by chunk.

    PyTorch's own wants float32 logits and keeps their log-softmax: 8 bytes an entry on top of the logits, and 4 for
    their gradient. Here the logits themselves are kept, with a [N] logsumexp.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        size = _chunk_rows(logits)
        logsumexp = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part, wanted, out in zip(logits.split(size), labels.split(size), logsumexp.split(size), strict=True):
            out.copy_(part.float().logsumexp(dim=1))
            picked = part.gather(1, wanted.clamp_min(0)[:, None])[:, 0].float()
            total += (out - picked).where(wanted != IGNORE, 0).sum()
        ctx.save_for_backward(logits, labels, logsumexp)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, logsumexp = ctx.saved_tensors
        size, result = _chunk_rows(logits), torch.empty_like(logits)
        parts = (tensor.split(size) for tensor in (logits, labels, logsumexp, result))
        for part, wanted, normal, out in zip(*parts, strict=True):
            probability = (part.float() - normal[:, None]).exp_()
            probability.scatter_add_(1, wanted.clamp_min(0)[:, None], torch.full_like(normal, -1)[:, None])
            out.copy_(probability.mul_(gradient).masked_fill_((wanted == IGNORE)[:, None], 0))
        return result, None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross entropies of [N, V] logits, a float32 scalar; labels [N], -100 where none counts."""
    if logits.dtype.itemsize >= 4:
        return cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    return _ChunkedCrossEntropy.apply(logits, labels)


def _logits_and_labels(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """([B, T, V] logits, [B, T] labels, -100 where nothing is predicted), position by position; T may be one less."""
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        return model(**batch, use_cache=False).logits, labels
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    if logits.dtype.itemsize >= 4:
        return logits[:, :-1], labels[:, 1:]
    # Not logits[:, :-1], which could not be flattened without a copy.
    return logits, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the cross entropies of the predicted tokens of a batch, a float32 scalar.

    Args:
        batch: the model's inputs, and labels [B, T] with -100 where nothing is predicted; on the model's device.
    """
    logits, labels = _logits_and_labels(model, batch)
    return cross_entropy_sum(logits.flatten(0, 1), labels.flatten())


def row_loss_sums(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same for each row of the batch: [B] float32."""
    logits, labels = _logits_and_labels(model, batch)
    return torch.stack([cross_entropy_sum(*row) for row in zip(logits, labels, strict=True)])


def predicted_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """How many tokens of a batch the loss counts, an int64 scalar. The first token of a row is predicted by an
    encoder-decoder alone, whose decoder begins with a token of its own."""
    return row_predicted_tokens(model, batch).sum()


def row_predicted_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same for each row of the batch: [B] int64."""
    labels = batch["labels"]
    return ((labels if model.config.is_encoder_decoder else labels[:, 1:]) != IGNORE).sum(dim=1)


def count_predicted(labels: Sequence[int]) -> int:
    """The same of a row's labels, for a decoder."""
    return sum(label != IGNORE for label in labels[1:])


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies of a batch's predicted tokens, their number): the default loss of `SparseTuner`."""
    return token_loss_sum(model, batch), predicted_tokens(model, batch)


Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]


def total_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], loss: Loss = token_loss) -> Tensor:
    """[2] float64: (sum of losses, number of predicted tokens) over this rank's batches."""
    total = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        loss_sum, tokens = loss(model, batch)
        total[0] += loss_sum
        total[1] += tokens
    return total
