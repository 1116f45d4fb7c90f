"""Arithmetic over the shards of a parameter, for rules that choose scalars: each rank sees its rows of each tensor."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ist.distributed import full_tensor, local_tensor, with_local


def flat_part(tensor: Tensor) -> Tensor:
    """[n] view of this rank's part of a contiguous tensor: its rows of a sharded one, else all."""
    return local_tensor(tensor).view(-1)


def _sharding(tensor: Tensor) -> tuple[dist.ProcessGroup | None, int, int]:
    """(group, own place in it, size) of the ranks that hold a tensor's rows in turn; (None, 0, 1) if each has all.

    Raises:
        RuntimeError: it is sharded otherwise than by rows over one dimension of the mesh.
    """
    if not isinstance(tensor, DTensor):
        return None, 0, 1
    dims = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not dims:
        return None, 0, 1
    if len(dims) > 1 or not tensor.placements[dims[0]].is_shard(0):
        raise RuntimeError(f"a parameter is sharded as {tensor.placements}, not by its rows alone")
    mesh = tensor.device_mesh
    return mesh.get_group(dims[0]), mesh.get_local_rank(dims[0]), mesh.size(dims[0])


def part_of(tensor: Tensor) -> int:
    """Which of the parts of a sharded tensor this rank holds, from 0."""
    return _sharding(tensor)[1]


def sum_over_parts(values: Tensor, tensor: Tensor) -> Tensor:
    """The sum, in place, over the ranks that hold the parts of `tensor`; replicas are not counted twice."""
    group, _, _ = _sharding(tensor)
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def all_parts(values: Tensor, tensor: Tensor) -> Tensor:
    """[parts, ...] `values` [...] of each of the ranks that hold the parts of `tensor`, in the order of the parts."""
    group, _, parts = _sharding(tensor)
    if group is None:
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(parts)]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def flat_range(tensor: Tensor) -> tuple[int, int]:
    """[start, stop) in the flattened whole tensor of this rank's part; FSDP cuts rows as torch.chunk does.

    Raises:
        RuntimeError: it holds something else.
    """
    _, place, parts = _sharding(tensor)
    rows = tensor.shape[0] if tensor.dim() else 1
    start, stop = (min(-(-rows // parts) * i, rows) * (tensor.numel() // rows) for i in (place, place + 1))
    if stop - start != flat_part(tensor).numel():
        raise RuntimeError(f"rank {place} of {parts} holds {flat_part(tensor).numel()} scalars, not {stop - start}")
    return start, stop


def joint_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """[len(groups)] float64: the norm of all entries of each group of tensors, sharded or not. All ranks call it."""
    squares = [[local_tensor(tensor).double().square().sum() for tensor in tensors] for tensors in groups]
    sums = torch.stack([torch.stack(of_group).sum() for of_group in squares])
    first = next((tensor for tensors in groups for tensor in tensors if isinstance(tensor, DTensor)), None)
    return (sums if first is None else sum_over_parts(sums, first)).sqrt()


def gather_parts(values: Tensor, tensor: Tensor) -> Tensor:
    """[tensor.numel()] from `values` [n], one for each scalar of this rank's part of `tensor`. All ranks call it."""
    return full_tensor(with_local(values.view(local_tensor(tensor).shape), tensor)).view(-1)
