"""Everything that ranks must agree on. With one process each function is the identity, so there is one code path."""

import torch.distributed as dist
from torch import Tensor


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_sum(values: Tensor) -> Tensor:
    """The sum over ranks of a float64 tensor, on every rank, in one collective."""
    if _active():
        dist.all_reduce(values)
    return values


def require_agreement(what: str, digest: str) -> None:
    """Compare a digest across ranks before it is acted on.

    Ranks that train different layers hang under FSDP2 and train the union in silence under DDP.

    Raises:
        RuntimeError: on every rank, naming each rank's digest.
    """
    if not _active():
        return
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        listing = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(digests))
        raise RuntimeError(f"ranks disagree on {what} ({listing}). Stopped before anything was trained on it.")


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded (DTensor) tensor gathered whole on every rank; any other tensor as it is. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
