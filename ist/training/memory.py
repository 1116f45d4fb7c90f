"""The memory of one training step, by part, counted operation by operation; without a device, if need be.

The step itself is run, by the same functions as in training: forward with `token_loss_sum`, backward, clipping,
optimizer. A storage counts from the operation that makes it to the moment its last reference goes. On fake tensors
nothing is allocated or computed, so that a 13B model is counted in seconds; on real ones the same code counts what is
there, which is how the tests know that both agree.

Not counted, as no operation of torch makes it: the workspace inside a kernel (cuBLAS, attention), the CUDA context,
the allocator's reserve, rounding to its blocks.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PretrainedConfig, masking_utils

from ist.config import ISTConfig
from ist.layers import LayerMap
from ist.loss import token_loss_sum
from ist.selection import SemanticFreezing, make_rule
from ist.selection.rule import SelectionRule
from ist.training.arguments import Resolved
from ist.training.model import load_skeleton
from ist.training.packages import installed, is_packed
from ist.training.prepare import make_optimizer
from ist.training.train_arguments import TORCH_OPTIMIZERS

PARTS = ("weights", "optimizer", "gradients", "saved", "temporary")


class LiveBytes(TorchDispatchMode):
    """Within the context, every storage that an operation makes: when, how large, and when it goes.

    torch's own MemTracker stops at the first frozen parameter ("cannot register a hook on a tensor that doesn't
    require gradient"), and here most parameters are frozen.

    Attributes:
        events: [(number of the storage, its bytes when made, minus its bytes when freed)], in order.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        """`there`: tensors from before, whose storages are not counted."""
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._numbers = WeakIdKeyDictionary()
        self._watches: list[weakref.ref] = []
        for tensor in there:
            self._numbers[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.number(value)
        return result

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's storage; -1 for one from before."""
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            number, size = len(self._watches), storage.nbytes()
            self._numbers[storage] = number
            self.events.append((number, size))
            self._watches.append(weakref.ref(storage, lambda _: self.events.append((number, -size))))
        return self._numbers[storage]

    def alive(self) -> dict[int, int]:
        """{number: bytes} of the live storages."""
        return _alive(self.events)


def _alive(events: Sequence[tuple[int, int]]) -> dict[int, int]:
    alive: dict[int, int] = {}
    for number, size in events:
        if size >= 0:
            alive[number] = size
        else:
            del alive[number]
    return alive


@dataclass
class StepMemory:
    """Bytes of one optimizer step on one device.

    Attributes:
        weights: parameters, adapters among them, and buffers.
        optimizer: state of all parameters that ever train; unless `optimizer_state` is keep, of those of this step.
        gradients: of the parameters that train at this step.
        saved: tensors that the forward keeps for the backward, log-probabilities included.
        moments: {"forward", "backward", "optimizer step": {part: bytes}}, the parts where their sum is largest in it;
            `temporary` is the rest: logits and their gradient, gradients of activations, what
            checkpointing computes anew, unpacked 4-bit weights.
    """

    weights: int
    optimizer: int
    gradients: int
    saved: int
    moments: dict[str, dict[str, int]]

    @property
    def moment(self) -> str:
        """When the peak is."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        return self.moments[self.moment]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak, "moment": self.moment}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({id(storage): storage.nbytes() for storage in [t.untyped_storage() for t in tensors]}.values())


def weight_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the states of 4-bit weights: scales of 64 weights each, scales of 256 of those."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in [tensor.quant_state for tensor in tensors if hasattr(tensor, "quant_state")]:
        tensors += [value for part in (vars(state), vars(state.state2)) for value in part.values()]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _state_tensors(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    # Not [parameter]: torch's defaultdict would then hold an empty state, which some optimizers take for one of theirs.
    states = (optimizer.state.get(parameter, {}).values() for parameter in parameters)
    return [value for state in states for value in state if isinstance(value, Tensor)]


class StepCounter:
    """Counts steps of one model on one batch.

    Args:
        model: in train mode; its weights are overwritten.
        args: the arguments of a run; `optim`, `optimizer_state`, `max_grad_norm`, `bf16` and `layer_stack` matter.
        batch: input_ids, attention_mask, labels [B, T].
        like_gpu: count the optimizer step as GPUs do it: for all parameters at once.

    Attributes:
        stored_bytes: {parameter: bytes of an element where it is stored}, which FSDP computes with in another type.
    """

    def __init__(self, model: nn.Module, args: Resolved, batch: dict[str, Tensor], like_gpu: bool) -> None:
        self.model, self.batch = model, batch
        self.stored_bytes = {parameter: parameter.element_size() for parameter in model.parameters()}
        self.max_grad_norm = args.max_grad_norm or math.inf
        self.layers = LayerMap(model, args.layer_stack)
        self.outside = [model.get_parameter(name) for name in self.layers.outside]
        self.autocast = partial(torch.autocast, batch["labels"].device.type, torch.bfloat16, enabled=bool(args.bf16))
        self.weights = storage_bytes(weight_tensors(model))
        self.trainable = parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = None
        self.keeps_state = args.optimizer_state == "keep"
        self.optim = args.optim
        if args.optim in TORCH_OPTIMIZERS:
            self.optimizer = make_optimizer(args, parameters)
            for group in self.optimizer.param_groups:
                if "foreach" in group and like_gpu and not group.get("fused"):
                    group["foreach"] = True
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def train(self, trained: Sequence[int]) -> list[nn.Parameter]:
        """Let the layers `trained` train, and no others; the parameters that train."""
        for i, parameters in enumerate(self.layers.parameters):
            for parameter in parameters:
                parameter.requires_grad_(i in trained)
        return [parameter for i in trained for parameter in self.layers.parameters[i]] + self.outside

    def with_state(self, parameters: Sequence[nn.Parameter], ever: Iterable[int]) -> Sequence[nn.Parameter]:
        """Those that have optimizer state when `parameters` train: of all layers that `ever` train, unless the state of
        resting layers goes."""
        if not self.keeps_state:
            return parameters
        return [parameter for i in ever for parameter in self.layers.parameters[i]] + self.outside

    def state_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the optimizer's state of `parameters`."""
        if self.optimizer:
            return storage_bytes(_state_tensors(self.optimizer, parameters))
        return sum(_bitsandbytes_state_bytes(self.optim, parameter) for parameter in parameters) + 2 * 256 * 4

    def _watch(self) -> LiveBytes:
        state = _state_tensors(self.optimizer, self.trainable) if self.optimizer else []
        return LiveBytes([*weight_tensors(self.model), *state, *self.batch.values()])

    def saved(self, trained: Sequence[int]) -> int:
        """Bytes that the forward leaves for the backward when the layers `trained` train."""
        self.train(trained)
        with self._watch() as live:
            with self.autocast():
                loss = token_loss_sum(self.model, self.batch)
            saved = live.alive()
        return sum(saved.values()) - loss.nbytes

    def step(self, trained: Sequence[int], ever: Iterable[int] | None = None) -> StepMemory:
        """The memory of an optimizer step in which the layers `trained` train, those of `ever` having trained before.

        `ever`: default all.
        """
        parameters = self.train(trained)
        with self._watch() as live:
            with self.autocast():
                loss = token_loss_sum(self.model, self.batch)
            forward_end, saved = len(live.events), live.alive()
            del saved[live.number(loss)]
            loss.backward()
            backward_end = len(live.events)
            gradients = {live.number(parameter.grad) for parameter in parameters if parameter.grad is not None}
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            if self.optimizer:
                self.optimizer.step()
        events = list(live.events)
        ever = range(self.layers.n_layers) if ever is None else ever
        state = self.state_bytes(self.with_state(parameters, ever))
        for parameter in parameters:
            parameter.grad = None

        def at_most(start: int, end: int) -> dict[str, int]:
            """The parts at the moment between two events when their sum is largest."""
            totals = list(accumulate(size for _, size in events[:end]))
            at = max(range(start, end), key=totals.__getitem__, default=0)
            parts = dict.fromkeys(PARTS, 0) | {"weights": self.weights, "optimizer": state}
            for number, size in _alive(events[: at + 1]).items():
                parts["gradients" if number in gradients else "saved" if number in saved else "temporary"] += size
            return parts

        made = {number: size for number, size in events if size >= 0}
        ends = {"forward": forward_end, "backward": backward_end, "optimizer step": len(events)}
        moments = {name: at_most(start, end) for (name, end), start in zip(ends.items(), (0, *ends.values()))}
        reached = sum(made[number] for number in gradients)
        return StepMemory(self.weights, state, reached, sum(saved.values()), moments)


def _bitsandbytes_state_bytes(optim: str, parameter: Tensor) -> int:
    """Moments in float32; of 8-bit optimizers a byte each and a float32 scale for 256, but of small tensors."""
    moments = 1 if "lion" in optim or "rmsprop" in optim else 3 if "ademamix" in optim else 2
    if "8bit" not in optim or parameter.numel() < 4096:
        return moments * 4 * parameter.numel()
    return moments * (parameter.numel() + 4 * math.ceil(parameter.numel() / 256))


@dataclass
class SavedByLayer:
    """The bytes that the forward saves, as a sum over layers of four kinds; exact where all layers are alike.

    Below the lowest layer that trains nothing is saved. `head` is for the lowest trained layer together with
    the modules above all layers; a layer above it saves `trained` or `frozen` bytes.
    """

    head: int
    trained: int
    frozen: int

    @classmethod
    def solved(cls, everything: int, lowest: int, last: int, n_layers: int, count: int) -> "SavedByLayer":
        """From the bytes saved when all of `n_layers` layers train; when `count` do, layer 0 and the topmost others;
        when the last `count` do."""
        if count == n_layers:
            return cls(everything, 0, 0)
        resting = n_layers - count
        trained, frozen = round((everything - last) / resting), round((lowest - last) / resting)
        return cls(last - (count - 1) * trained, trained, frozen)

    def saved(self, trained: Sequence[int], n_layers: int) -> int:
        """Bytes saved when the layers `trained` of a model with `n_layers` train."""
        others = len(trained) - 1
        return self.head + others * self.trained + (n_layers - 1 - min(trained) - others) * self.frozen


def layers_that_train(config: ISTConfig, n_layers: int, steps: int = 1000) -> tuple[list[list[int]], list[int]]:
    """(the layers of each of `steps` steps as they are drawn before anything is learned, the costliest ones).

    The costliest reach down to the lowest layer that any step trains, so that the whole graph above it is kept, and
    are otherwise the topmost, whose gradients come first. A semantic boundary is taken to be the lowest one possible.
    """
    rule: SelectionRule = make_rule(n_layers, config)
    if config.anneal_to_fixed:  # what stays then is one of the draws
        rule.total_steps = math.ceil(steps / config.anneal_to_fixed)
    if isinstance(rule, SemanticFreezing):  # gains that fall so fast that the lowest boundary allowed has the largest
        rule.see([math.exp(sum(-(4.0**-i) for i in range(space))) for space in range(n_layers + 1)])
    draws = [rule.trained(step) for step in range(steps)]
    lowest, count = min(map(min, draws)), max(map(len, draws))
    if all(draw == draws[0] for draw in draws):
        return draws, draws[0]
    return draws, sorted({lowest, *range(n_layers - count + 1, n_layers)})


# --------------------------------------------------------------------------------------------- models without weights


def materialise(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give a skeleton zeros for weights, on `device`; ties stay ties, and 4-bit weights are packed."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = (tensor, _zeros(tensor, device))
                tensors[name] = made[id(tensor)][1]
    return model


def _zeros(tensor: Tensor, device: torch.device | str) -> Tensor:
    zeros, state = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device), None
    if is_packed(tensor):
        from bitsandbytes.functional import quantize_4bit

        keys = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        kept = {key: getattr(tensor, key) for key in keys}
        zeros, state = quantize_4bit(zeros, **kept)
    if isinstance(tensor, nn.Parameter):
        zeros = nn.Parameter(zeros, requires_grad=tensor.requires_grad)
    if state is not None:
        zeros.quant_state = state
    return zeros


def make_batch(rows: int, length: int, padded: bool, device: torch.device | str) -> dict[str, Tensor]:
    """A batch of any tokens, [rows, length]; `padded`: one token of it is padding, so that a mask must be made."""
    mask = torch.ones(rows, length, dtype=torch.long, device=device)
    if padded:
        mask[-1, -1] = 0
    tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}


