"""The rules beside IST's: what each selects, on one process, DDP and FSDP2; LISA and semantic freezing beside their
descriptions."""

import ast
import re
import sys
import textwrap
import types
from collections import Counter
from pathlib import Path

import pytest
from support import read_lines

from ist import ISTConfig, SparseTuner, selection
from ist.config import ConfigError
from ist.selection import FixedLayers, LisaSampler, make_rule
from ist.selection.rule import Unlearned
from ist.training import prepare as training_model
from ist.training.command_line import UsageError

# ------------------------------------------------------------------------------------------------- the simple rules


def test_lisa_follows_its_description():
    """Pan et al., Algorithm 1: every K iterations draw gamma of N_L layers uniformly; they stay for K iterations."""
    n_layers, drawn, interval, draws = 12, 3, 7, 4000
    rule = LisaSampler(n_layers, ISTConfig(selection="lisa", trained_layers=drawn, lisa_interval=interval))
    pairs, counts = Counter(), Counter()
    for draw in range(draws):
        period = [rule.trained(draw * interval + i) for i in range(interval)]
        assert all(layers == period[0] for layers in period)
        assert len(set(period[0])) == drawn
        counts.update(period[0])
        pairs.update((a, b) for a in period[0] for b in period[0] if a < b)
    share = drawn / n_layers
    assert all(abs(counts[i] - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5 for i in range(n_layers))
    share *= (drawn - 1) / (n_layers - 1)  # without replacement: pairs too
    assert len(pairs) == n_layers * (n_layers - 1) / 2
    assert all(abs(count - draws * share) < 5 * (draws * share) ** 0.5 for count in pairs.values())
    assert LisaSampler(12, ISTConfig(selection="lisa")).config.lisa_interval == 20
    other = LisaSampler(n_layers, ISTConfig(selection="lisa", trained_layers=drawn, lisa_interval=interval, seed=1))
    assert [other.trained(7 * i) for i in range(9)] != [rule.trained(7 * i) for i in range(9)]


def test_lisa_on_full_layers_trains_embeddings_and_head_at_every_step(train, tiny, tmp_path, monkeypatch):
    moved = []
    begin_step = SparseTuner.begin_step

    def watched(tuner, step):
        now = {name: p.detach().clone() for name, p in tuner.model.named_parameters()}
        if step:
            moved.append({name for name in now if not now[name].equal(tuner.before[name])})
        tuner.before = now
        return begin_step(tuner, step)

    monkeypatch.setattr(SparseTuner, "begin_step", watched)
    options = {"selection": "lisa", "peft_method": "none", "trained_layers": 2, "lisa_interval": 3}
    assert train(**options, weight_decay=0.1, warmup_steps=0) == 0
    always = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for line, names in zip(read_lines(tmp_path / "run/metrics.jsonl"), moved, strict=False):
        layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert layers == set(line["trained_layers"])
        assert always <= names
    assert len(moved) == 19


def test_fixed_first_and_last():
    def layers(n_layers, **options):
        return FixedLayers(n_layers, ISTConfig(**options)).trained(3)

    assert layers(12, selection="first") == [0, 1, 2]
    assert layers(12, selection="last") == [9, 10, 11]
    assert layers(12, selection="fixed", fixed_layers=["7", "0,3"]) == [0, 3, 7]
    assert layers(12, selection="fixed", fixed_layers=[1]) == [1]
    assert layers(12, selection="fixed", fixed_layers="10") == layers(12, selection="fixed", fixed_layers=10) == [10]
    with pytest.raises(ConfigError, match="layer numbers"):
        ISTConfig(selection="fixed", fixed_layers="²")
    assert layers(12, selection="fixed") == [2, 6, 10]
    assert layers(30, selection="fixed", trained_layers=8) == [1, 5, 9, 13, 16, 20, 24, 28]
    rule = make_rule(12, ISTConfig(selection="fixed", fixed_layers=[1, 2], trained_layers=5))
    assert rule.counts.trained == 2
    assert not rule.due(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "random", "lisa_interval": 3}, "--lisa_interval must be left out with --selection random"),
        ({"selection": "lisa", "fixed_layers": "1"}, "--fixed_layers must be left out with --selection lisa"),
        ({"selection": "ist", "semantic_budget": 0.5}, "--semantic_budget must be left out with --selection ist"),
        ({"selection": "fixed", "fixed_layers": "0,9"}, r"--fixed_layers must be layers from 0 to 3 .*got 9"),
        ({"selection": "fixed", "fixed_layers": "x"}, "--fixed_layers must be layer numbers, from 0; got x"),
        ({"selection": "lisa", "lisa_interval": 0}, "--lisa_interval must be 1 or more; got 0"),
        ({"selection": "semantic", "semantic_budget": 0.2}, "--semantic_budget 0.2 leaves nothing to train"),
        ({"selection": "semantic", "semantic_budget": 1.5}, r"--semantic_budget must be in \(0, 1\); got 1.5"),
        ({"selection": "semantic", "min_trained_layers": 0}, "--min_trained_layers must be a fraction"),
        ({"selection": "semantic", "min_trained_layers": 4}, "--min_trained_layers 4 leaves no layer to freeze"),
        ({"selection": "semantic", "min_trained_layers": 5}, "--min_trained_layers must be .* from 1 to 4"),
        ({"selection": "semantic+ist", "kept_layers": 4}, "--kept_layers 4 leaves no layer to freeze"),
        ({"selection": "semantic+ist", "trained_layers": 4}, "--trained_layers 4 leaves no layer to freeze"),
        ({"selection": "semantic+ist", "trained_layers": 9}, "--trained_layers must be .* from 1 to 4"),
        ({"selection": "semantic", "semantic_rows": 0}, "--semantic_rows must be 1 or more; got 0"),
        ({"selection": "semantic", "layer_stack": "both"}, "--layer_stack must be decoder"),
        ({"selection": "ist", "peft_method": "none"}, "--selection ist suppresses the response of adapters, and"),
        ({"selection": "all", "peft_method": "none", "load_in_4bit": True}, "--peft_method none trains the base"),
        ({"selection": "all", "peft_method": "none", "dtype": "bfloat16"}, "--bf16 true .* or --dtype float32"),
        ({"selection": "first", "trained_layers": 9}, "--trained_layers must be .* from 1 to 4"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(train, tmp_path, monkeypatch, options, message):

    monkeypatch.setattr(training_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message) as error:
        train(**options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_rule_of_the_readme_is_a_rule(monkeypatch):
    """ist/README.md, "How to add": its code, registered by its line, does what it says."""
    page = (Path(selection.__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"  ```python\n(.*?)  ```", page, re.DOTALL)
    line = re.search(r'`("cyclic": \(.*?\))`', page)
    module = types.ModuleType("ist.selection.cyclic")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(textwrap.dedent(code), module.__dict__)
    for name, value in ast.literal_eval(f"{{{line[1]}}}").items():
        monkeypatch.setitem(selection.RULES, name, value)
    config = ISTConfig(selection="cyclic", trained_layers=2, cyclic_stride=2)
    rule = make_rule(5, config)
    assert [rule.trained(step) for step in range(4)] == [[0, 1], [2, 3], [0, 4], [1, 2]]
    assert not rule.due(3) and rule.counts.trained == 2 and isinstance(rule, Unlearned)
    with pytest.raises(ConfigError, match="cyclic_stride"):
        ISTConfig(selection="cyclic", cyclic_stride=0)
    with pytest.raises(ConfigError, match="it is for cyclic"):
        ISTConfig(selection="random", cyclic_stride=2)
