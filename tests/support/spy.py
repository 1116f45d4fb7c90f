"""`accelerate launch ... tests/support/spy.py train_ist.py ...`: a real launch, watched from inside; and FSDP2 on CPU.

Writes $SPY_DIR/rank<r>.json: the scores, whether every parameter is a DTensor and on what mesh, whether the rank read
weights, and the bytes that gradients travelled with, per optimizer step and collective.
SPY_REBEL=<step>: rank 1 draws other layers from that step on.
SPY_KILL=<step>: rank 1 dies by SIGKILL in the middle of that step. SPY_SEED: rank 1 initialises its adapter by another
seed. SPY_PART=<step>: a weight of rank 1 differs from that step on. SPY_FAIL=<step>: rank 1 raises in that step.
SPY_SLOW=<seconds>: rank 0 needs so long for its data. SPY_BLIND: ranks other than 0 cannot read checkpoints.
"""

import json
import os
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
from ist.benchmark.fsdp_on_cpu import turn_on_fsdp
from ist.sampler import ImportanceSampler
from ist.tuner import SparseTuner

rank = int(os.environ.get("RANK", "0"))
tuners: list[SparseTuner] = []
travelled: list[Counter] = []
dtypes: set[str] = set()
loaded: list[int] = []


def patch(owner, name, wrapper):
    setattr(owner, name, wrapper(getattr(owner, name)))


def counted(original):
    """Count the bytes that go into a collective; gradients are what is longer than one float32 or bfloat16."""

    def call(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        sent = max(tensors, key=torch.Tensor.numel)  # of a reduce-scatter, the input
        if travelled and sent.dtype in (torch.float32, torch.bfloat16) and sent.numel() > 1:
            travelled[-1][original.__name__] += sent.numel() * sent.element_size()
            dtypes.add(f"{original.__name__} {sent.dtype}")
        return original(*args, **kwargs)

    return call


def registered(original):
    def init(self, model, *args, **kwargs):
        original(self, model, *args, **kwargs)
        # Now: during a step, FSDP swaps in the gathered parameters, and leaves the root's there.
        self.all_dtensors = all(isinstance(p, DTensor) for p in model.parameters())
        self.linear_4bit = sum(isinstance(module, Linear4bit) for module in model.modules())
        first = next(model.parameters())
        self.mesh = list(first.device_mesh.shape) if isinstance(first, DTensor) else None
        tuners.append(self)

    return init


def loading(original):
    def load(*args, **kwargs):
        loaded.append(rank)
        return original(*args, **kwargs)

    return load


def watched(original):
    def begin_step(self, step):
        update = original(self, step)
        travelled.append(Counter())
        if rank == 1 and os.environ.get("SPY_KILL") == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and os.environ.get("SPY_PART") == str(step):
            next(p for p in self.model.parameters() if p.requires_grad).data.view(-1)[0] += 1e-6
        if rank == 1 and os.environ.get("SPY_FAIL") == str(step):
            raise MemoryError("rank 1 has no memory left")
        return update

    return begin_step


def rebellious(original):
    def trained(self, step):
        chosen = original(self, step)
        if rank == 1 and step >= int(os.environ.get("SPY_REBEL", "1000000")):
            chosen = [(i + 1) % self.counts.n_layers for i in chosen]
        return chosen

    return trained


def seeded(original):
    return lambda seed, *args, **kwargs: original(seed + (rank == 1), *args, **kwargs)


def slow(original):
    """prepare_data, on rank 0 slower than a collective may take; each rank writes when it began and ended."""

    def prepare_data(args):
        start = time.time()
        time.sleep(float(os.environ["SPY_SLOW"]) if rank == 0 else 0)
        data = original(args)
        Path(os.environ["SPY_DIR"], f"data{rank}.json").write_text(json.dumps([start, time.time()]))
        return data

    return prepare_data


def told(original):
    def find(*args):
        Path(os.environ["SPY_DIR"], f"looked{rank}").touch()
        return original(*args)

    return find


turn_on_fsdp()
patch(PreTrainedModel, "from_pretrained", lambda original: classmethod(loading(original.__func__)))
if "SPY_SLOW" in os.environ:
    import ist.training.checkpoint
    import ist.training.data

    patch(ist.training.data, "prepare_data", slow)
    patch(ist.training.checkpoint, "_find_checkpoint", told)
if "SPY_BLIND" in os.environ and rank > 0:
    import ist.training.checkpoint

    patch(ist.training.checkpoint, "safe_open", lambda _: lambda *args, **options: sys.exit("a checkpoint was read"))
if "SPY_SEED" in os.environ:
    import ist.training.model

    patch(ist.training.model, "set_seed", seeded)
for collective in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single"):
    if hasattr(dist, collective):
        patch(dist, collective, counted)
patch(SparseTuner, "__init__", registered)
patch(SparseTuner, "begin_step", watched)
patch(ImportanceSampler, "trained", rebellious)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    if tuners and "SPY_DIR" in os.environ:
        seen = {
            "scores": tuners[0].rule.scores.tolist(),
            "trained_counts": tuners[0].trained_counts,
            "all_dtensors": tuners[0].all_dtensors,
            "mesh": tuners[0].mesh,
            "loaded": bool(loaded),
            "linear_4bit": tuners[0].linear_4bit,
            "travelled": travelled,
            "dtypes": sorted(dtypes),
        }
        with open(f"{os.environ['SPY_DIR']}/rank{rank}.json", "w") as file:
            json.dump(seen, file)