def _native_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """On a CPU, keep dropout's tensors as a GPU does.

    That is a byte for each element that it saw, where CPUs keep a float; and nothing of dropout on attention weights,
    which a GPU's kernels apply themselves, where CPUs fall back to one that keeps all attention weights.
    """
    attention = nn.functional.scaled_dot_product_attention

    def without_dropout(*args, **kwargs):
        return attention(*args, **(kwargs | {"dropout_p": 0.0}))

    with (
        patch.object(nn.functional, "dropout", _native_dropout),
        patch.object(nn.functional, "scaled_dot_product_attention", without_dropout),
    ):
        yield


# Of transformers: whether sdpa goes without a mask.
_SKIPS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")


@contextmanager
def _without_values(padded: bool) -> Iterator[None]:
    """Fake tensors; transformers reads from a mask's values whether it masks anything: here `padded` answers."""
    if installed("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(
            torch.zeros(64), compress_statistics=True, quant_type="nf4"
        )  # its tables are cached, and must not be fake ones

    def answered(skip: Callable[..., bool]) -> Callable[..., bool]:
        return lambda mask, *args: not padded and skip(None, *args)

    answers = {name: answered(getattr(masking_utils, name)) for name in _SKIPS}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
        patch.multiple(masking_utils, **answers),
    ):
        yield


