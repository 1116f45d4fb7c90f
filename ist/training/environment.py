"""Where a run runs: libraries, commit, hardware, nodes; and its memory so far."""

import os
import platform
import resource
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from ist.distributed import of_all_ranks
from ist.training.command_line import UsageError
from ist.training.packages import release
from ist.training.train_arguments import BITSANDBYTES_OPTIMIZERS, SHARDED_OPTIMIZERS


def environment(accelerator: Accelerator | PartialState) -> dict[str, Any]:
    """For run.json: versions, commit ("-dirty" with uncommitted changes), hardware, ranks."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        commit = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or "cpu"
    libraries = (torch, accelerate, transformers, peft)
    return {
        "versions": {"python": platform.python_version(), **{lib.__name__: lib.__version__ for lib in libraries}},
        "commit": commit,
        "hardware": {"device": device, "cpu_cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "world_size": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "topology": _topology(accelerator),
    }


def replicas_of(accelerator: Accelerator | PartialState) -> int:
    """How many whole models the ranks hold together."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.num_processes
    return accelerator.parallelism_config.dp_replicate_size if accelerator.parallelism_config else 1


def require_replicas(accelerator: Accelerator) -> None:
    """
    Raises:
        UsageError: HSDP with a version of Accelerate that computes wrong gradients under it.
    """
    replicas, here = replicas_of(accelerator), accelerate.__version__
    if accelerator.distributed_type == DistributedType.FSDP and replicas > 1 and release(here) < (1, 15):
        raise UsageError(
            f"dp_replicate_size {replicas} needs accelerate 1.15 or newer; {here} is installed, and older versions "
            "compute wrong gradients under HSDP: update it, or launch with accelerate_configs/fsdp2.yaml."
        )


def require_optimizer(optim: str, accelerator: Accelerator, trains: bool) -> None:
    """
    Args:
        trains: on this device; --plan is of another one.

    Raises:
        UsageError: an optimizer that cannot update sharded parameters, under FSDP; one of bitsandbytes on a CPU with a
            version that has it on GPUs alone.
    """
    if accelerator.distributed_type == DistributedType.FSDP and optim not in SHARDED_OPTIMIZERS:
        raise UsageError(
            f"--optim {optim} cannot update sharded parameters: use adamw_torch, or launch with "
            "accelerate_configs/ddp.yaml."
        )
    old = optim in BITSANDBYTES_OPTIMIZERS and release(version("bitsandbytes")) < (0, 50)
    if trains and old and accelerator.device.type == "cpu":
        raise UsageError(
            f"--optim {optim} on a CPU needs bitsandbytes 0.50 or newer; {version('bitsandbytes')} is installed: "
            "update it, or use adamw_torch."
        )


def _topology(accelerator: Accelerator | PartialState) -> dict[str, Any]:
    """{backend, replicas, shards}: how many replicas of the model there are, each cut into so many shards."""
    ranks, replicas = accelerator.num_processes, replicas_of(accelerator)
    backend = getattr(PartialState(), "backend", None) if ranks > 1 else None
    return {"backend": backend, "replicas": replicas, "shards": ranks // replicas}


def nodes_of(environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Each node's host, number of ranks, and what its first rank has of its `environment`. All ranks call it."""
    here = {key: environment[key] for key in ("versions", "commit", "hardware")}
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    for number, host, facts in of_all_ranks((os.environ.get("GROUP_RANK", "0"), socket.gethostname(), here)):
        nodes.setdefault((number, host), {"host": host, "ranks": 0, **facts})["ranks"] += 1
    return list(nodes.values())


def differing_nodes(nodes: list[dict[str, Any]]) -> list[str]:
    """A warning for each node whose versions or commit are not those of the first."""
    first, lines = nodes[0], []
    for node in nodes[1:]:
        there, here = ({"commit": one["commit"], **one["versions"]} for one in (node, first))
        differing = [f"{key} {there[key]} (not {value})" for key, value in here.items() if there[key] != value]
        if differing:
            lines.append(f"warning: node {node['host']} has {', '.join(differing)}: results may differ between nodes.")
    return lines


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process so far: allocated on the GPU, or resident in memory where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
