"""Everything that ranks must agree on. With one process each function is the identity, so there is one code path."""

import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ist.config import ConfigError


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def require_launcher() -> None:
    """Refuse launchers that cannot train by layers: DeepSpeed, and FSDP1 with its flat parameters; and half a launch.

    Raises:
        ConfigError: naming the config to use instead.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "WORLD_SIZE is set, but not MASTER_ADDR: start with accelerate launch, or unset WORLD_SIZE, RANK and "
            "LOCAL_RANK for one process."
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    for asked, launcher in (
        (os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true", "DeepSpeed"),
        (fsdp and os.environ.get("FSDP_VERSION", "1") == "1", "fsdp_version 1"),
    ):
        if asked:
            raise ConfigError(
                f"{launcher} cannot train a different set of layers at each step: launch with "
                "accelerate_configs/fsdp2.yaml (sharded) or accelerate_configs/ddp.yaml."
            )


def require_topology(accelerator: Accelerator) -> None:
    """Refuse topologies without per-step freezing, and FSDP that was requested but is not on.

    Raises:
        ConfigError: naming the config to use instead.
    """
    kind = accelerator.distributed_type
    sizes = vars(accelerator.parallelism_config) if accelerator.parallelism_config else {}
    for name in ("cp_size", "tp_size", "sp_size"):
        if (sizes.get(name) or 1) > 1:
            raise ConfigError(
                f"{name} {sizes[name]} of the launcher's parallelism is not supported: leave it out, and launch with "
                "accelerate_configs/fsdp2.yaml or accelerate_configs/ddp.yaml."
            )
    replicas = sizes.get("dp_replicate_size") or 1
    if replicas > 1 and kind != DistributedType.FSDP:
        raise ConfigError(
            f"dp_replicate_size {replicas} of the launcher's parallelism is for FSDP: launch with "
            "accelerate_configs/hsdp.yaml (replicas of shards) or accelerate_configs/ddp.yaml."
        )
    if kind == DistributedType.FSDP:
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            raise ConfigError("fsdp_offload_params is not supported: set it to false, or use `load_in_4bit=true`.")
        if accelerator.state.fsdp_plugin.reshard_after_forward is False:
            raise ConfigError(
                "fsdp_reshard_after_forward false would train resting layers after each probe: set it to true."
            )
    elif kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"distributed_type {kind.value} cannot train a different set of layers at each step: launch with "
            "accelerate_configs/fsdp2.yaml (sharded) or accelerate_configs/ddp.yaml."
        )
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ConfigError(
            f"FSDP was asked for, but Accelerate runs {kind.value} (it has no FSDP on {accelerator.device.type}): "
            "launch with accelerate_configs/ddp.yaml, or on GPUs."
        )


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 sum gradients over ranks in float32: Accelerate takes the type of mixed precision for it.

    Of 512 ranks, a sum in bfloat16 has an error of 2 to 7 %.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None:
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def require_sharded(model: torch.nn.Module) -> None:
    """Raises RuntimeError unless every parameter is a DTensor: FSDP in name only would train another model."""
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError("FSDP is on, but not every parameter of the model is sharded")


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's own memory as uint8, where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def broadcast_from_main(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give every rank the main process's tensors, in place; through `device` where they are not on it.

    Replicas must begin equal, and a seed alone does not make them so: libraries and files may differ between nodes.
    """
    if not _active():
        return
    for tensor in {id(tensor): tensor.data for tensor in tensors if tensor.device.type != "meta"}.values():
        here = _bytes(tensor).to(device)
        dist.broadcast(here, 0)
        tensor.copy_(here.view(tensor.dtype).view(tensor.shape))


def checksum(tensors: Iterable[Tensor]) -> str:
    """The sum of all bits of tensors, read as integers: another one for replicas that have parted."""
    total: Tensor | None = None
    for tensor in tensors:
        flat = _bytes(tensor)
        part = (flat.view(torch.int32) if flat.numel() % 4 == 0 else flat).sum(dtype=torch.int64)
        total = part if total is None else total + part
    return "none" if total is None else f"{total.item():x}"


