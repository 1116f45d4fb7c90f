"""score_rule expected: the mean of Eq. 9-10, its standard errors, what noise makes of it; stable draws and controls."""

import json

import pytest
import torch
from support import ROOT, read_lines
from support.importance import effective_without_effect, noise_table, reliability_table
from support.planted import as_table, updates_until_found
from test_tuner import Planted
from torch import nn

from ist import probe
from ist.config import ConfigError, ISTConfig
from ist.sampler import ImportanceSampler, shrinkage
from ist.selection import make_rule
from ist.tuner import SparseTuner

PLAIN = {"score_rule": "expected", "reward_scale": "none", "shrink": False, "score_decay": 1.0}


def uniform_sets(n_sets: int, n_layers: int, kept: int) -> list[list[int]]:
    order = torch.rand(n_sets, n_layers, generator=torch.Generator().manual_seed(n_layers)).argsort(dim=1)
    return order[:, :kept].tolist()


@pytest.mark.parametrize(
    ("n_layers", "kept", "candidates", "n_sets"),
    [(8, 0.5, 3, 100_000), (8, 0.25, 3, 20_000), (9, 0.5, 2, 20_000), (15, 0.25, 4, 20_000)],
)
def test_the_expected_update_is_the_mean_of_drawn_ones(n_layers, kept, candidates, n_sets):
    worth = torch.linspace(-1e-3, 2e-3, n_layers, dtype=torch.float64) ** 3 * 1e6 + 1e-4
    drawn = ImportanceSampler(n_layers, ISTConfig(kept_layers=kept, score_lr=1.0, candidates=candidates))
    sets = uniform_sets(n_sets, n_layers, drawn.counts.kept)
    losses = -(0.5 + torch.stack([worth[one].sum() for one in sets])).log()
    n_updates = len(sets) // candidates
    for update in range(n_updates):
        part = slice(candidates * update, candidates * (update + 1))
        drawn.update(sets[part], losses[part].tolist())
    expected = ImportanceSampler(n_layers, ISTConfig(kept_layers=kept, score_lr=1.0, candidates=candidates, **PLAIN))
    expected.learn(worth - worth.mean(), None)
    mean = drawn.scores / n_updates
    assert torch.corrcoef(torch.stack([mean, expected.scores]))[0, 1] > 0.995
    torch.testing.assert_close(mean, expected.scores, rtol=0, atol=0.06 * expected.scores.abs().max().item())


def rows_of(effect: torch.Tensor, n_rows: int, noise: float, generator: torch.Generator) -> probe.GateDerivatives:
    """Derivatives of rows of 5 to 20 tokens around `effect` a token."""
    tokens = torch.randint(5, 21, (n_rows,), generator=generator).double()
    spread = noise * torch.randn(n_rows, len(effect), generator=generator, dtype=torch.float64)
    return probe.GateDerivatives(0.7 * tokens, tokens[:, None] * (effect + spread), tokens)


def test_standard_errors_are_the_spread_of_the_effects():
    generator = torch.Generator().manual_seed(0)
    truth = torch.linspace(-1, 1, 10, dtype=torch.float64) * 0.02
    found = [
        probe.effects(probe.effect_sums(rows_of(truth, 16, 0.05, generator)), suppression=0.25) for _ in range(2000)
    ]
    effects = torch.stack([one.effects for one in found])
    errors = torch.stack([one.standard_errors for one in found])
    factor = -0.75 * torch.tensor(-0.7).exp().item()
    torch.testing.assert_close(effects.mean(dim=0), factor * (truth - truth.mean()), rtol=0, atol=3e-4)
    torch.testing.assert_close(errors.square().mean(dim=0).sqrt(), effects.std(dim=0), rtol=0.06, atol=0)
    assert 0.1 < torch.tensor([one.split_half for one in found]).mean() < 0.7  # there is a signal, and noise


