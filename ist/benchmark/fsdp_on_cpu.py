"""FSDP2 on CPU: for tests, and for the bytes that `communication` counts where there are no GPUs.

Accelerate turns FSDP off on CPU and says nothing. Here it is set as the launcher's config asks, and Accelerate's and
torch's own FSDP2 runs on gloo ranks.
"""

import os
from importlib import import_module

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def _divide_sums() -> None:
    """Let FSDP2 sum gradients and divide: gloo's reduce-scatter of torch 2.8 sums in silence where a mean is asked for.

    NCCL's takes the mean.
    """
    collectives = import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    factors = collectives._get_gradient_divide_factors
    collectives._get_gradient_divide_factors = lambda *args: factors(*args[:5], True)  # force_sum_reduction_for_comms


def turn_on_fsdp() -> None:
    """From now on, AcceleratorState has FSDP on CPU where ACCELERATE_USE_FSDP is true."""
    if torch.__version__ < (2, 13):
        _divide_sums()
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # The state is shared, and Accelerate sets the type anew with each instance: the plugin is made once.
            if self._shared_state.get("fsdp_plugin") is None:
                self.fsdp_plugin = FullyShardedDataParallelPlugin()
                if self._mixed_precision != "no":
                    self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":  # fsdp_on_cpu.py MODULE [arguments]: `python -m MODULE` with FSDP on CPU
    import runpy
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).parent.parent.parent)
    turn_on_fsdp()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