def require_equal_replicas(subject: str, tensors: Iterable[Tensor]) -> str:
    """Compare what several ranks hold of the same: whole tensors, and under HSDP the shards of each replica.

    Returns:
        A checksum of all of it, the same on every rank.

    Raises:
        RuntimeError: on every rank, naming each rank's checksum.
    """
    tensors = list(tensors)
    mesh = next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)
    part = 0 if mesh is None else mesh.get_local_rank(mesh.ndim - 1)  # of the shards; replicas are the first dimension
    whole = checksum(tensor for tensor in tensors if not isinstance(tensor, DTensor))
    ranks = of_all_ranks((part, whole, checksum(map(local_tensor, tensors))))
    parts = {part: {local for other, _, local in ranks if other == part} for part, _, _ in ranks}
    if len({whole for _, whole, _ in ranks}) > 1 or any(len(sums) > 1 for sums in parts.values()):
        listing = ", ".join(f"rank {rank}: {local}" for rank, (_, _, local) in enumerate(ranks))
        raise RuntimeError(f"ranks disagree on {subject} ({listing}). Stopped before it was used.")
    return hashlib.sha256(" ".join(parts[part].pop() for part in sorted(parts)).encode()).hexdigest()[:16]


def is_first_to_say(text: str) -> bool:
    """Whether no other rank has asked this of the same text: an error is printed once, by whichever rank has it.

    Before there is a process group, it is the first process of each node.
    """
    if not _active():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return _store().add(f"ist/said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


_FOREVER = timedelta(days=365)  # a launcher ends the ranks that wait for one that has failed
_numbers = itertools.count()  # of the calls below: the same on every rank, which makes them alike


def from_main(work: Callable[[], Any], error: type[Exception]) -> Any:
    """What `work` returns to the main process, which alone calls it, on every rank; JSON-ready.

    The others wait at the process group's store. In a collective, its time limit would count the main process's work.

    Raises:
        error: on every rank, where `work` has raised it or a ConfigError.
    """
    if not _active():
        return work()
    store, key = _store(), f"ist/{next(_numbers)}"
    if dist.get_rank() > 0:
        store.wait([key], _FOREVER)
        told = json.loads(store.get(key))
        if "error" in told:
            raise error(told["error"])
        return told["value"]
    try:
        value = work()
    except (error, ConfigError) as failure:
        store.set(key, json.dumps({"error": str(failure)}))
        raise
    store.set(key, json.dumps({"value": value}))
    return value


def in_turns(work: Callable[[], Any]) -> Any:
    """`work` by the main process, then by the first process of each node, then by all others; returned when all have.

    What the first has written to a cache, the others read: also where nodes share none. They wait at the store, as
    in `from_main`. A rank whose `work` raises does not keep the others waiting.
    """
    if not _active():
        return work()
    store, key = _store(), f"ist/{next(_numbers)}"
    node = os.environ.get("GROUP_RANK", socket.gethostname())
    is_main, is_first = dist.get_rank() == 0, os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_main:
        store.wait([f"{key}/main" if is_first else f"{key}/node/{node}"], _FOREVER)
    try:
        value = work()
    finally:
        if is_main:
            store.set(f"{key}/main", "done")
        if is_main or is_first:
            store.set(f"{key}/node/{node}", "done")
        if store.add(f"{key}/count", 1) == dist.get_world_size():
            store.set(f"{key}/all", "done")
    store.wait([f"{key}/all"], _FOREVER)
    return value


def reduce_sum(values: Tensor) -> Tensor:
    """The sum over ranks of a float64 tensor, on every rank, in one collective."""
    if _active():
        dist.all_reduce(values)
    return values


def of_all_ranks(value: Any) -> list[Any]:
    """Each rank's `value`, by rank, on every rank."""
    if not _active():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: float, device: torch.device) -> float:
    """The largest of the ranks' values, on every rank."""
    if not _active():
        return value
    values = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()


