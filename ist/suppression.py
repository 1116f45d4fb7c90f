"""Suppression: o = base + g (adapted - base) for chosen PEFT modules, by forward hooks (Eq. 8).

Nothing of PEFT is written, so an exception cannot leave a model changed; outside `suppress` no hook is registered.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

# Arguments that PEFT passes to its own layers, and that base layers do not take.
_PEFT_ONLY = ("adapter_names", "alora_offsets", "task_ids")


class RowsMixed(ValueError):
    """A module's output mixes the rows of the batch, so no gate for each row can be applied."""


@contextmanager
def suppress(modules: Iterable[BaseTunerLayer], gate: float | Tensor, length: int = 1) -> Iterator[None]:
    """Within the context, the response of each PEFT module is multiplied by `gate`: 1 full, 0 that of its base layer.

    It is the response of the adapters that are active when the context begins: a forward with others, as that of DPO's
    reference, is whole.

    Exact at both ends, bit for bit. The hooks go when the context ends, by an exception as well.

    Args:
        gate: a number, a scalar tensor, or a [B] tensor: one per row of the batch, so that one forward holds several
            candidate sets.
        length: tokens of a row, for modules whose input is [B x length, ...], rows and positions in one.

    Raises:
        ValueError: an adapter is merged into its base layer: its response can no longer be separated.
        RowsMixed: in the forward; the gates are as many as neither the rows nor, times `length`, the tokens.
    """
    handles: list[RemovableHandle] = []
    try:
        for module in modules:
            handles += _gate(module, gate, length)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gate(module: BaseTunerLayer, gate: float | Tensor, length: int) -> list[RemovableHandle]:
    if module.merged:
        raise ValueError("an adapter is merged into its base layer; unmerge it before measuring importance")
    base_calls: list[tuple[Tensor | None, Tensor, int]] = []
    active = list(module.active_adapters)

    def forget(module: nn.Module, args: tuple) -> None:
        base_calls.clear()

    def capture(base_layer: nn.Module, args: tuple, output: Tensor) -> None:
        base_calls.append((args[0] if args else None, output, output._version))

    def interpolate(module: BaseTunerLayer, args: tuple, kwargs: dict, adapted: Tensor) -> Tensor | None:
        if module.disable_adapters or module.active_adapters != active:
            base_calls.clear()
            return None
        # LoRA calls its base layer once, on the input it was given: that output is the base. Methods that rotate or
        # scale the input first, or write into the base's output, show it here; for them the base is computed anew.
        match base_calls:
            case [(x, base, version)] if args and x is args[0] and base is not adapted and base._version == version:
                pass
            case _:
                kwargs = {key: value for key, value in kwargs.items() if key not in _PEFT_ONLY}
                base = module.get_base_layer()(*args, **kwargs)
        base_calls.clear()
        # lerp is exact at 0 and at 1; base + gate * (adapted - base) is exact at neither in bf16.
        if not isinstance(gate, Tensor):
            return torch.lerp(base.to(adapted.dtype), adapted, gate)
        precision = torch.promote_types(adapted.dtype, torch.float32)  # a gate of 0.3 is another number in bfloat16
        gates = gate.to(adapted.device, precision)
        if gate.dim():
            if adapted.dim() == 2 and length > 1 and len(adapted) == len(gate) * length:
                gates = gates.repeat_interleave(length)
            elif gate.shape != adapted.shape[:1]:
                raise RowsMixed(f"{list(gate.shape)} gates for a response of shape {list(adapted.shape)}")
            gates = gates.view(-1, *[1] * (adapted.dim() - 1))
        return torch.lerp(base.to(precision), adapted.to(precision), gates).to(adapted.dtype)

    return [
        module.register_forward_pre_hook(forget),
        module.get_base_layer().register_forward_hook(capture),
        module.register_forward_hook(interpolate, with_kwargs=True),
    ]


def _has_dropout(module: nn.Module) -> bool:
    """Whether `module` is a dropout, or applies one by its own `training` flag (attention does, without a module)."""
    if hasattr(module, "neftune_noise_alpha"):  # noise on the embeddings, by a hook that goes by their training flag
        return True
    if isinstance(module, _DropoutNd) or any(isinstance(child, _DropoutNd) for child in module.children()):
        return True
    return any("dropout" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())


def _adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The PEFT modules and their submodules, without their base layers."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            yield module
            for name, child in module.named_children():
                if name != "base_layer":
                    yield from child.modules()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, nothing that adapters sample: how losses are measured, by probes and by validation.

    The base model stays in train mode: in eval mode, bitsandbytes packs 4-bit weights on CPU at the first
    forward, and training loses its gradients afterwards in silence. Not inference_mode: FSDP2 cannot train after it.
    """
    samplers = {module for module in model.modules() if _has_dropout(module)} | set(_adapter_modules(model))
    quiet = [module for module in samplers if module.training]
    for module in quiet:
        module.training = False
    # A compiled module would ignore the hooks that suppress responses, without a word.
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in quiet:
            module.training = True