@contextmanager
def counting(
    args: Resolved,
    peft_config: PeftConfig | None,
    config: PretrainedConfig,
    shape: tuple[int, int],
    padded: bool = False,
    like_gpu: bool = True,
    half: bool = False,
) -> Iterator[StepCounter]:
    """A counter of steps of the model that `args` describe, on batches of `shape`, with nothing allocated.

    Fake tensors are those of a CPU, so attention is counted as its kernels do it: sdpa, and flash_attention_2 in its
    stead, keep q, k, v, the output and a number per row and head, as those of a GPU do. `half`: all weights are
    bfloat16 where they are computed with, as FSDP gathers them for mixed precision.

    Raises:
        UsageError: the adapter cannot be made without weights.
    """
    if args.attn_implementation == "flash_attention_2":
        args = Resolved.of(args, attn_implementation="sdpa")
    skeleton = load_skeleton(args, peft_config, config)
    stored = [parameter.element_size() for parameter in skeleton.parameters()]
    for parameter in skeleton.parameters() if half else ():
        parameter.data = parameter.data.to(torch.bfloat16)
    with _without_values(padded), as_on_gpu() if like_gpu else nullcontext():
        counter = StepCounter(materialise(skeleton, "cpu"), args, make_batch(*shape, padded, "cpu"), like_gpu)
        counter.stored_bytes = dict(zip(counter.model.parameters(), stored, strict=True))
        yield counter
