"""Series and parallel adapters: against Eq. 11 and 13 written out, and as methods of PEFT."""

import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from support import ROOT, tiny_config
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from ist.adapters import ParallelConfig, SeriesConfig
from ist.adapters.layer import BottleneckLayer

CONFIGS = {"series": SeriesConfig, "parallel": ParallelConfig}
IDS = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(1))
methods = pytest.mark.parametrize("method", CONFIGS)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


def adapted(method: str, **options) -> PeftModel:
    model = base()
    return get_peft_model(model, CONFIGS[method](**{"bottleneck_size": 8, "init_weights": False, **options})).eval()


@torch.no_grad()
@methods
def test_the_equation(method):
    linear = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
    model = get_peft_model(
        linear,
        CONFIGS[method](bottleneck_size=3, non_linearity="relu", scaling=0.5, target_modules=["0"], init_weights=False),
    )
    layer = model.base_model.model[0]
    assert isinstance(layer, BottleneckLayer)
    down, up = (getattr(layer, f"{method}_adapter_{name}")["default"].weight for name in ("down", "up"))
    x = torch.randn(4, 6)
    b = x @ layer.base_layer.weight.T + layer.base_layer.bias
    h = b if method == "series" else x  # Eq. 13, Eq. 11
    expected = b + 0.5 * torch.relu(h @ down.T) @ up.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(model(x), torch.tanh(expected))


@methods
def test_starts_as_the_identity_and_only_the_adapter_trains(method):
    model = adapted(method, init_weights=True)
    assert torch.equal(model(IDS).logits, base()(IDS).logits)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = {"series": ("up_proj", "down_proj"), "parallel": ("up_proj", "gate_proj")}[method]  # Table 9
    assert trainable == {
        f"base_model.model.model.layers.{i}.mlp.{target}.{method}_adapter_{matrix}.default.weight"
        for i in range(4)
        for target in targets
        for matrix in ("down", "up")
    }
    model(IDS).logits.sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trainable)


@torch.no_grad()
@methods
def test_saved_and_loaded_like_any_method_of_peft(method, tmp_path):
    model = adapted(method, dropout=0.5)
    logits = model(IDS).logits
    assert not torch.equal(logits, base()(IDS).logits)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base()(IDS).logits)
    model.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is CONFIGS[method]
    again = PeftModel.from_pretrained(base(), tmp_path, adapter_name="other").eval()
    assert torch.equal(again(IDS).logits, logits)

    # A second adapter beside it: each alone, and both, whose responses add up.
    again.add_adapter("second", CONFIGS[method](bottleneck_size=5, init_weights=False))
    assert torch.equal(again(IDS).logits, logits)
    again.set_adapter("second")
    second = again(IDS).logits
    assert not torch.equal(second, logits)
    assert not any(p.requires_grad for name, p in again.named_parameters() if ".other." in name)
    again.base_model.set_adapter(["other", "second"])
    assert not torch.equal(again(IDS).logits, second)
    again.set_adapter("other")
    again.delete_adapter("second")
    assert torch.equal(again(IDS).logits, logits)
    assert torch.equal(again.unload()(IDS).logits, base()(IDS).logits)


@methods
def test_merging_is_refused_and_touches_nothing(method):
    model = adapted(method)
    logits = model(IDS).logits
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        model.base_model.model.model.layers[0].mlp.up_proj.merge,
    ):
        with pytest.raises(ValueError, match="not linear and cannot be merged"):
            merge()
    assert torch.equal(model(IDS).logits, logits)


@methods
def test_dropout_is_on_the_adapters_input_in_training_only(method):
    model = adapted(method, dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@torch.no_grad()
@methods
def test_on_4bit_layers_conv1d_and_some_layers_only(method, tmp_path):
    base().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    model.train()  # in eval mode bitsandbytes packs weights for CPU, and cannot at this size
    plain = model(IDS).logits
    model = get_peft_model(model, CONFIGS[method](bottleneck_size=8, init_weights=False, layers_to_transform=[1, 2]))
    layers = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    assert {name.split(".")[4] for name in layers} == {"1", "2"}
    assert not torch.equal(model(IDS).logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain)

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=400)).eval()
    plain = gpt2(IDS).logits
    model = get_peft_model(gpt2, CONFIGS[method](bottleneck_size=8, init_weights=False))
    assert {"c_fc"} <= set(model.active_peft_config.target_modules)
    assert not torch.equal(model(IDS).logits, plain)


@methods
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size must be 1 or more"),
        ({"non_linearity": "rleu"}, "non_linearity must be one of"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ["embed_tokens"]}, "linear layers; got a Embedding"),
    ],
)
def test_bad_values_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(base(), CONFIGS[method](**options))


def test_a_process_that_imports_ist_adapters_can_load_one(tmp_path):
    adapted("series").save_pretrained(tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    code = (
        "import ist.adapters\nfrom peft import AutoPeftModelForCausalLM\n"
        f"AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r})"
    )
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    config.base_model_name_or_path, config.task_type = str(tmp_path / "base"), "CAUSAL_LM"
    config.save_pretrained(tmp_path / "adapter")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
