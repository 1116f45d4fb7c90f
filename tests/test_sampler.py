"""The sampler against mathematics: a numerical integral of Eq. 6-7, Eq. 10 worked by hand, the paper's Table 8."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from ist import ImportanceSampler, ISTConfig
from ist.config import ConfigError

SCORES = {
    "zero": [0.0] * 6,
    "spread": [-3.0, -1.0, 0.0, 0.5, 1.0, 4.0],
    "extreme": [-50.0, 50.0, 0.0, -50.0, 50.0, 2.0],
}


def make(n_layers: int, scores=None, **options) -> ImportanceSampler:
    sampler = ImportanceSampler(n_layers, ISTConfig(**options))
    if scores is not None:
        sampler.scores = torch.tensor(scores, dtype=torch.float64)
    return sampler


def inclusion_by_integration(scores: list[float], count: int, points: int = 40_000) -> np.ndarray:
    """P(layer i is among the `count` largest of p_j ~ U(0, sigmoid(I_j))), Eq. 6-7, by quadrature over p_i.

    Given p_i = x, the number of larger draws is Poisson-binomial with P(p_j > x) = max(0, 1 - x / sigmoid(I_j)).
    """
    top = 1 / (1 + np.exp(-np.array(scores)))
    result = np.empty(len(top))
    for i, limit in enumerate(top):
        x = (np.arange(points) + 0.5) / points * limit
        # distribution[k] = P(exactly k of the others are larger), for each x
        distribution = np.zeros((len(top), points))
        distribution[0] = 1
        for j, other in enumerate(top):
            if j != i:
                larger = np.clip(1 - x / other, 0, 1)
                shifted = np.vstack([np.zeros(points), distribution[:-1]])
                distribution = distribution * (1 - larger) + shifted * larger
        result[i] = distribution[:count].sum(axis=0).mean()
    return result


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("count", [1, 3])
def test_inclusion_probabilities_match_the_integral(name, count):
    draws = 8000
    sampler = make(6, SCORES[name], trained_layers=count)
    counted = np.zeros(6)
    for step in range(draws):
        trained = sampler.trained(step)
        assert len(trained) == count == len(set(trained))
        counted[trained] += 1
    expected = inclusion_by_integration(SCORES[name], count)
    assert abs(expected.sum() - count) < 1e-3  # the integral itself is right
    error = np.sqrt(expected * (1 - expected) / draws)
    # Where the integral says never or always, 4 standard errors are 0; 1e-3 is its own accuracy.
    np.testing.assert_array_less(abs(counted / draws - expected), 4 * error + 1e-3)


def inclusion_without_replacement(weights: np.ndarray, count: int) -> np.ndarray:
    """P(i drawn) for successive multinomial draws without replacement, by enumerating all ordered draws."""
    result = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), count):
        p, left = 1.0, weights.sum()
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        result[list(order)] += p
    return result


def test_released_rule_draws_multinomial_without_replacement():
    scores, draws = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]), 6000
    sampler = make(5, scores.tolist(), score_rule="released", trained_layers=2, kept_layers=3, candidates=2)
    trained, suppressed = np.zeros(5), np.zeros(5)
    for step in range(draws):
        trained[sampler.trained(step)] += 1
        first = sampler.candidates(step)[0]  # the second is conditioned on being different
        suppressed[[i for i in range(5) if i not in first]] += 1
    for counted, sign in ((trained, -1), (suppressed, 1)):
        expected = inclusion_without_replacement(1 / (1 + np.exp(-sign * scores)), 2)
        error = np.sqrt(expected * (1 - expected) / draws)
        np.testing.assert_array_less(abs(counted / draws - expected), 4 * error)


def test_draws_never_fail_at_extreme_scores():
    for rule in ("paper", "released"):
        for scores in ([50.0] * 8, [-50.0] * 8, [50.0, -50.0] * 4, [-5000.0] * 7 + [5000.0]):
            sampler = make(8, scores, score_rule=rule)
            assert len(sampler.trained(3)) == 2
            assert [len(kept) for kept in sampler.candidates(10)] == [4, 4, 4]


def test_candidates_are_distinct_where_that_is_possible():
    for scores in (SCORES["zero"], SCORES["spread"]):
        for step in range(0, 2000, 10):
            candidates = make(6, scores).candidates(step)
            assert len({tuple(kept) for kept in candidates}) == 3


def test_candidates_end_where_distinct_ones_do_not_exist():
    # 2 layers, 1 kept: only two sets exist, so the third is a duplicate. At +-50 one set has all the probability.
    assert {len(kept) for kept in make(2).candidates(10)} == {1}
    assert make(4, [50.0, 50.0, -50.0, -50.0]).candidates(10) == [[0, 1]] * 3


def test_rewards_sum_to_zero_and_scores_move_as_in_equation_10():
    sampler = make(4, [0.5, 0.0, 0.0, -1.0], score_lr=10.0, kept_layers=2)
    losses = [math.log(2), math.log(4), math.log(4)]  # likelihoods 1/2, 1/4, 1/4: mean 1/3
    rewards = sampler.update([[0, 1], [1, 2], [2, 3]], losses)
    assert rewards == pytest.approx([1 / 6, -1 / 12, -1 / 12])
    assert abs(sum(rewards)) < 1e-15
    assert sampler.scores.tolist() == pytest.approx([0.5 + 10 / 6, 10 / 12, -10 / 6, -1 - 10 / 12])


def test_released_update_is_the_authors_code():
    sampler = make(4, [0.5, 0.0, 0.0, -1.0], score_rule="released", score_lr=10.0, kept_layers=2)
    candidates, losses = [[0, 1], [1, 2], [2, 3]], [0.2, 0.5, 0.9]
    s = [0.5, 0.0, 0.0, -1.0]
    p = [1 / (1 + math.exp(-x)) for x in s]
    likelihood = [math.exp(-x) for x in losses]
    expected = list(s)
    for kept, value in zip(candidates, likelihood, strict=True):
        for i in set(range(4)) - set(kept):  # what is suppressed and loses nothing is unimportant
            expected[i] += 10 * (value - sum(likelihood) / 3) * p[i] * (1 - p[i])
    sampler.update(candidates, losses)
    assert sampler.scores.tolist() == pytest.approx(expected)
    assert sampler.importance.tolist() == pytest.approx([-x for x in expected])


def test_a_loss_that_is_not_finite_changes_nothing():
    sampler = make(4, [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(FloatingPointError):
        sampler.update([[0], [1], [2]], [0.1, float("nan"), 0.2])
    assert sampler.scores.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_state_round_trip_continues_the_same_draws():
    sampler = make(8)
    sampler.update(sampler.candidates(10), [0.1, 0.7, 1 / 3])
    other = make(8)
    assert other.trained(11) != sampler.trained(11) or other.trained(12) != sampler.trained(12)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert torch.equal(other.scores, sampler.scores)
    for step in range(11, 60):
        assert other.trained(step) == sampler.trained(step)
        assert other.candidates(step) == sampler.candidates(step)


def test_draws_ignore_the_global_generator_and_differ_by_seed_and_step():
    torch.manual_seed(1)
    first = [make(32).trained(step) for step in range(20)]
    torch.manual_seed(2)
    assert [make(32).trained(step) for step in range(20)] == first
    assert [make(32, seed=7).trained(step) for step in range(20)] != first
    assert len({tuple(trained) for trained in first}) > 15


def test_selections_other_than_ist():
    assert make(6, selection="all").trained(3) == [0, 1, 2, 3, 4, 5]
    random = make(6, selection="random", trained_layers=2)
    assert len(random.trained(3)) == 2
    assert not any(random.due(step) for step in range(100))
    due = [step for step in range(40) if make(6).due(step)]
    assert due == [10, 20, 30]


@pytest.mark.parametrize(
    ("n_layers", "trained", "kept"), [(32, 8, 16), (40, 10, 20), (28, 7, 14), (30, 8, 15)], ids=str
)
def test_counts_of_table_8(n_layers, trained, kept):
    assert ISTConfig().counts(n_layers) == (n_layers, trained, kept)


def test_layer_counts():
    assert ISTConfig(trained_layers="8", kept_layers="all").counts(30) == (30, 8, 30)
    assert ISTConfig(trained_layers=1, kept_layers=0.99).counts(2) == (2, 1, 2)
    assert ISTConfig(trained_layers=0.01).counts(4).trained == 1
    assert ISTConfig(score_rule="released").counts(30) == (30, 7, 15)  # the authors' code floors
    assert ISTConfig(score_rule="released").counts(29) == (29, 7, 15)  # and suppresses 14, rounded down
    assert ISTConfig(score_rule="released", kept_layers=0.7).counts(10).kept == 7  # 0.3 * 10 is 3
    for value in ("1.0", 1.0, "0", 0, "-1", "2.5", "half", "nan"):
        with pytest.raises(ConfigError, match="trained_layers"):
            ISTConfig(trained_layers=value)
    with pytest.raises(ConfigError, match=r"from 1 to 32.*got 40"):
        ISTConfig(trained_layers=40).counts(32)
