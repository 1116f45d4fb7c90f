"""The instruments, against cases by hand, against draws by torch, and against scipy."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import chi2, pearsonr

from ist.instruments import (
    Repeatability,
    effective_layers,
    looks_uniform,
    rare_layers,
    remarks,
    uniform_effective_layers,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([7] * 30, 30),  # all alike
        ([0, 5, 0, 5], 2),  # the same two
        ([12, 0, 0], 1),
        ([3, 1], 16 / 10),  # shares 3/4 and 1/4: 1 / (9/16 + 1/16)
        ([1, 2, 3, 4], 100 / 30),
        ([0, 0, 0], 0),  # before the first step
    ],
)
def test_by_hand(counts, expected):
    assert effective_layers(counts) == pytest.approx(expected)


@pytest.mark.parametrize(("n_layers", "n_trained", "steps"), [(30, 8, 1), (30, 8, 20), (80, 20, 50), (8, 2, 200)])
def test_uniform_draws_give_what_the_picture_s_dotted_line_says(n_layers, n_trained, steps):
    """By simulation."""
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(200):
        drawn = torch.rand(steps, n_layers, generator=generator).argsort(dim=1)[:, :n_trained]
        values.append(effective_layers(torch.bincount(drawn.flatten(), minlength=n_layers).tolist()))
    expected = uniform_effective_layers([steps * n_trained / n_layers] * n_layers, steps)
    # The mean of an inverse is a little more than the inverse of the mean.
    assert sum(values) / len(values) == pytest.approx(expected, rel=0.01)


def test_repeatability_is_pearsons_and_its_error_that_of_noise():
    generator = torch.Generator().manual_seed(2)
    means, errors = [], []
    for _ in range(300):
        noise, found = torch.randn(9, 30, generator=generator).tolist(), Repeatability()
        seen = [found.add(values) for values in noise]
        assert [line["successive_correlation"] is None for line in seen] == [True] + [False] * 8
        expected = [pearsonr(one, two).statistic for one, two in pairwise(noise)]
        assert [line["successive_correlation"] for line in seen[1:]] == pytest.approx(expected, abs=1e-12)
        assert seen[-1]["mean_correlation"] == pytest.approx(sum(expected) / 8, abs=1e-12)
        means.append(seen[-1]["mean_correlation"])
        errors.append(seen[-1]["mean_correlation_error"])
    assert torch.tensor(means).std().item() == pytest.approx(errors[0], rel=0.1)
    # Half signal, half noise: two measurements correlate by one half.
    signal, found = torch.randn(30, generator=generator), Repeatability()
    lines = [found.add((signal + torch.randn(30, generator=generator)).tolist()) for _ in range(200)]
    assert lines[-1]["mean_correlation"] == pytest.approx(0.5, abs=0.15)
    # Where nothing differs between layers there is no correlation, and the next one is with that.
    assert found.add([1.0] * 30)["successive_correlation"] is None
    assert found.add(signal.tolist())["successive_correlation"] is None
    again = Repeatability()
    again.load_state_dict(found.state_dict())
    assert again.add(signal.tolist()) == found.add(signal.tolist())


def test_uniform_draws_look_uniform_in_19_of_20_cases():
    generator, alike = torch.Generator().manual_seed(3), 0
    for _ in range(1000):
        drawn = torch.rand(40, 30, generator=generator).argsort(dim=1)[:, :8]
        counts = torch.bincount(drawn.flatten(), minlength=30).tolist()
        alike += looks_uniform(counts, 40)
    assert alike == pytest.approx(950, abs=25)
    assert not looks_uniform([40] * 8 + [0] * 22, 40)  # nothing was drawn
    # The quantile: counts whose spread is just below and just above scipy's.
    for factor, expected in ((0.99, True), (1.01, False)):
        spread = factor * chi2.ppf(0.95, 29) * 30 / 29 * 400 * 0.25 * 0.75 / 30
        counts = [100 + (1 if i % 2 else -1) * spread**0.5 for i in range(30)]
        assert looks_uniform(counts, 400) == expected


def test_remarks_name_what_looks_like_chance():
    assert rare_layers([0.5, 0.249, 0.25, 0.0]) == 2
    concentrated, uniform = [40] * 7 + [2] * 20 + [0] * 3, [11, 10, 11] * 10
    signal = {"mean_correlation": 0.5, "mean_correlation_error": 0.07, "probabilities": [0.5] * 30}
    assert remarks(signal, 7, concentrated, 40) == []
    noise = signal | {"mean_correlation": 0.04, "split_half": 0.1, "probabilities": [0.2] * 2 + [0.5] * 28}
    said = remarks(noise, 7, uniform, 40)
    assert said[0] == (
        "After 7 importance updates scores are not distinguishable from noise: what successive updates measured "
        "correlates by 0.04 over layers (noise: -0.14 to 0.14)."
    )
    assert [sentence.split()[0] for sentence in said] == ["After", "One", "Layers", "2"]
    assert remarks({"probabilities": [0.5] * 30}, 1, concentrated, 40) == []  # a line of an earlier version
