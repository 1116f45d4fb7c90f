"""Layers found by structure, frozen layers that rest, and scores that find the layers that matter."""

import pytest
import torch
from peft import (
    LoraConfig,
    ShiraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from support import peft_class, tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from ist import ISTConfig, SparseTuner
from ist.adapters.targets import default_target_modules
from ist.config import ConfigError
from ist.layers import LayerMap, adapter_state, drop_input_grad_hooks


def tiny_peft(n_layers=4, targets=("q_proj", "up_proj"), **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(n_layers))
    return get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **options)).train()


def test_layer_map_of_a_llama():
    layers = LayerMap(tiny_peft(12))
    assert layers.names == [f"base_model.model.model.layers.{i}" for i in range(12)]
    assert all(len(modules) == 2 for modules in layers.modules)
    assert all(len(parameters) == 4 for parameters in layers.parameters)
    assert layers.outside == []


def test_adapters_outside_the_layers_and_on_some_layers_only():
    layers = LayerMap(tiny_peft(targets=["q_proj", "embed_tokens"], layers_to_transform=[1, 3]))
    assert layers.names == ["base_model.model.model.layers.1", "base_model.model.model.layers.3"]
    layers = LayerMap(tiny_peft(targets=["q_proj", "lm_head"]))
    assert layers.n_layers == 4
    assert len(layers.outside) == 2
    assert all("lm_head" in name for name in layers.outside)


def test_what_layers_share_belongs_to_none_of_them():
    vblora = VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj", "down_proj"])
    layers = LayerMap(get_peft_model(LlamaForCausalLM(tiny_config()), vblora))
    assert [len(parameters) for parameters in layers.parameters] == [4] * 4  # the logits of two modules
    assert layers.outside == layers.shared
    assert len(layers.shared) == 1
    assert "vector_bank" in layers.shared[0]


def test_one_vector_for_the_whole_model_is_refused():
    unilora = peft_class("UniLoraConfig")(r=2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="no layer can rest while another trains"):
        LayerMap(get_peft_model(LlamaForCausalLM(tiny_config()), unilora))


def test_the_state_of_an_adapter_is_peft_s_and_nothing_of_the_base(tmp_path):
    configs = [
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=None),
        VeraConfig(r=8, target_modules=["q_proj", "down_proj"]),
        ShiraConfig(r=2, target_modules=["q_proj"]),
        VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj"]),
    ]
    for config in configs:
        model = get_peft_model(LlamaForCausalLM(tiny_config()), config)
        state = adapter_state(model)
        ours = get_peft_model_state_dict(model, state_dict=state)
        assert ours.keys() == get_peft_model_state_dict(model).keys()
        assert not any("base_layer" in name for name in state)
        assert {id(p) for p in model.parameters() if p.requires_grad} <= {id(tensor) for tensor in state.values()}


def test_models_without_one_list_of_layers_are_refused():
    with pytest.raises(ConfigError, match="no layer list"):
        LayerMap(tiny_peft(targets=["lm_head"]))
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(ConfigError, match="asks for one list of layers with adapters in each stack"):
        LayerMap(get_peft_model(two, LoraConfig(r=2, target_modules=["a.0", "b.0"])))


