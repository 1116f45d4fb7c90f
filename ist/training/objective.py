"""The objective of a run: its batches, their loss, and the gradient, the same on any number of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn

from ist.config import ISTConfig
from ist.distributed import GradientReducer, reduce_sum
from ist.loss import count_predicted, token_loss_sum, total_loss
from ist.probe import probe_rows
from ist.sampler import seeded_generator
from ist.suppression import evaluation_mode
from ist.training.arguments import Resolved
from ist.training.command_line import UsageError
from ist.training.data import Data, GlobalBatches, dealt_by_length, micro_batches

try:
    from transformers.integrations import neftune_post_forward_hook
except ImportError:  # of transformers 5.0
    from transformers.trainer_utils import neftune_post_forward_hook

Batch = dict[str, Tensor]


@dataclass
class GlobalBatch:
    """The rows of one optimizer step: this rank's micro-batches; tokens, and predicted tokens, of all ranks."""

    micro_batches: list[Batch]
    tokens: int
    predicted: int


class Objective:
    """Batches, loss and backward of a run.

    Args:
        model: prepared by Accelerate; losses go through it unwrapped.
        parameters: all that ever trains.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        data: Data,
        args: Resolved,
        config: ISTConfig,
    ) -> None:
        self.accelerator, self.model, self.data, self.args, self.config = accelerator, model, data, args, config
        self.unwrapped = accelerator.unwrap_model(model)
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self._lengths = [len(ids) for ids in data.rows["input_ids"]]
        self._predicted = [count_predicted(labels) for labels in data.rows["labels"]]
        self.stream = GlobalBatches(len(data.rows), args.global_batch_size, config.seed)
        self._reducer = GradientReducer(() if self.sharded else parameters)
        if args.neftune_noise_alpha is not None:
            # Noise of the generator that seed_dropout seeds, so the same on resume; evaluation_mode is without it.
            embeddings = self.unwrapped.get_input_embeddings()
            embeddings.neftune_noise_alpha = args.neftune_noise_alpha
            embeddings.register_forward_hook(neftune_post_forward_hook)

    def batches(
        self,
        rows: Dataset,
        indices: Sequence[int],
        tokens: int | None = None,
        packing: bool | None = None,
        size: int | None = None,
    ) -> Iterator[Batch]:
        """This rank's share of `indices`, in micro-batches of `size` rows on its device; of each row the last `tokens`.

        Args:
            packing, size: by default those of training.
        """
        ranks = (self.accelerator.process_index, self.accelerator.num_processes)
        packing = self.args.packing if packing is None else packing
        size, pad = size or self.args.per_device_train_batch_size, self.data.pad_token_id
        for batch in micro_batches(rows, indices, size, *ranks, pad, tokens, packing):
            yield {key: tensor.to(self.accelerator.device) for key, tensor in batch.items()}

    def loss_over(self, rows: Dataset, indices: Sequence[int], *options: Any) -> Tensor:
        """[2] float64: (sum of token losses, predicted tokens) over this rank's share of `indices`."""
        with self.accelerator.autocast():
            return total_loss(self.unwrapped, self.batches(rows, indices, *options))

    def probe_batches(self, step: int | str) -> Iterator[Batch]:
        """Of the importance update of `step`, or of "calibration"."""
        calibration = step == "calibration"
        count = self.config.semantic_rows if calibration else self.args.probe_batch_size
        indices = probe_rows(len(self.data.rows), count, self.config.seed, step)
        return self.batches(self.data.rows, indices, None if calibration else self.args.probe_max_length)

    def validation_loss(self) -> float:
        with evaluation_mode(self.unwrapped):
            rows, size = self.data.validation, self.args.per_device_eval_batch_size
            loss_sum, count = reduce_sum(self.loss_over(rows, range(len(rows)), None, None, size))
        return (loss_sum / count).item()

    def global_batch(self, step: int) -> GlobalBatch:
        """Every rank knows the whole batch, so it can divide by the batch's predicted tokens without asking."""
        indices = self.stream.rows(step)
        tokens, predicted = (sum(counts[i] for i in indices) for counts in (self._lengths, self._predicted))
        if self.args.train_sampling_strategy == "group_by_length":
            size, ranks = self.args.per_device_train_batch_size, self.accelerator.num_processes
            indices = dealt_by_length(indices, self._lengths, size, ranks, self.args.packing)
        return GlobalBatch(list(self.batches(self.data.rows, indices)), tokens, predicted)

    def seed_dropout(self, step: int) -> None:
        generator = seeded_generator(self.config.seed, step, self.accelerator.process_index, "dropout")
        torch.manual_seed(generator.initial_seed())

    def forward(self, batch: Batch, predicted: int) -> Tensor:
        """A micro-batch's part of the mean over the global batch's `predicted` tokens."""
        with self.accelerator.autocast():
            return token_loss_sum(self.unwrapped, batch) / predicted

    def backward(self, loss: Tensor, last: bool, buckets: Sequence[Sequence[nn.Parameter]]) -> None:
        """Of the `last` micro-batch the gradients are sent as they come, by bucket in the order of the backward."""
        if last and not self.sharded:
            self._reducer.begin(buckets)
        if self.sharded:  # Accelerator.no_sync of Accelerate 1.10 does nothing under FSDP2
            self.model.set_requires_gradient_sync(last)
        # FSDP takes the mean over ranks.
        self.accelerator.backward(loss * (self.accelerator.num_processes if self.sharded else 1))

    def reduce(self) -> None:
        """Now every gradient is the sum over ranks."""
        self._reducer.finish()

    def first_forward(self, resumed: bool) -> None:
        """FSDP fixes each group's reduce dtypes at its first forward, from the parameters that train then: all must.

        Raises:
            UsageError: rows would be packed, and the model gives packed rows another loss; of a run that begins.
        """
        if self.sharded:
            with evaluation_mode(self.unwrapped):
                self.loss_over(self.data.rows, [0])
        # Later, trained weights round further apart in bfloat16, and the comparison no longer shows a leak.
        if self.args.packing and not resumed:
            self._require_packing_alike()

    def _require_packing_alike(self) -> None:
        rows = range(min(len(self.data.rows), self.args.global_batch_size))
        with evaluation_mode(self.unwrapped):
            packed, unpacked = (
                reduce_sum(self.loss_over(self.data.rows, rows, None, packing)) for packing in (True, False)
            )
        coarse = self.args.bf16 or self.args.dtype == "bfloat16"
        if not torch.allclose(packed, unpacked, rtol=5e-3 if coarse else 1e-4):
            raise UsageError(
                f"--packing true changes this model's loss (packed {packed[0] / packed[1]:.5f}, unpacked "
                f"{unpacked[0] / unpacked[1]:.5f}): attention or state leaks between examples. Set --packing false."
            )
