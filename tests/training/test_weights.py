"""Every weight of a model and of an adapter comes from its files, or the run is refused."""

import json
import shutil

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ist.evaluate.scorer import ScorerArguments, load_scorer
from ist.training.command_line import UsageError


def _change(folder, change):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _rename(tensors):
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def _drop_layer(tensors):
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


def _poison(tensors):
    tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = float("nan")


def _reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(16)


BASE = {
    "renamed": (_rename, r"lacks 1 weights of its model \(model.layers.1.mlp.up_proj.weight\)"),
    "a layer gone": (_drop_layer, r"lacks 9 weights of its model \(.* and 6 more\)"),
    "not finite": (_poison, r"model.layers.2.self_attn.q_proj.weight is not finite"),
    "another shape": (_reshape, r"norm.weight|cannot be loaded"),
}


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.mark.parametrize("change", BASE)
def test_a_base_model_with_other_weights_is_refused(model, train, tmp_path, change):
    edit, message = BASE[change]
    _change(model, edit)
    with pytest.raises(UsageError, match=message):
        train(model_name_or_path=model, max_steps=1)
    with pytest.raises(UsageError, match=message):
        load_scorer(ScorerArguments(str(model), str(tmp_path / "out")), PartialState().device)


@pytest.mark.parametrize(("layers", "message"), [(6, r"lacks 18 weights"), (3, r"of layers that its config.json does")])
def test_a_configuration_with_other_layers_than_the_file_is_refused(model, train, layers, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(UsageError, match=message):
        train(model_name_or_path=model, max_steps=1)


def test_weights_that_are_not_the_models_are_named(model, train, capsys):
    _change(model, lambda tensors: tensors.update({"score.weight": torch.ones(3)}))
    assert train(model_name_or_path=model, max_steps=1) == 0
    assert "1 weights of its files are not the model's, and not used: score.weight" in capsys.readouterr().out


def _without_a_tensor(tensors):
    del tensors[next(iter(tensors))]


def _renamed_tensor(tensors):
    name = next(iter(tensors))
    tensors[name.replace("layers.", "layer.")] = tensors.pop(name)


def _with_nan(tensors):
    next(iter(tensors.values())).fill_(float("nan"))


ADAPTER = {
    "missing": (_without_a_tensor, r"lacks 1 tensors of its adapter"),
    "renamed": (_renamed_tensor, r"lacks 1 tensors of its adapter"),
    "more": (
        lambda tensors: tensors.update(other=torch.ones(2)),
        r"1 tensors that its adapter does not have \(other\)",
    ),
    "not finite": (_with_nan, r"is not finite"),
}


@pytest.mark.parametrize("change", ADAPTER)
def test_an_adapter_with_other_tensors_is_not_scored(tiny, train, tmp_path, change):
    assert train(max_steps=1) == 0
    adapter = tmp_path / "run/adapter"
    arguments = ScorerArguments(str(tiny), str(tmp_path / "out"), adapter=str(adapter), prompt_template="alpaca")
    load_scorer(arguments, PartialState().device)
    edit, message = ADAPTER[change]
    _change(adapter, edit)
    with pytest.raises(UsageError, match=message):
        load_scorer(arguments, PartialState().device)