def test_sums_of_ranks_are_those_of_all_rows():
    generator = torch.Generator().manual_seed(0)
    whole = rows_of(torch.linspace(-1, 1, 6, dtype=torch.float64), 12, 0.5, generator)
    parts = [probe.GateDerivatives(*(tensor[start : start + 4] for tensor in whole)) for start in (0, 4, 8)]
    apart = probe.effects(sum(map(probe.effect_sums, parts)), 0.25)
    together = probe.effects(probe.effect_sums(whole), 0.25)
    torch.testing.assert_close(apart.effects, together.effects)
    torch.testing.assert_close(apart.standard_errors, together.standard_errors)
    # Masked rows, of a rank that was short of rows, count for nothing.
    nothing = probe.GateDerivatives(torch.zeros(2).double(), torch.zeros(2, 6).double(), torch.zeros(2).double())
    padded = probe.effects(probe.effect_sums(whole) + probe.effect_sums(nothing), 0.25)
    torch.testing.assert_close(padded.standard_errors, together.standard_errors)
    one = probe.effects(probe.effect_sums(probe.GateDerivatives(*(tensor[:1] for tensor in whole))), 0.25)
    assert one.standard_errors is None
    assert one.split_half is None


def test_without_any_effect_layers_stay_near_uniform():
    assert min(effective_without_effect(ISTConfig(score_rule="expected", seed=seed), seed) for seed in range(10)) > 25
    locked = ISTConfig(score_rule="expected", shrink=False, score_decay=1.0, score_lr=1.0)
    assert effective_without_effect(locked, 0) < 25  # which shrinkage and decay prevent


def test_the_tables_of_reliability_and_of_planted_layers_are_their_files():
    found = json.loads((ROOT / "launch/results/reliability.json").read_text())["found"]
    assert {line["seed"] for line in found} == {1, 2, 3} and {line["step"] for line in found} == {20, 80, 300}
    assert "\n".join(reliability_table(found)) in (ROOT / "launch/results/reliability.md").read_text()
    for name in ("planted", "planted-80"):
        planted = json.loads((ROOT / f"launch/results/{name}.json").read_text())
        table = "\n".join(as_table(planted["found"], planted["planted"]))
        assert table in (ROOT / f"launch/results/{name}.md").read_text()


def test_the_table_of_noise_is_its_file():
    found = json.loads((ROOT / "launch/results/noise.json").read_text())["found"]
    assert "\n".join(noise_table(found)) in (ROOT / "launch/results/noise.md").read_text()
    seed = effective_without_effect(ISTConfig(score_rule="expected", seed=3), 3)
    assert found["expected"][3] == pytest.approx(seed, abs=1e-6)


def test_shrinkage_against_its_formula():
    effects, errors = torch.tensor([3.0, -1.0, -2.0, 0.5, -0.5]).double(), torch.tensor([1.0, 2, 1, 1, 1]).double()
    assert shrinkage(effects, errors) == pytest.approx(1 - 2 / (9 + 0.25 + 4 + 0.25 + 0.25))
    assert shrinkage(effects, 100 * errors) == 0
    assert shrinkage(effects, None) == 0
    assert shrinkage(torch.zeros(5).double(), torch.zeros(5).double()) == 0


def test_scores_do_not_depend_on_the_scale_of_the_loss_with_sd():
    effects, errors = torch.linspace(-1, 2, 12).double() ** 3, torch.full((12,), 0.1).double()
    effects = effects - effects.mean()
    moved = []
    for scale in (1.0, 1e-4):
        rule = ImportanceSampler(12, ISTConfig(score_rule="expected"))
        rule.learn(scale * effects, scale * errors)
        moved.append(rule.scores)
        paper = ImportanceSampler(12, ISTConfig(reward_scale="sd"))
        rewards = paper.update([[0], [1], [2]], [1.0, 1.0 + scale, 1.0 + 3 * scale])
        assert torch.tensor(rewards).std() == pytest.approx(1.0)
    torch.testing.assert_close(*moved)
    assert ImportanceSampler(12, ISTConfig(reward_scale="sd")).update([[0], [1]], [1.0, 1.0]) == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(10))
