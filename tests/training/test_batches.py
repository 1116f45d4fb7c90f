"""The global batch, by global_batch_size or by gradient_accumulation_steps."""

import pytest

from ist.config import ISTConfig
from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.resolving import resolve_batches

BASE = ["--model_name_or_path", "model", "--train_file", "rows.json", "--report_to", "none"]


def resolved(*flags: str, processes: int = 1, resumed: int | None = None) -> tuple[int, int, int]:
    args, _, _ = parse_training_arguments([*BASE, *flags], "")
    found = resolve_batches(args, ISTConfig(), processes, resumed)
    return found.per_device_train_batch_size, found.gradient_accumulation_steps, found.global_batch_size


@pytest.mark.parametrize(("size", "processes", "accumulation"), [(16, 1, 1), (4, 1, 4), (4, 4, 1), (1, 8, 2)])
def test_a_global_batch_is_accumulated(size, processes, accumulation):
    flags = ("--global_batch_size", "16", "--per_device_train_batch_size", str(size))
    assert resolved(*flags, processes=processes) == (size, accumulation, 16)


def test_without_it_as_before():
    assert resolved() == (4, 1, 4)
    assert resolved("--gradient_accumulation_steps", "3", processes=2) == (4, 3, 24)
    assert resolved("--gradient_accumulation_steps", "3", processes=2, resumed=16) == (4, 2, 16)
    # A recipe's is taken back, and a resumed run's must be the same: differing_keys refuses another.
    assert resolved("--global_batch_size", "None", "--gradient_accumulation_steps", "2") == (4, 2, 8)
    assert resolved("--global_batch_size", "8", resumed=16) == (4, 2, 8)


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        (("--global_batch_size", "16", "--per_device_train_batch_size", "16"), 8,
         "--global_batch_size 16 is not whole micro-batches: --per_device_train_batch_size 16 on 8 processes are 128 "
         "rows. Choose --per_device_train_batch_size 2."),
        (("--global_batch_size", "18", "--per_device_train_batch_size", "4"), 1,
         "--per_device_train_batch_size 4 on 1 process are 4 rows. Choose --per_device_train_batch_size 3."),
        (("--global_batch_size", "16"), 3, "Choose another number of processes."),
        (("--global_batch_size", "16", "--gradient_accumulation_steps", "2"), 1, "both given: leave one out"),
        (("--global_batch_size", "0"), 1, "--global_batch_size must be 1 or more; got 0"),
    ],
)  # fmt: skip
def test_refused(flags, processes, message):
    with pytest.raises(UsageError) as refusal:
        resolved(*flags, processes=processes)
    assert message in str(refusal.value)
