"""Suppression against PEFT's own outputs and against a per-module reference in float64 without hooks."""

import copy
from contextlib import ExitStack

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support import peft_class, tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from ist.layers import LayerMap
from ist.suppression import evaluation_mode, suppress

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "oft": OFTConfig(oft_block_size=8, target_modules=TARGETS),  # its base layer sees a rotated input
    "ia3": IA3Config(target_modules=[*TARGETS], feedforward_modules=["down_proj"]),  # and here a scaled one
}


def make(method: str = "lora", dtype=torch.float32):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(tiny_config()).to(dtype), copy.deepcopy(CONFIGS[method])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # at initialisation adapters do nothing
                parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(0, 400, (3, 17), generator=torch.Generator().manual_seed(1))
    return model, LayerMap(model), ids


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Gated(nn.Module):
    """The reference: base and adapted output of one module, side by side, mixed in float64."""

    def __init__(self, tuner: BaseTunerLayer, gate: float) -> None:
        super().__init__()
        self.tuner, self.base, self.gate = tuner, copy.deepcopy(tuner.get_base_layer()), gate

    def forward(self, x):
        base, adapted = self.base(x).double(), self.tuner(x).double()
        return (base + self.gate * (adapted - base)).to(x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGS)
def test_exact_against_peft_and_the_reference(method):
    model, layers, ids = make(method, torch.float64)
    adapted = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    assert (adapted - base).abs().max() > 0.01
    everything = layers.tuners_outside([])
    assert len(everything) == 4 * len(TARGETS)
    with suppress(everything, 1.0):
        assert torch.equal(model(ids).logits, adapted)
    with suppress(everything, 0.0):
        torch.testing.assert_close(model(ids).logits, base, atol=1e-10, rtol=0)
    with suppress(layers.tuners_outside([0, 2]), 0.25):
        mixed = model(ids).logits
    assert (mixed - adapted).abs().max() > 1e-3 < (mixed - base).abs().max()

    reference = copy.deepcopy(model)
    for name, module in list(reference.named_modules()):
        if isinstance(module, BaseTunerLayer) and (".layers.1." in name or ".layers.3." in name):
            parent, _, child = name.rpartition(".")
            setattr(reference.get_submodule(parent), child, Gated(module, 0.25))
    torch.testing.assert_close(mixed, reference(ids).logits, atol=1e-10, rtol=0)
    assert torch.equal(model(ids).logits, adapted)


@torch.no_grad()
def test_exact_at_both_ends_in_bfloat16():
    model, layers, ids = make(dtype=torch.bfloat16)
    adapted = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    assert not torch.equal(adapted, base)
    with suppress(layers.tuners_outside([]), 1.0):
        assert torch.equal(model(ids).logits, adapted)
    with suppress(layers.tuners_outside([]), 0.0):
        assert torch.equal(model(ids).logits, base)


@torch.no_grad()
def test_the_model_is_untouched_afterwards_also_by_an_exception():
    model, layers, ids = make()
    before = model(ids).logits
    scaling = [dict(module.scaling) for module in layers.tuners_outside([])]
    registered = hooks(model)

    class Boom(Exception):
        pass

    def explode(*_):
        raise Boom

    bomb = model.get_submodule("base_model.model.model.layers.3.mlp").register_forward_pre_hook(explode)
    with pytest.raises(Boom), suppress(layers.tuners_outside([1]), 0.25):
        assert hooks(model) == registered + 1 + 3 * 3 * len(TARGETS)
        model(ids)
    bomb.remove()
    assert hooks(model) == registered
    assert torch.equal(model(ids).logits, before)
    assert scaling == [dict(module.scaling) for module in layers.tuners_outside([])]


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGS)
def test_a_gate_for_each_row_of_the_batch(method):
    """Three candidate sets in one forward: layer i has a vector, the gate of each set."""
    model, layers, ids = make(method, torch.float64)
    row = ids[:1]
    kept = [[0, 1], [1, 3], [0, 2]]
    apart = []
    for candidate in kept:
        with suppress(layers.tuners_outside(candidate), 0.25):
            apart.append(model(row).logits)
    with ExitStack() as stack:
        for i, modules in enumerate(layers.modules):
            stack.enter_context(suppress(modules, torch.tensor([1.0 if i in set_ else 0.25 for set_ in kept])))
        together = model(row.expand(3, -1)).logits
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-10, rtol=0)
    assert (apart[0] - apart[1]).abs().max() > 1e-3


