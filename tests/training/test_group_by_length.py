"""train_sampling_strategy group_by_length: the rows of a step dealt by length, the same mathematics, less padding."""

import json

import pytest
import torch
from support import read_lines, reset_accelerate
from support.runs import run_on_two_ranks

import train_ist
from ist.training.data import GlobalBatches, dealt_by_length
from ist.training.word_problems import arithmetic_rows

LENGTHS = torch.distributions.LogNormal(5, 0.6)


def lengths_of(count: int, seed: int) -> list[int]:
    """As of instructions: many short rows, a few long ones."""
    torch.manual_seed(seed)
    return [int(length) + 1 for length in LENGTHS.sample((count,))]


def turns(order, lengths, size, world_size):
    """[[tokens of each row] of each rank] of each turn, as micro_batches cuts an order."""
    per_turn = size * world_size
    for start in range(0, len(order), per_turn):
        turn = order[start : start + per_turn]
        yield [[lengths[row] for row in turn[rank * size : (rank + 1) * size]] for rank in range(world_size)]


@pytest.mark.parametrize(("size", "world_size", "accumulation"), [(8, 1, 8), (4, 4, 4), (8, 8, 2)])
def test_little_is_padded_and_ranks_are_alike(size, world_size, accumulation):
    lengths = lengths_of(4096, 1)
    stream = GlobalBatches(len(lengths), size * world_size * accumulation, 7)
    useful, before, slowest = [], [], []

    def padded(order) -> int:
        """Tokens of the rank that has most to do."""
        return max(sum(map(max, rank)) for rank in zip(*turns(order, lengths, size, world_size), strict=True))

    for step in range(16):
        rows = stream.rows(step)
        dealt = dealt_by_length(rows, lengths, size, world_size, packing=False)
        assert sorted(dealt) == sorted(rows)
        for order, shares in ((dealt, useful), (rows, before)):
            cut = [rank for turn in turns(order, lengths, size, world_size) for rank in turn]
            shares.append(sum(map(sum, cut)) / sum(size * max(rank) for rank in cut))
        slowest.append(padded(dealt) / padded(rows))
        first = next(turns(dealt, lengths, size, world_size))
        assert max(map(max, first)) == max(lengths[row] for row in rows)  # what needs most memory comes first
    print(f"useful {sum(before) / 16:.2f} -> {sum(useful) / 16:.2f}; slowest rank {sum(slowest) / 16:.2f} of before")
    assert sum(before) / 16 < 0.6 < 0.75 < sum(useful) / 16
    assert sum(slowest) / 16 < 0.85


def test_packed_micro_batches_have_as_many_tokens_each():
    lengths, shares = lengths_of(4096, 2), {"dealt": [], "random": []}
    stream = GlobalBatches(len(lengths), 8 * 8, 7)
    for step in range(16):
        rows = stream.rows(step)
        dealt = dealt_by_length(rows, lengths, 8, 2, packing=True)
        assert sorted(dealt) == sorted(rows)
        for name, order in (("dealt", dealt), ("random", rows)):
            tokens = [sum(lengths[row] for row in order[start : start + 8]) for start in range(0, 64, 8)]
            shares[name].append(sum(tokens) / (8 * max(tokens)))
            assert max(tokens) >= max(lengths[row] for row in rows)
    means = {name: sum(values) / 16 for name, values in shares.items()}
    print(f"mean of the fullest micro-batch: {means['random']:.2f} -> {means['dealt']:.2f}")
    assert means["random"] < 0.8 < 0.97 < means["dealt"]
    # What does not fill the last micro-batch goes into it.
    ten = dealt_by_length(range(10), [1] * 10, 4, 1, packing=True)
    assert sorted(ten) == list(range(10))


def test_ties_keep_their_order():
    assert dealt_by_length([3, 1, 2], [5, 5, 5, 5], 2, 1, packing=False) == [3, 1, 2]


@pytest.fixture
def run(arguments, tmp_path):
    """A run of few long and many short rows; its losses, gradients' norms and layers by step."""
    rows = arithmetic_rows(64, seed=3, held_out=False)
    for i, row in enumerate(rows):
        row["instruction"] = "Think. " * (i % 7) + row["instruction"]
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(rows))

    def make(name, **options):
        reset_accelerate()
        given = {"train_file": file, "gradient_accumulation_steps": 3, "lora_dropout": 0, "max_steps": 8, **options}
        assert train_ist.main(arguments(output_dir=tmp_path / name, **given)) == 0
        reset_accelerate()
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        return [(line["loss"], line["grad_norm"], line["tokens"], line["trained_layers"]) for line in lines]

    return make


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_is_the_same(run, packing):
    one, two = (
        run("random", packing=packing),
        run("grouped", packing=packing, train_sampling_strategy="group_by_length"),
    )
    assert [line[2:] for line in one] == [line[2:] for line in two]
    assert [line[0] for line in two] == pytest.approx([line[0] for line in one], rel=1e-5)
    assert [line[1] for line in two] == pytest.approx([line[1] for line in one], rel=1e-3)
    assert one != two  # dealt otherwise: sums round otherwise


def test_it_resumes_to_the_bit(run, tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "save_steps": 4}
    whole = run("whole", **options)
    checkpoint = tmp_path / "whole/checkpoints/step_000004"
    assert run("again", **options, resume_from_checkpoint=checkpoint) == whole[4:]


def test_two_ranks_train_as_one_process(run, arguments, tmp_path):
    options = {"gradient_accumulation_steps": 3, "lora_dropout": 0, "max_steps": 8, "per_device_train_batch_size": 2}
    options |= {"train_file": tmp_path / "mixed.json", "train_sampling_strategy": "group_by_length"}
    flags = arguments(output_dir=tmp_path / "two", **options)
    run_on_two_ranks("ddp", flags, tmp_path)
    two = read_lines(tmp_path / "two/metrics.jsonl")
    one = run("one", train_sampling_strategy="group_by_length")
    assert [line["trained_layers"] for line in two] == [line[3] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line[0] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in two] == pytest.approx([line[1] for line in one], rel=1e-3)
