"""Effective layers, against cases by hand and against draws by torch."""

import pytest
import torch

from ist.instruments import effective_layers


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
    """By simulation; N_L t p / (1 - p + t p) is derived in figures.py."""
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(200):
        drawn = torch.rand(steps, n_layers, generator=generator).argsort(dim=1)[:, :n_trained]
        values.append(effective_layers(torch.bincount(drawn.flatten(), minlength=n_layers).tolist()))
    share = n_trained / n_layers
    expected = n_layers * steps * share / (1 - share + steps * share)
    # The mean of an inverse is a little more than the inverse of the mean.
    assert sum(values) / len(values) == pytest.approx(expected, rel=0.01)