def test_default_target_modules():
    assert default_target_modules(LlamaForCausalLM(tiny_config())) == [
        *("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    ]
    assert default_target_modules(nn.Linear(2, 2)) == []


def test_frozen_layers_rest_and_nothing_but_adapters_moves():
    model = tiny_peft(8)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    config = ISTConfig(trained_layers=2, update_interval=5)
    ids = torch.randint(0, 400, (4, 12))

    def loss_of(model, batch):
        return model(**batch).loss * ids.numel(), torch.tensor(ids.numel())

    tuner = SparseTuner(model, config, lambda _: [{"input_ids": ids, "labels": ids}], loss_of)
    base = {name: p.clone() for name, p in model.named_parameters() if name not in parameters}
    assert base
    ever = set()
    for step in range(40):
        before = {name: p.clone() for name, p in parameters.items()}
        moments = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in parameters.items()}
        update = tuner.begin_step(step)
        assert (update is not None) == (step > 0 and step % 5 == 0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        resting = [i for i in range(8) if i not in tuner.trained]
        assert len(tuner.trained) == 2
        for name, parameter in parameters.items():
            layer = int(name.split(".layers.")[1].split(".")[0])
            if layer in resting:
                assert parameter.grad is None
                assert torch.equal(parameter, before[name])
                assert all(torch.equal(v, moments[name][k]) for k, v in optimizer.state[parameter].items())
            else:
                assert parameter.grad is not None
                if "lora_B" in name:
                    assert not torch.equal(parameter, before[name])
        ever.update(tuner.trained)
        optimizer.zero_grad(set_to_none=True)
    assert ever == set(range(8))
    assert sum(tuner.trained_counts) == 80
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def test_begin_step_twice_updates_once():
    model = tiny_peft()
    calls = []

    def probe_batches(step):
        calls.append(step)
        return [{}]

    tuner = SparseTuner(
        model, ISTConfig(update_interval=2), probe_batches, lambda *_: (torch.tensor(1.0 + len(calls)), torch.ones(()))
    )
    assert tuner.begin_step(2) is not None
    assert tuner.begin_step(2) is None
    assert calls == [2, 2, 2]


def test_no_more_selections_are_planned_than_a_run_may_need(monkeypatch):
    tuner = SparseTuner(tiny_peft(), ISTConfig(update_interval=10**6, selection="random"), None)
    planned, trained = [], tuner.rule.trained
    monkeypatch.setattr(tuner.rule, "trained", lambda step: planned.append(step) or trained(step))
    tuner.begin_step(0)
    assert planned == list(range(1000))
    tuner.begin_step(999)
    tuner.begin_step(1000)
    assert planned == list(range(2000))


class Planted(nn.Module):
    """A residual stack y = x + sum_i f_i(x) in which only the `useful` layers' outputs are ever seen."""

    def __init__(self, n_layers: int, useful: tuple[int, int], width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(n_layers))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
        self.useful = useful

    def forward(self, x):
        seen = x.clone()
        for i, layer in enumerate(self.layers):
            out = layer(x)
            seen = seen + (out if i in self.useful else 0 * out)
        return seen


def final_scores(seed: int, selection: str = "ist") -> tuple[torch.Tensor, list[int], tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    useful = tuple(torch.randperm(8, generator=generator)[:2].tolist())
    torch.manual_seed(seed)
    toy = Planted(8, useful)
    model = get_peft_model(toy, LoraConfig(r=8, target_modules=r"layers\.\d+"))
    x = torch.randn(64, 8, generator=generator)
    target = x + x @ torch.randn(8, 8, generator=generator)

    def loss_of():
        return nn.functional.mse_loss(model(x), target)

    config = ISTConfig(seed=seed, selection=selection, update_interval=5, score_lr=10)
    tuner = SparseTuner(model, config, lambda _: [{}], lambda *_: (loss_of() * 64, torch.tensor(64)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    for step in range(300):
        tuner.begin_step(step)
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tuner.rule.importance, tuner.trained_counts, useful


def test_scores_find_the_planted_layers():
    found = 0
    for seed in range(10):
        importance, _, useful = final_scores(seed)
        found += set(importance.argsort(descending=True)[:2].tolist()) == set(useful)
    assert found >= 9


def test_random_selection_keeps_uniform_counts_and_zero_scores():
    importance, counts, _ = final_scores(0, "random")
    assert importance.tolist() == [0.0] * 8
    expected, variance = 300 * 2 / 8, 300 * 0.25 * 0.75
    assert sum(counts) == 600
    assert all(abs(count - expected) < 4 * variance**0.5 for count in counts)


def test_gradient_checkpointing_builds_no_graph_below_the_lowest_trained_layer():
    model = LlamaForCausalLM(tiny_config())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).train()
    ids = torch.randint(0, 400, (2, 9))
    embedding = model.get_input_embeddings()
    assert embedding._forward_hooks  # transformers and PEFT hung them there
    drop_input_grad_hooks(model)
    assert not embedding._forward_hooks
    seen = []
    model.base_model.model.model.layers[0].register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and ".layers.2." in name)
    model(ids, use_cache=False).logits.sum().backward()
    assert seen == [False]  # without checkpointing's re-run: the layer below was never run again
    assert all((p.grad is not None) == p.requires_grad for n, p in model.named_parameters() if "lora" in n)