@torch.no_grad()
def test_as_many_gates_as_rows_or_an_error():
    model, layers, ids = make()
    with pytest.raises(ValueError, match=r"\[2\] gates for a response of shape \[3, 17, 32\]"):
        with suppress(layers.tuners_outside([]), torch.ones(2)):
            model(ids)
    assert hooks(model) == 0


@torch.no_grad()
def test_what_peft_passes_to_its_layers_does_not_reach_the_base():
    """Each row of the batch with an adapter of its own, or none: LoRA then writes into its base's output."""
    model, layers, ids = make()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    names = ["default", "other", "__base__"]
    mixed = model(ids, adapter_names=names).logits
    with model.disable_adapter():
        base = model(ids).logits
    with suppress(layers.tuners_outside([]), 1.0):
        assert torch.equal(model(ids, adapter_names=names).logits, mixed)
    with suppress(layers.tuners_outside([]), 0.0):
        torch.testing.assert_close(model(ids, adapter_names=names).logits, base)
    assert not torch.equal(mixed[0], base[0])


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGS)
def test_other_adapters_than_the_one_that_is_measured_are_whole(method):
    """The reference of DPO and KTO: the base model, or a copy of the adapter as it was, run between two passes."""
    model, layers, ids = make(method)
    model.add_adapter("reference", copy.deepcopy(CONFIGS[method]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reference" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))

    def passes() -> list[torch.Tensor]:
        outputs = [model(ids).logits]
        with model.disable_adapter():
            outputs.append(model(ids).logits)
        model.set_adapter("reference")
        outputs.append(model(ids).logits)
        model.set_adapter("default")
        return [*outputs, model(ids).logits]

    whole = passes()
    with suppress(layers.tuners_outside([0]), 0.25):
        first, base, reference, again = passes()
    assert torch.equal(base, whole[1]) and torch.equal(reference, whole[2])
    assert torch.equal(first, again) and (first - whole[0]).abs().max() > 1e-3
    assert (reference - base).abs().max() > 1e-3


def test_a_merged_adapter_is_refused():
    model, layers, _ = make()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), suppress(layers.tuners_outside([]), 0.25):
        pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LoHaConfig", {"r": 4, "rank_dropout": 0.5, "module_dropout": 0.5}),
        ("BOFTConfig", {"boft_block_size": 4, "boft_dropout": 0.5}),
        ("PveraConfig", {"r": 8}),  # samples its response in training
    ],
)
def test_evaluation_mode_turns_off_the_noise_of_adapters(name, options):
    torch.manual_seed(0)
    config = peft_class(name)(**options, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(LlamaForCausalLM(tiny_config()), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, 400, (2, 9))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    with evaluation_mode(model):
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_measuring_turns_off_dropout_of_every_kind_and_nothing_else():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=TARGETS, init_lora_weights=False)
    # Llama's attention dropout has no module: it goes by the attention's own training flag.
    model = get_peft_model(LlamaForCausalLM(tiny_config(attention_dropout=0.5)), config).train()
    ids = torch.randint(0, 400, (2, 9))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    flags = {name: module.training for name, module in model.named_modules()}
    with evaluation_mode(model):
        first = model(ids).logits
        assert torch.equal(first, model(ids).logits)
        assert not first.requires_grad
        still_training = [m for m in model.modules() if m.training]
        assert any(isinstance(m, nn.Linear) for m in still_training)
        assert not any(isinstance(m, nn.Dropout) for m in still_training)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.equal(first, model.eval()(ids).logits)
