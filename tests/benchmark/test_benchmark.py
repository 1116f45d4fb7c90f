"""The benchmark commands on a tiny model; their counts against sums by hand."""

import json
from time import sleep
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

from ist.benchmark import arms, probes, scale, speed, traffic
from ist.benchmark import command as benchmark
from ist.training.command_line import UsageError
from ist.training.packages import release
from ist.tuner import PROBES


def run(tiny, tmp_path, name, *options):
    file = tmp_path / f"{name}.json"
    shape = ("--model_name_or_path", str(tiny), "--rows", "2", "--length", "24")
    assert benchmark.main([name, *shape, "--output", str(file), *options]) == 0
    return json.loads(file.read_text())


def test_speed_runs_the_arms_in_turn(tiny, tmp_path, capsys):
    result = run(tiny, tmp_path, "speed", "--rounds", "1", "--arms", "bare loop", "ist", "last")
    assert list(result["results"]) == ["bare loop", "ist", "last"]
    assert all(len(runs) == 1 and all(one["total"] > 0 for one in runs) for runs in result["results"].values())
    assert result["commit"]
    assert result["command"].startswith("python -m ist.benchmark speed")
    for one in result["results"]["ist"]:
        parts = sum(one[part] for part in ("forward", "backward", "optimizer", "probe", "bookkeeping"))
        assert 0.3 * one["total"] < parts < 3 * one["total"]  # another run of the same steps, on a shared machine
        assert one["bookkeeping"] < one["forward"]
    assert "probe" not in result["results"]["last"][0]
    for runs in result["results"].values():
        for one, bare in zip(runs, result["results"]["bare loop"], strict=True):
            assert len(one["turns"]) == 10  # 20 steps, of which the first window is not counted
            assert sum(one["turns"]) / 10 == pytest.approx(one["total"])
            assert one["bare"] == bare["turns"]
    # 2 x 24 tokens: 2 FLOPs for each weight of a linear layer, of the head, and of the adapters (45,056). Attention
    # on a CPU is counted by older versions of torch alone.
    weights = 4 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64) + 32 * 400
    assert result["flops"]["tokens"] == 48
    counted = 2 * 48 * (weights + 45_056)
    assert counted <= result["flops"]["forward"] <= counted * (1 if release(torch.__version__) >= (2, 13) else 1.1)
    out, err = capsys.readouterr()
    assert "| ist |" in out
    order = [line.split("  ")[1].split(":")[0] for line in err.splitlines() if line.startswith("round")]
    assert order == ["bare loop", "ist", "last"]


def test_an_arm_that_fails_is_named(tiny, tmp_path):
    with pytest.raises(UsageError, match="the arm ist ended with 2"):
        flags = {"model_name_or_path": tiny, "train_file": tmp_path / "no.json", "max_steps": 20}
        speed.take_turns({"ist": flags}, 20, True, lambda line: None)


def test_arms_take_turns_with_the_bare_loop_in_each_group(monkeypatch):
    asked = []

    def take_turns(arms, steps, parts, say):
        asked.append((list(arms), *{flags["seed"] for flags in arms.values()}))
        assert steps == 30 and arms.get("ist", {"selection": "ist"})["selection"] == "ist"
        return {arm: {"total": 1.0, "turns": [len(asked) / 10]} for arm in arms}

    monkeypatch.setattr(speed, "take_turns", take_turns)
    result = speed.measure_speed({"max_steps": 30}, ["all", "bare loop", "ist", "last"], 2, 2, lambda line: None)
    groups = [["bare loop", "all", "ist"], ["bare loop", "last"]]
    assert asked == [(group, seed) for seed in (0, 1) for group in groups]
    assert [one["bare"] for one in result["last"]] == [[0.2], [0.4]]
    assert len(result["bare loop"]) == 4


def test_parts_are_those_of_the_steps_that_count(tiny, train_file, monkeypatch):
    """Of 21 steps with updates at 10 and 20, the first window and the last step are no turns that count."""
    full = PROBES["full"]
    monkeypatch.setitem(PROBES, "full", lambda *args: (sleep(2), full(*args))[1])
    steps = []
    turns = SimpleNamespace(wait=steps.append)
    flags = {"model_name_or_path": tiny, "train_file": train_file, "selection": "ist", "max_steps": 21}
    found = arms.run_ours(flags, True, turns)
    assert steps == list(range(21))
    assert 2 <= 10 * found["probe"] < 3  # seconds: one update


def test_the_interval_of_a_ratio_holds_it():
    """Pairs with a common disturbance: the ratio is known far better than either time."""
    generator = np.random.default_rng(1)
    within = []
    for _ in range(200):
        disturbed = generator.uniform(1, 3, size=60)
        own = 0.8 * disturbed * generator.normal(1, 0.05, size=60)
        own[::10] += 1.0 * disturbed[::10]  # the update of each tenth step is not random
        ratio, (low, high) = speed.ratio_of([{"turns": own, "bare": disturbed, "stride": 1}])
        assert ratio == pytest.approx(own.sum() / disturbed.sum())
        assert high - low < 0.1
        within.append(low < 0.9 < high)
    assert 0.88 < np.mean(within) < 0.99


def test_rank_correlation_is_spearmans():
    seen = [
        {"rewards": {"full": [0.1, 0.4, -0.2, 0.0, 0.3], "cheap": [0.2, 0.1, -0.5, 0.1, 0.3]}},
        {"rewards": {"full": [1.0, 2.0, 3.0, 4.0, 4.0], "cheap": [4.0, 3.0, 2.0, 1.0, 0.0]}},
    ]
    expected = [pandas.DataFrame(one["rewards"]).corr("spearman").iloc[0, 1] for one in seen]
    rho, (low, high) = probes.rank_correlation(seen, "cheap")
    assert rho == pytest.approx(sum(expected) / 2)
    assert (low, high) == pytest.approx((min(expected), max(expected)))


def test_probes_are_compared_on_the_same_candidates(tiny, tmp_path):
    result = run(tiny, tmp_path, "probe", "--rows", "8")
    assert len(result["updates"]) == 3
    for update in result["updates"]:
        assert set(update["rewards"]) == {"full", "cheap", "gradient"}
        assert all(len(rewards) == 4 for rewards in update["rewards"].values())
        assert all(abs(sum(rewards)) < 1e-9 for rewards in update["rewards"].values())  # N_v layers in each set


def test_bookkeeping_as_layers_grow(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scale, "SHAPE", {**scale.SHAPE, "hidden_size": 36, "intermediate_size": 48, "num_key_value_heads": 3}
    )
    result = run(tiny, tmp_path, "scale", "--layers", "2", "5", "--rank_counts")
    names = [row[0] for row in result["rows"]]
    assert names[:2] == ["2 layers", "5 layers"]
    assert len(names) == 6
    assert all(float(row[3]) > 0 and row[4].endswith(" %") for row in result["rows"])


@pytest.mark.slow
def test_gradients_travel_in_the_share_of_trained_layers(tiny, tmp_path):
    result = run(tiny, tmp_path, "communication")
    for name, steps in result["steps"].items():
        share = 1.0 if name.endswith("all") else 0.25
        row = traffic.communication_row(name, steps)
        assert float(row[2]) == pytest.approx(share, rel=0.05)
        assert float(row[3]) == share
        assert ("reduce_scatter" in row[1]) == name.startswith("fsdp2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model_name_or_path", "nowhere"), "--model_name_or_path must be a folder with a model; got nowhere"),
        (("--steps", "5"), "--steps must be a multiple of 10, 20 or more; got 5"),
    ],
)
def test_bad_input(tiny, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run(tiny, tmp_path, "speed", *options)
