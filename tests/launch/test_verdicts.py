"""Paired differences of rows and their verdicts, against scipy and a bootstrap."""

import numpy as np
import pytest
from scipy import stats

from launch.experiments.verdicts import EQUAL, LITTLE, OPEN, Difference, difference, plot_concentration, rows_table


def runs(seeds, rows=50, shift=0.0, generator=0):
    """Runs whose rows differ in difficulty, the same ones for all seeds and arms."""
    tokens = np.random.default_rng(1).integers(5, 60, rows)
    hard = np.random.default_rng(2).gamma(2, 0.3, rows)
    noise = np.random.default_rng(generator)
    made = []
    for seed in seeds:
        losses = tokens * (hard + shift + noise.normal(0, 0.02) + noise.normal(0, 0.05, rows))
        loss = losses.sum() / tokens.sum()
        made.append({"seed": seed, "row_losses": losses.tolist(), "row_tokens": tokens.tolist()})
        made[-1] |= {"validation": [[80, loss]], "effective_layers": 8.0 + seed, "seconds_of_steps": 10.0}
    return made


def test_differences_are_paired_by_seed_and_row():
    one, two = runs(range(1, 9), shift=0.05, generator=3), runs(range(3, 12), generator=4)
    found = difference(one, two)
    pairs = [(a, b) for a in one for b in two if a["seed"] == b["seed"]]
    assert found.seeds == len(pairs) == 6 and found.rows == 50
    losses = [[run["validation"][0][1] for run in pair] for pair in pairs]
    reference = stats.ttest_rel(*zip(*losses, strict=True))
    assert found.mean == pytest.approx(np.mean([a - b for a, b in losses]))
    for level in (90, 95):
        assert found.within[level] == pytest.approx(tuple(reference.confidence_interval(level / 100)))
    # The standard error over rows is that of drawing other rows.
    by_row = np.mean([np.subtract(a["row_losses"], b["row_losses"]) for a, b in pairs], axis=0)
    tokens, drawn = np.array(one[0]["row_tokens"]), np.random.default_rng(5).integers(50, size=(20_000, 50))
    assert found.over_rows == pytest.approx(np.std(by_row[drawn].sum(1) / tokens[drawn].sum(1)), rel=0.05)
    assert difference(one[:1], two) is None
    assert difference(one[:3], two).within is None and difference(one[:3], two).verdict(0.01) == OPEN


@pytest.mark.parametrize(
    ("within", "verdict"),
    [
        ({95: (0.02, 0.05), 90: (0.025, 0.045)}, "differs"),
        ({95: (0.001, 0.008), 90: (0.002, 0.007)}, LITTLE.format(0.01)),
        ({95: (-0.008, 0.011), 90: (-0.007, 0.009)}, EQUAL.format(0.01)),
        ({95: (-0.008, 0.013), 90: (-0.007, 0.011)}, OPEN),
        ({95: (-0.02, 0.001), 90: (-0.018, -0.001)}, OPEN),
    ],
)
def test_verdicts(within, verdict):
    assert Difference(0.0, 8, 400, 0.003, 0.001, within).verdict(0.01) == verdict


def test_a_table_has_what_is_there(tmp_path):
    arms = {name: {"runs": made} for name, made in (("a", runs([1, 2])), ("b", runs([2, 3])), ("c", []))}
    hypotheses = [{"asks": "Is a better?", "arms": ["a", "b"]}, {"asks": "Is c?", "arms": ["c", "b"]}]
    results = {"arms": arms, "hypotheses": hypotheses, "base": {"validation": 1.0}, "margin": 0.01, "test_rows": 50}
    table = rows_table(results)
    assert "| c | not run |" in table and "| Is c? | c − b | not run |" in table
    assert f"| a | 1, 2 | 80 | {np.mean([run['validation'][0][1] for run in arms['a']['runs']]):.4f} ±" in table
    plot_concentration(tmp_path / "c.png", results)
    assert (tmp_path / "c.png").stat().st_size > 10_000
