"""The peak memory of a run, as PyTorch's profiler sees the allocator."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

from ist.distributed import local_tensor
from ist.training import memory
from ist.training import prepare as training_model
from ist.training.memory import (
    weight_tensors,
)
from ist.tuner import SparseTuner


def allocated_peak(profiler: profile) -> int:
    """Above what there was before."""
    events, stack = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    events.sort()
    return max(total for _, total, _ in events) - (events[0][1] - events[0][2])


def peak_of_a_run(train, monkeypatch, start: int, **options) -> int:
    """From step `start` on, when every layer has trained: what was there then, and what the allocator gave."""
    made, base, profiler = [], [], profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    begin_step, make_optimizer = SparseTuner.begin_step, training_model.make_optimizer
    monkeypatch.setattr(training_model, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[-1])

    def watched(tuner, step):
        if step == start:
            gc.collect()
            state = [v for values in made[0].state.values() for v in values.values() if torch.is_tensor(v)]
            base.append(memory.storage_bytes(map(local_tensor, [*weight_tensors(tuner.model), *state])))
            profiler.start()
        return begin_step(tuner, step)

    monkeypatch.setattr(SparseTuner, "begin_step", watched)
    assert train(**options) == 0
    profiler.stop()
    return base[0] + allocated_peak(profiler)