def require_agreement(subject: str, digest: str) -> None:
    """Compare a digest across ranks before it is acted on.

    Ranks that train different layers hang under FSDP2 and train the union in silence under DDP.

    Raises:
        RuntimeError: on every rank, naming each rank's digest.
    """
    digests = of_all_ranks(digest)
    if len(set(digests)) > 1:
        listing = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(digests))
        raise RuntimeError(f"ranks disagree on {subject} ({listing}). Stopped before it was used.")


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank, the same answer on every rank."""
    return bool(largest(float(flag), device))


class StopAgreement:
    """The step before which all ranks stop once any was told to, the same for all; without connections of its own.

    A rank that is told at the start of step s writes s + 2 into the process group's store, where every rank looks
    before each step. All see it in time: no rank ends the collectives of step s + 1, and begins step s + 2, before
    every rank has begun step s + 1.

    Args:
        device: of the steps. A GPU works behind its host, which waits here until the GPU has ended the last step but
            one.
    """

    def __init__(self, device: torch.device) -> None:
        self._key = f"ist/{next(_numbers)}/stop"
        self._device = device
        self._started: Any = None  # event on a GPU: the step before this one has started there
        self._told = False

    def __call__(self, step: int, flag: bool) -> bool:
        """Whether to stop before `step`; `flag`: this rank was told to."""
        if not _active():
            return flag
        if self._device.type != "cpu":
            started = torch.get_device_module(self._device).Event()
            started.record()
            if self._started is not None:
                self._started.synchronize()
            self._started = started
        store = _store()
        if flag and not self._told:
            store.compare_set(self._key, "", str(step + 2))  # of several ranks, the first
            self._told = True
        return store.check([self._key]) and step >= int(store.get(self._key))


def all_finite(parameters: Iterable[Tensor], device: torch.device) -> bool:
    """Whether no entry of the parameters, sharded or whole, is infinite or NaN on any rank."""
    shards = map(local_tensor, parameters)
    return not any_rank(not all(shard.isfinite().all() for shard in shards), device)


class GradientReducer:
    """Sums gradients of replicated parameters over ranks, a layer at a time, while the backward of others goes on.

    DistributedDataParallel would send every adapter's bucket at each step, resting layers as zeros.

        reducer.begin(buckets)   # before the backward of the last micro-batch
        ...                      # backward
        reducer.finish()         # now every gradient is the sum over ranks

    Args:
        parameters: all that may ever be in a bucket.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._buckets: list[list[torch.nn.Parameter]] = []
        self._missing: list[int] = []
        self._bucket_of: dict[torch.nn.Parameter, int] = {}
        self._sent: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        self._next = 0
        if _active():
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._ready)

    def begin(self, buckets: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        """`buckets` in the order in which their gradients will be there, the same on every rank."""
        if _active():
            self._buckets = [list(bucket) for bucket in buckets if bucket]
            self._missing = [len(bucket) for bucket in self._buckets]
            self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}

    def finish(self) -> None:
        """Send the remaining buckets, wait for all, put the sums in place."""
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for gradients, flat, work in self._sent:
            work.wait()
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view_as(gradient))
        self._buckets, self._bucket_of, self._sent, self._next = [], {}, [], 0

    def _ready(self, parameter: torch.nn.Parameter) -> None:
        if parameter not in self._bucket_of:  # not the last micro-batch, or not to be reduced
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # In their order, whatever is ready first: on another rank it may be another bucket.
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: list[torch.nn.Parameter]) -> None:
        for parameter in bucket:
            if parameter.grad is None:  # an expert that no token of this rank went to
                parameter.grad = torch.zeros_like(parameter)
        for dtype in dict.fromkeys(parameter.grad.dtype for parameter in bucket):
            gradients = [parameter.grad for parameter in bucket if parameter.grad.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._sent.append((gradients, flat, dist.all_reduce(flat, async_op=True)))


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded (DTensor) tensor gathered whole on every rank; any other tensor as it is. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(local: Tensor, tensor: Tensor) -> Tensor:
    """A tensor sharded as `tensor` is, of which `local` is this rank's shard."""
    if isinstance(tensor, DTensor):
        layout = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
        return DTensor.from_local(local, tensor.device_mesh, tensor.placements, **layout)
    return local


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """`whole` sharded, and placed, as `tensor` is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
    return whole.to(tensor.device)


def placed_from_main(
    whole: Tensor | None, dtype: torch.dtype, shape: torch.Size, tensor: Tensor, device: torch.device
) -> Tensor:
    """The main process's `whole` (None on the others), on every rank sharded and placed as `tensor` is.

    A rank holds the whole of it on `device` for this call.
    """
    here = torch.empty(shape, dtype=dtype, device=device) if whole is None else whole.to(device, copy=True)
    if not isinstance(tensor, DTensor):  # whose shards come from the mesh's first rank anyway, the main process
        broadcast_from_main([here], device)
    return like(here, tensor)


class CollectiveCounter:
    """Counts the calls and bytes of this rank's collectives while it is entered: for benchmarks and tests.

    Attributes:
        steps: one {collective: [calls, bytes]} for each step that its user has appended; the last one counts.
    """

    COLLECTIVES = (
        *("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single", "all_gather_into_tensor"),
        *("all_gather_single", "all_gather_object", "broadcast"),
    )

    def __init__(self) -> None:
        self.steps: list[dict[str, list[int]]] = []
        self._originals: dict[str, Callable] = {}

    def _counted(self, name: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.steps:
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                entry = self.steps[-1].setdefault(name, [0, 0])
                entry[0] += 1
                entry[1] += max((tensor.nbytes for tensor in tensors), default=0)  # the whole, not a rank's shard
            return original(*args, **kwargs)

        return call

    def __enter__(self) -> "CollectiveCounter":
        self._originals = {name: getattr(dist, name) for name in self.COLLECTIVES if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(name, original))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
