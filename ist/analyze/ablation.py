"""Losses of an adapter as the responses of its layers are ablated one by one, for `python -m ist.analyze`.

Every evaluation is a line of a file and is made once; candidates are shared out over ranks.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ist.distributed import reduce_sum
from ist.layers import LayerMap
from ist.loss import total_loss
from ist.suppression import evaluation_mode, suppress
from ist.training.command_line import UsageError
from ist.training.files import keep_lines, read_lines, writing

# The choice of a layer at each stage, by the losses without it: the lowest loss means that it matters least.
DIRECTIONS = {"least": min, "most": max}


Batch = dict[str, Tensor]


class Tokens(NamedTuple):
    batches: list[Batch]  # input_ids, attention_mask, labels, [B, S], on the device
    predicted: int  # the loss is their mean


def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean cross entropy of the predicted tokens.

    Raises:
        UsageError: it is not finite.
    """
    with evaluation_mode(model):
        loss, predicted = total_loss(model, batches).tolist()
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss}: there is nothing to compare. Try --dtype float32.")
    return loss / predicted


class AblationLoss:
    """The loss of some tokens, with the adapter responses of a set of layers ablated (suppressed with g = 0).

    The ablation of one layer more changes nothing below it. So the outputs of all blocks are kept once for the layers
    that are ablated already, and for a candidate the blocks below it return these instead of running; masks,
    positions, norm and head are the model's own. Kept are [tokens, hidden size] for each block, padding included.

    Attributes:
        full: the loss with all layers.
        reuses: whether blocks are skipped; false if a block needs more than the outputs of those below.

    Raises:
        UsageError: the adapter has no layers.
    """

    def __init__(self, model: nn.Module, tokens: Tokens) -> None:
        self.model, self.tokens = model, tokens
        self.layers = LayerMap(model)
        self.full = self._keep([])
        self.reuses = self._can_reuse()

    def __call__(self, removed: Sequence[int], layer: int) -> float:
        below = self.layers.positions[layer] if self.reuses else 0
        if below and self._kept_for != set(removed):
            self._keep(removed)
        return self._loss([*removed, layer], below)

    def _loss(self, removed: Iterable[int], below: int = 0) -> float:
        """With the kept outputs of the blocks under `below`."""
        blocks, modules = self.layers.all_blocks[:below], [m for i in removed for m in self.layers.modules[i]]
        replayed = _replayed(blocks, self._outputs, self.tokens.batches)
        with suppress(modules, 0.0), closing(replayed) as batches:
            return mean_loss(self.model, batches)

    def _keep(self, removed: Sequence[int]) -> float:
        """The loss without `removed`; keeps the output of each block under the topmost layer, for each batch."""
        self._outputs: list[list[Any]] = [[] for _ in self.tokens.batches]
        kept: list[Any] = []
        blocks = self.layers.all_blocks[: self.layers.positions[-1]]
        handles = [block.register_forward_hook(lambda block, args, output: kept.append(output)) for block in blocks]
        try:
            loss = self._loss(removed)
        finally:
            for handle in handles:
                handle.remove()
        self._outputs = [kept[i * len(blocks) : (i + 1) * len(blocks)] for i in range(len(self.tokens.batches))]
        self._kept_for = set(removed)
        return loss

    def _can_reuse(self) -> bool:
        """Whether the topmost layer, run by itself on the kept outputs, gives the loss of the whole model.

        It does not where layers share more than their outputs (keys and values of several), or run twice.
        """
        try:
            return math.isclose(self._loss([], self.layers.positions[-1]), self.full, rel_tol=1e-6)
        except Exception:  # of any kind: a block misses something of one that did not run
            return False


def _replayed(blocks: Sequence[nn.Module], outputs: list[list[Any]], batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches; while one is in use, each of `blocks` returns its output for it instead of running."""

    def returning(output: Any) -> Callable:
        return lambda *args, **kwargs: output

    try:
        for kept, batch in zip(outputs, batches, strict=True):
            for block, output in zip(blocks, kept):
                block.forward = returning(output)
            yield batch
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


class Ablations:
    """Evaluations, each made once: those in ablations.jsonl are not measured again. All ranks make the same calls."""

    def __init__(self, file: Path, n_layers: int, ablation: Callable[[], AblationLoss], state: PartialState) -> None:
        self.file, self.n_layers, self.ablation, self.state = file, n_layers, ablation, state
        keys = {"direction": str, "stage": int, "removed": list, "layer": int, "loss": float}
        lines = [
            line for line in read_lines(file) if all(isinstance(line.get(key), kind) for key, kind in keys.items())
        ]
        self.done = {(line["direction"], line["stage"], line["layer"]) for line in lines}
        self.known = {frozenset([*line["removed"], line["layer"]]): line["loss"] for line in lines}
        state.wait_for_everyone()  # nobody writes before everybody has read
        if state.is_main_process:
            keep_lines(file, lambda line: True)  # without one that a kill cut short

    def losses(self, direction: str, removed: list[int]) -> dict[int, float]:
        """{layer: loss without it and `removed`} for each layer that is left, in order, on every rank."""
        left = [i for i in range(self.n_layers) if i not in removed]
        stage = len(removed) + 1
        todo = [i for i in left if (direction, stage, i) not in self.done]
        self.done.update((direction, stage, i) for i in todo)
        # A layer for each rank at a time: neighbours, which take equally long.
        for first in range(0, len(todo), self.state.num_processes):
            together = todo[first : first + self.state.num_processes]
            losses = torch.zeros(self.n_layers, dtype=torch.float64, device=self.state.device)
            for layer in together[self.state.process_index :][:1]:
                loss = self.known.get(frozenset([*removed, layer]))
                losses[layer] = self.ablation()(removed, layer) if loss is None else loss
            found = reduce_sum(losses).tolist()
            self.known |= {frozenset([*removed, layer]): found[layer] for layer in together}
            if self.state.is_main_process:
                lines = ({"direction": direction, "stage": stage, "removed": removed, "layer": i} for i in together)
                with writing(self.file), open(self.file, "a") as stream:
                    stream.writelines(json.dumps(line | {"loss": found[line["layer"]]}) + "\n" for line in lines)
        if todo:
            self.state.print(f"{direction} important first: stage {stage} of {self.n_layers}", flush=True)
        return {layer: self.known[frozenset([*removed, layer])] for layer in left}


def ablate_greedily(
    direction: str, n_layers: int, losses_without: Callable[[list[int]], dict[int, float]]
) -> dict[str, list]:
    """{order: layers as they were ablated, losses: after each}; of layers with equal losses the lowest goes first.

    Args:
        losses_without: of the ablated layers, {layer: loss without it as well} for the others, lowest first.
    """
    order, after = [], []
    for _ in range(n_layers):
        losses = losses_without(order)
        order.append(DIRECTIONS[direction](losses, key=losses.get))
        after.append(losses[order[-1]])
    return {"order": order, "losses": after, "perplexities": [math.exp(loss) for loss in after]}