def test_planted_layers_are_found_sooner(seed):
    generator = torch.Generator().manual_seed(seed)
    useful = tuple(torch.randperm(8, generator=generator)[:2].tolist())
    torch.manual_seed(seed)
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Planted(8, useful), LoraConfig(r=8, target_modules=r"layers\.\d+"))
    x = torch.randn(64, 8, generator=generator)
    target = x + x @ torch.randn(8, 8, generator=generator)

    def loss_of():
        return nn.functional.mse_loss(model(x), target)

    config = ISTConfig(seed=seed, update_interval=5, score_rule="expected", shrink=False)  # one batch has no errors
    tuner = SparseTuner(model, config, lambda _: [{}], lambda *_: (loss_of() * 64, torch.tensor(64)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    for step in range(100):  # test_tuner's paper rule has 300
        tuner.begin_step(step)
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert set(tuner.rule.importance.argsort(descending=True)[:2].tolist()) == set(useful)


# ------------------------------------------------------------------------------------------------- draws and controls


def test_drawn_layers_stay_for_their_interval_whatever_scores_do():
    config = ISTConfig(draw_interval=7, update_interval=5, trained_layers=3)
    rule, seen = ImportanceSampler(12, config), {}
    for step in range(40):
        if rule.due(step):
            rule.scores = torch.randn(12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        seen.setdefault(step // 7, set()).add(tuple(rule.trained(step)))
        if step % 3 == 0:  # a resumed run goes on with the same layers
            state = json.loads(json.dumps(rule.state_dict()))
            rule = ImportanceSampler(12, config)
            rule.load_state_dict(state)
    assert all(len(layers) == 1 for layers in seen.values())
    assert len(set.union(*seen.values())) > 3
    assert len(rule.state_dict()["drawn"]) <= 4  # not all of the run


def test_one_layer_of_each_band():
    rule = ImportanceSampler(10, ISTConfig(draw="stratified", trained_layers=4))
    rule.scores[9] = 50.0
    counts = torch.zeros(10)
    for step in range(500):
        layers = rule.trained(step)
        assert [sum(first <= i < end for i in layers) for first, end in ((0, 2), (2, 5), (5, 7), (7, 10))] == [1] * 4
        counts[layers] += 1
    # By importance in its band of three: U(0, 1) is the largest in two thirds of the draws, beside two U(0, 1/2).
    assert counts[9] == pytest.approx(500 * 2 / 3, abs=40)
    assert counts[:2].min() > 200


def test_the_best_layers_stay_at_the_end():
    rule = ImportanceSampler(8, ISTConfig(anneal_to_fixed=0.5, trained_layers=2, update_interval=10))
    rule.scores = torch.tensor([0.0, 3, 0, 0, 2, 0, 0, 1]).double()
    with pytest.raises(ValueError, match="total_steps"):
        rule.trained(0)
    rule.total_steps = 100
    assert {tuple(rule.trained(step)) for step in range(50, 100)} == {(1, 4)}
    assert len({tuple(rule.trained(step)) for step in range(50)}) > 5
    assert [step for step in range(100) if rule.due(step)] == [10, 20, 30, 40]
    rule.scores.zero_()
    assert len({tuple(rule.trained(60)) for rule.config.seed in range(20)}) > 5  # not always the first


def test_placebo_has_the_dynamics_and_not_the_knowledge():
    ist, placebo = (make_rule(8, ISTConfig(selection=selection)) for selection in ("ist", "placebo"))
    moved = []
    for step in range(10, 2010, 10):
        assert ist.due(step) and placebo.due(step)
        sets = ist.candidates(step)
        losses = [1.0 - 0.01 * (0 in kept) for kept in sets]  # layer 0 helps
        assert sorted(ist.update(sets, losses)) == pytest.approx(sorted(placebo.update(sets, losses)))
        moved.append(placebo.scores[0].item())
        ist.scores.clamp_(-1, 1)
        placebo.scores.zero_()
    assert ist.scores.argmax() == 0
    assert abs(sum(moved) / len(moved)) < 0.25 * max(map(abs, moved))
    expected = make_rule(8, ISTConfig(selection="placebo", score_rule="expected", shrink=False))
    expected.due(10)
    order = expected.learn(torch.arange(8).double() - 3.5, None)["permutation"]
    assert sorted(order) == list(range(8))
    assert order != list(range(8))
    assert expected.scores.argsort().tolist() == torch.tensor(order).argsort().tolist()


def test_oracle_draws_by_the_given_scores(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps([5, -5, 5, -5, 0, 0]))
    rule = make_rule(6, ISTConfig(selection="oracle", oracle_scores=str(file), trained_layers=2))
    counts = torch.zeros(6)
    for step in range(300):
        assert not rule.due(step)
        counts[rule.trained(step)] += 1
    assert counts[[0, 2]].min() > 150 > counts[[1, 3]].max()
    for text, n_layers in (("[1, 2]", 6), ("{}", 6), ("[1, NaN, 1, 1, 1, 1]", 6), ("nothing", 6)):
        file.write_text(text)
        with pytest.raises(ConfigError, match="oracle_scores"):
            make_rule(n_layers, ISTConfig(selection="oracle", oracle_scores=str(file)))
    with pytest.raises(ConfigError, match=r"oracle_scores.* must be given"):
        ISTConfig(selection="oracle")


def test_gradient_norm_draws_layers_by_their_norms():
    rule = make_rule(6, ISTConfig(selection="gradient_norm", trained_layers=1, gradient_norm_decay=0.5))
    seen = []
    for step in range(400):
        (layer,) = rule.trained(step)
        seen.append(layer)
        rule.observe([layer], torch.tensor([4.0 if layer == 2 else 1.0]))
    counts = torch.bincount(torch.tensor(seen[-300:]), minlength=6)
    assert counts.argmax() == 2
    assert counts.min() > 0
    rule.observe([2], torch.tensor([8.0]))
    assert rule.means[2] == 6.0  # half of 4 and of 8
    again = make_rule(6, rule.config)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.trained(999) == rule.trained(999)
    fresh = make_rule(6, rule.config)
    fresh.load_state_dict(json.loads(json.dumps(fresh.state_dict())))
    assert fresh.means.isnan().all()


def test_a_run_with_expected_scores_resumes_exactly_and_records_effects(train, tmp_path):
    options = {"score_rule": "expected", "update_interval": 3, "save_steps": 7, "draw_interval": 4, "max_steps": 16}
    options |= {"logging_steps": 1, "trained_layers": 1, "learning_rate": 5e-3, "warmup_steps": 0}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    checkpoint = tmp_path / "whole/checkpoints/step_000007"
    assert train(output_dir=tmp_path / "again", resume_from_checkpoint=checkpoint, **options) == 0
    whole, again = (read_lines(tmp_path / name / "importance.jsonl") for name in ("whole", "again"))
    assert [line["step"] for line in whole] == [3, 6, 9, 12, 15]
    assert [line["scores"] for line in again] == [line["scores"] for line in whole if line["step"] >= 7]
    for line in whole:
        assert line["candidates"] == []
        assert len(line["losses"]) == 1
        assert len(line["effects"]) == len(line["standard_errors"]) == 4
        assert sum(line["effects"]) == pytest.approx(0, abs=1e-9)
        assert min(line["standard_errors"]) > 0
        assert -1 <= line["split_half"] <= 1
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": True}, "--shrink must be left out without --score_rule expected"),
        ({"score_rule": "expected", "probe": "gradient"}, "--probe must be full or cheap with --score_rule expected"),
        ({"score_rule": "expected", "probe_batch_size": 1}, "--probe_batch_size must be 2 or more with --shrink true"),
        ({"score_decay": 0}, "--score_decay must be above 0"),
        ({"draw_interval": 0}, "--draw_interval must be 1 or more"),
        ({"anneal_to_fixed": 1}, r"--anneal_to_fixed must be in \(0, 1\)"),
        ({"draw": "banded"}, "--draw must be one of independent, stratified"),
        ({"reward_scale": "mean"}, "--reward_scale must be one of none, sd"),
        ({"oracle_scores": "x.json"}, "--oracle_scores must be left out with --selection ist"),
    ],
)
def test_values_that_do_not_fit_are_refused(train, options, message):
    from ist.training.command_line import UsageError

    with pytest.raises(UsageError, match=message):
        train(**options)


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([[0, 1, 2]] * 3, 1),
        ([[0, 1, 3], [0, 1, 2], [2, 1, 0]], 2),
        ([[0, 1, 2], [0, 1, 3], [2, 1, 0]], 3),
        ([[0, 1, 2], [0, 1, 2], [2, 1, 3]], None),
    ],
)
def test_updates_until_planted_layers_are_found(ranks, found):
    assert updates_until_found(ranks, 9) == found
