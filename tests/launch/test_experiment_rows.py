"""Experiments that measure the loss of every test row: by seed, gone on with, scores of measured effects."""

import json
import statistics

import pytest
from support import reset_accelerate
from support.experiments import FILE, arguments

from ist.training.command_line import UsageError
from launch.experiments import run
from launch.experiments.results import read_results

EXPECTED = {"selection": "ist", "score_rule": "expected", "trained_layers": 2, "kept_layers": 2}
ROWS = {
    "measure": "rows",
    "evaluate": None,
    "tuning": {"seed": 100, "grid": {"learning_rate": [2e-2]}},
    "arms": {
        "effects": EXPECTED | {"score_lr": 1e-6, "seeds": [7]},
        "oracle": {"selection": "oracle", "trained_layers": 2, "scores_of": {"arm": "effects", "factor": 2}},
        "anti": {"selection": "oracle", "trained_layers": 2, "scores_of": {"arm": "effects", "factor": -2}},
    },
    "pairs": [],
    "hypotheses": [{"asks": "Does it matter?", "arms": ["oracle", "anti"]}],
    "recipe": {key: value for key, value in FILE["recipe"].items() if key != "eval_steps"},
}


def test_the_loss_of_every_row(tiny, many_rows, write, tmp_path, few_processes):
    values = {"model_name_or_path": tiny, "train_file": many_rows, "experiment": write(**ROWS), "jobs": 1}
    argv = arguments(**values, output_dir=tmp_path / "out", publish=tmp_path / "published")
    assert run.main(argv) == 0
    results = read_results(tmp_path / "published")
    assert [len(arm["runs"]) for arm in results["arms"].values()] == [1, 2, 2]
    effects = results["arms"]["effects"]["runs"][0]["effects"]
    updates = [json.loads(line) for line in next(tmp_path.glob("out/runs/effects/*/importance.jsonl")).open()]
    standard = [
        [(e - statistics.mean(u["effects"])) / statistics.pstdev(u["effects"]) for e in u["effects"]] for u in updates
    ]
    assert effects == pytest.approx([statistics.mean(layer) for layer in zip(*standard)], abs=1e-4)
    scores = [json.loads((tmp_path / f"out/scores/{name}.json").read_text()) for name in ("oracle", "anti")]
    assert scores[0] == [-score for score in scores[1]]
    quantiles = [2 * statistics.NormalDist().inv_cdf((i + 0.5) / 4) for i in range(4)]
    assert sorted(scores[0]) == pytest.approx(quantiles, abs=1e-4)
    assert sorted(range(4), key=effects.__getitem__) == sorted(range(4), key=scores[0].__getitem__)

    for arm in results["arms"].values():
        for one in arm["runs"]:
            assert len(one["row_losses"]) == len(one["row_tokens"]) == 10
            mean = sum(one["row_losses"]) / sum(one["row_tokens"])
            assert one["validation"][-1][1] == pytest.approx(mean, abs=1e-3)
            assert 1 <= one["effective_layers"] <= 4
    # On another machine, what is published is not run again; of other rows it is refused.
    runs = len(few_processes)
    reset_accelerate()
    assert run.main(arguments(**values, output_dir=tmp_path / "other", publish=tmp_path / "published")) == 0
    assert len(few_processes) == runs + 1  # the base model's losses
    reset_accelerate()
    recipe = ROWS["recipe"] | {"max_steps": 5}
    values["experiment"] = write(**ROWS | {"recipe": recipe})
    with pytest.raises(UsageError, match=r"effects-7.json is the result of another max_steps: remove it"):
        run.main(arguments(**values, output_dir=tmp_path / "third", publish=tmp_path / "published"))
