"""AblationLoss: blocks below the ablated layer are computed once."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.analysis import noise
from support.families import FAMILIES

from ist.adapters.targets import ATTENTION, default_target_modules
from ist.analyze.ablation import AblationLoss, Tokens
from ist.training.data import collate


def adapted(family: str):
    """A tiny random model of the family with random LoRA on blocks 1 and 3 of 4, and two batches, the second padded."""
    config_class, values = FAMILIES[family]
    config = getattr(transformers, config_class)(**values)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # at the usual scale four tiny layers hardly do anything
    targets = default_target_modules(base)
    targets = [target for target in targets if target in ATTENTION] or targets  # experts are fused, Mamba has no other
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, layers_to_transform=[1, 3]))
    noise(model, 0.2)
    rows = torch.randint(3, 399, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
    rows[3] = rows[3][:5]
    batches = [collate(rows[i : i + 2], rows[i : i + 2], 0) for i in (0, 2)]
    return model.eval(), Tokens(batches, 3 * 11 + 4)


TEXT_FAMILIES = [name for name, (config, _) in FAMILIES.items() if config not in ("LlavaConfig", "Gemma3Config")]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_blocks_below_the_layer_do_not_run_and_nothing_changes(family):
    model, tokens = adapted(family)
    fast, slow = AblationLoss(model, tokens), AblationLoss(model, tokens)
    assert fast.reuses
    slow.reuses = False
    ran = [0] * 4
    blocks = fast.layers.all_blocks
    for i, block in enumerate(blocks):
        inner = next(module for module in block.modules() if not list(module.children()))
        inner.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    found = []
    for removed, layer, skipped in (([], 1, 3), ([], 0, 1), ([1], 0, 1), ([0], 1, 3)):
        expected = slow(removed, layer)
        fast(removed, layer)  # keeps the outputs for `removed`
        ran[:] = [0] * 4
        assert fast(removed, layer) == expected
        assert all(count == 0 for count in ran[:skipped]) and all(ran[skipped:])
        found.append(expected)
    assert found[2] == found[3] != found[0] != found[1] and fast.full not in found
    assert not any("forward" in vars(block) for block in blocks)


def test_where_a_block_needs_more_all_blocks_run():
    model, tokens = adapted("Llama")
    layers = model.get_base_model().model.layers
    handed_on = []  # from inside the first block to the last one, past the outputs of the blocks
    layers[0].mlp.register_forward_hook(lambda module, args, output: handed_on.append(output))
    layers[3].mlp.register_forward_hook(lambda module, args, output: output + handed_on.pop())
    ablation = AblationLoss(model, tokens)
    assert not ablation.reuses
    handed_on.clear()
    assert ablation([0], 1) == ablation([1], 0) != ablation.full
