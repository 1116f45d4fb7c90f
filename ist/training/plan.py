"""`train_ist.py --plan true`: the peak memory of each device of a run, predicted by part before any weight is loaded.

One step is counted without weights (memory.py), that of the draw of layers that needs most, then cut for the
topology.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from ist.config import ISTConfig
from ist.training.arguments import Resolved
from ist.training.command_line import UsageError, brief, markdown_table
from ist.training.data import Data
from ist.training.environment import replicas_of
from ist.training.memory import (
    PARTS,
    SavedByLayer,
    StepCounter,
    StepMemory,
    counting,
    layers_that_train,
    storage_bytes,
    weight_tensors,
)
from ist.training.model import ModelPlan
from ist.training.packages import installed
from ist.training.peft_config import require_served


@dataclass
class Topology:
    """`ranks` processes, each with a device of `device_bytes`; `sharded` is FSDP2, else each holds the whole model.

    Under HSDP there are `replicas` of a model that is sharded over ranks / replicas processes.
    """

    ranks: int
    sharded: bool
    device_bytes: int
    replicas: int = 1


# The share of a device's memory that a plan may use: the rest is for the context, workspaces, and the allocator's gaps.
USABLE = 0.9


def sharded_step(step: StepMemory, counter: StepCounter, ranks: int, ever: Iterable[int]) -> StepMemory:
    """A step as one of FSDP2's ranks has it, from the step of a whole model on one device.

    Weights, gradients and optimizer state: this rank's share, the first dimension cut into `ranks` pieces and rounded
    up. Gathered, and `temporary`: embeddings and head, from the forward on, and two layers, the one
    at work and the next, gathered early. In the backward the gradients of one layer are whole twice before they are
    reduced: as they come, and in one piece. Activations are as on one device.
    """
    parameters = list(counter.model.parameters())
    layers = [list(block.parameters()) for block in counter.layers.blocks]
    in_layers = {id(parameter) for layer in layers for parameter in layer}

    def share(parameters: Iterable[Tensor]) -> int:
        """Bytes of this rank's rows, as they are stored."""
        return sum(-(-len(p) // ranks) * (p.numel() // len(p)) * counter.stored_bytes[p] for p in parameters)

    def whole(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = share(parameters)
    weights += storage_bytes(t for t in weight_tensors(counter.model) if not isinstance(t, nn.Parameter))
    kept = counter.with_state(trained, ever)
    optimizer, gradients = 2 * share(kept) + 4 * len(kept), share(trained)
    gathered = whole(p for p in parameters if id(p) not in in_layers) + 2 * max(map(whole, layers))
    reduced = 2 * max(whole(p for p in layer if p.requires_grad) for layer in layers)
    moments = {}
    for moment, parts in step.moments.items():
        moments[moment] = parts | {"weights": weights, "optimizer": optimizer}
        moments[moment]["gradients"] = min(gradients, parts["gradients"])
        if moment == "optimizer step":
            moments[moment]["temporary"] = -(-parts["temporary"] // ranks)
        else:
            moments[moment]["temporary"] += gathered + (reduced if moment == "backward" else 0)
    return StepMemory(weights, optimizer, gradients, step.saved, moments)


def replicated_step(step: StepMemory) -> StepMemory:
    """A step as one of several whole replicas has it.

    Gradients are reduced in flat copies, which a backward leaves layer by layer and which stay until all are reduced.
    """
    reduction = dict(zip(PARTS, (step.weights, step.optimizer, step.gradients, 0, step.gradients), strict=True))
    backward = dict(step.moments["backward"])
    backward["temporary"] += backward["gradients"]
    return replace(step, moments=step.moments | {"backward": backward, "gradient reduction": reduction})


@dataclass
class Prediction:
    """The costliest step of a run on one device, and the mean of its peaks over steps; bytes.

    Attributes:
        weights: of the whole model; its parameters' optimizer state is `state`.
    """

    step: StepMemory
    mean_peak: int
    weights: int
    state: int


@dataclass(frozen=True)
class PlannedRun:
    """A run whose memory is to be predicted.

    Attributes:
        config: the model's.
        shape: rows and tokens of the largest micro-batch; `padded`: its rows can differ in length.
        like_gpu: count as on a GPU; else as on a CPU.
        batch_given: global_batch_size is given, so that accumulation follows.
    """

    args: Resolved
    ist_config: ISTConfig
    peft_config: PeftConfig | None
    config: PretrainedConfig
    n_layers: int
    shape: tuple[int, int]
    padded: bool
    topology: Topology
    like_gpu: bool
    batch_given: bool = False

    def with_keys(self, **values: Any) -> "PlannedRun":
        return replace(self, args=Resolved.of(self.args, **values))


def predict(run: PlannedRun) -> Prediction:
    """Peak memory per device of a run.

    Not in it: changes by torch.compile, and `probe: gradient`, whose backward goes through every layer.

    Raises:
        UsageError: the adapter cannot be made without weights, the model cannot be followed without values, or the
            selection chooses scalars by their gradients.
    """
    if run.ist_config.selection == "id3":
        raise UsageError("--plan knows layers, --selection id3 chooses scalars: plan it as --selection all.")
    n_layers, topology = run.n_layers, run.topology
    draws, costliest = layers_that_train(run.ist_config, n_layers)
    ever = set().union(costliest, *draws)
    try:
        half = topology.sharded and run.args.bf16
        with counting(run.args, run.peft_config, run.config, run.shape, run.padded, run.like_gpu, half) as counter:
            step = counter.step(costliest, ever)
            mean_saved = step.saved
            if any(draw != costliest for draw in draws):
                last = range(n_layers - len(costliest), n_layers)
                everything, lowest = counter.saved(range(n_layers)), counter.saved([0, *last[1:]])
                by_layer = SavedByLayer.solved(everything, lowest, counter.saved(last), n_layers, len(costliest))
                mean_saved = sum(by_layer.saved(draw, n_layers) for draw in draws) / len(draws)
                counter.train(costliest)
            weights, state = step.weights, step.optimizer
            if topology.sharded:
                step = sharded_step(step, counter, topology.ranks // topology.replicas, ever)
            elif topology.ranks > 1:
                step = replicated_step(step)
    except UsageError as error:
        raise UsageError(f"--plan cannot make this adapter without the base weights: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # what fake tensors raise where values decide
        raise UsageError(f"--plan cannot follow this model without its weights: {brief(error)}") from error
    mean_peak = round(step.peak - step.at_peak["saved"] * (1 - mean_saved / step.saved))
    return Prediction(step, mean_peak, weights, state)


def _changes(run: PlannedRun) -> Iterator[tuple[str, Callable[[PlannedRun], PlannedRun]]]:
    """(flags, change) of whatever makes a run smaller and leaves its mathematics, or nearly."""
    args, topology = run.args, run.topology

    def flags(**values: Any) -> tuple[str, Callable[[PlannedRun], PlannedRun]]:
        text = " ".join(f"--{key} {str(value).lower()}" for key, value in values.items())
        return text, lambda run: run.with_keys(**values)

    if args.attn_implementation == "eager":
        yield flags(attn_implementation="sdpa")
    if not args.gradient_checkpointing:
        yield flags(gradient_checkpointing=True)
    if run.shape[0] > 1:
        rows = {"per_device_train_batch_size": 1}
        if not run.batch_given:
            rows["gradient_accumulation_steps"] = args.gradient_accumulation_steps * args.per_device_train_batch_size
        text, change = flags(**rows)
        yield text, lambda run: replace(change(run), shape=(1, run.shape[1]), padded=False)
    if topology.ranks > 1 and not topology.sharded and not args.load_in_4bit and args.optim.startswith("adamw_torch"):
        yield "accelerate_configs/fsdp2.yaml", lambda run: replace(run, topology=replace(topology, sharded=True))
    if args.optimizer_state == "keep" and args.optim.startswith("adamw_torch"):
        yield flags(optimizer_state="offload")
    if args.peft_method == "none" and args.optim == "adamw_torch" and topology.ranks == 1 and installed("bitsandbytes"):
        yield flags(optim="adamw_8bit")
    if run.peft_config and args.dtype in ("auto", "float32") and not args.load_in_4bit:
        yield flags(dtype="bfloat16")
    if run.peft_config and not args.load_in_4bit and installed("bitsandbytes"):
        text, change = flags(load_in_4bit=True)
        with suppress(UsageError):  # of a method that computes with the base weights themselves
            require_served(run.peft_config, change(run).args, topology.sharded, packed=True)
            yield text, change


def plan(run: PlannedRun) -> str:
    """The lines of `train_ist.py --plan true`: the prediction by part, whether it fits, else the changes that help."""
    found = predict(run)
    step, topology = found.step, run.topology
    how = "sharded over" if topology.sharded else "whole on each of"
    if topology.replicas > 1:
        how = f"in {topology.replicas} replicas, each sharded over {topology.ranks // topology.replicas} of"
    lines = [
        f"Predicted memory per device, model {how} {topology.ranks} device{'s' * (topology.ranks > 1)}, micro-batches "
        f"of {run.shape[0]} x {run.shape[1]} tokens:",
        "",
        *markdown_table(
            ["part", "largest, GB", "at the peak, GB"],
            [
                ["weights and adapters", _gb(step.weights), _gb(step.at_peak["weights"])],
                ["optimizer state", _gb(step.optimizer), _gb(step.at_peak["optimizer"])],
                ["gradients", _gb(step.gradients), _gb(step.at_peak["gradients"])],
                ["saved for the backward", _gb(step.saved), _gb(step.at_peak["saved"])],
                ["temporary", "", _gb(step.at_peak["temporary"])],
                ["peak", "", _gb(step.peak)],
            ],
        ),
        "",
        f"The peak is in the {step.moment} of the steps that train the lowest layer; mean over steps "
        f"{_gb(found.mean_peak)} GB.",
    ]
    if topology.sharded and not run.args.load_in_4bit:
        lines.append(
            f"CPU memory: the main process loads {_gb(found.weights)} GB and gathers {_gb(found.state)} GB for a "
            "checkpoint; the other processes need none of that."
        )
    usable = USABLE * topology.device_bytes
    verdict = f"of {_gb(topology.device_bytes)} GB a device has, {_gb(usable)} can be used"
    if step.peak <= usable:
        return "\n".join([*lines, f"It fits: {verdict}."])
    rows, all_changed, helped = [], run, 0
    for text, change in _changes(run):
        peak = predict(change(run)).step.peak
        if peak < step.peak:
            rows.append([text, _gb(peak), "yes" if peak <= usable else "no"])
            all_changed, helped = change(all_changed), helped + 1
    if helped > 1:
        peak = predict(all_changed).step.peak
        rows.append(["all of these", _gb(peak), "yes" if peak <= usable else "no"])
    lines += [f"It does not fit: {verdict}. Changes, and the peak of each:", ""]
    return "\n".join([*lines, *markdown_table(["change", "peak, GB", "fits"], rows)])


def _gb(size: float) -> str:
    """Decimal gigabytes, three digits."""
    return f"{size / 1e9:.3g}" if size < 1e11 else f"{size / 1e9:.0f}"


def plan_run(
    planned: ModelPlan,
    args: Resolved,
    ist_config: ISTConfig,
    peft_config: PeftConfig | None,
    data: Data,
    accelerator: Accelerator,
) -> str:
    """`plan` of a run on these rows and processes: its largest micro-batch holds the longest row."""
    gpu = accelerator.device.type == "cuda"
    lengths = [len(ids) for ids in data.rows["input_ids"]]
    rows = args.per_device_train_batch_size
    shape, padded = (rows, max(lengths)), rows > 1 and len(set(lengths)) > 1
    if args.packing:  # at the most; the mask separates the rows
        shape, padded = (1, rows * max(lengths)), rows > 1
    if gpu:
        device_bytes = torch.cuda.get_device_properties(accelerator.device).total_memory
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    sharded = accelerator.distributed_type == DistributedType.FSDP
    topology = Topology(accelerator.num_processes, sharded, device_bytes, replicas_of(accelerator) if sharded else 1)
    run = PlannedRun(
        *(args, ist_config, peft_config, planned.config, planned.layers.n_layers),
        *(shape, padded, topology, gpu, planned.args.global_batch_size is not None),
    )
    return plan(run)
