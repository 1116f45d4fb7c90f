"""The demo's rows: `python -m ist.training.word_problems --output_dir DIR` writes word problems with worked answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ist.training.command_line import command, parse_arguments, require, run_command

# The demo's word problems: (question, first sentence of the worked answer, calculation). The held-out part has other
# templates and other numbers: no operand of a held-out question occurs in training.
_TRAIN_PROBLEMS = (
    ("{who} has {a} {things} and buys {b} more. How many {things} does {who} have now?",
     "{who} starts with {a} {things} and buys {b} more.", "a + b"),
    ("A shop sold {a} {things} in the morning and {b} in the afternoon. How many {things} did it sell that day?",
     "The shop sold {a} and then {b} {things}.", "a + b"),
    ("{who} had {sum} {things} and gave {b} of them away. How many {things} are left?",
     "{who} had {sum} {things} and gave away {b}.", "sum - b"),
    ("Of {sum} {things} on a truck, {a} fell off. How many {things} are still on the truck?",
     "There were {sum} {things} and {a} fell off.", "sum - a"),
    ("{who} fills {a} bags with {b} {things} each. How many {things} are in the bags?",
     "There are {a} bags of {b} {things}.", "a * b"),
    ("Each of {a} children brings {b} {things} to school. How many {things} do they bring?",
     "There are {a} children with {b} {things} each.", "a * b"),
)  # fmt: skip
_HELD_OUT_PROBLEMS = (
    ("One box holds {a} {things} and another holds {b}. How many {things} are in the two boxes together?",
     "The boxes hold {a} and {b} {things}.", "a + b"),
    ("{who} picked {sum} {things} and ate {b}. How many {things} does {who} have now?",
     "{who} picked {sum} {things} and ate {b}.", "sum - b"),
    ("A room has {a} rows of {b} {things}. How many {things} are in the room?",
     "There are {a} rows of {b} {things}.", "a * b"),
)  # fmt: skip
_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Grace", "Hugo")
_THINGS = ("apples", "books", "coins", "eggs", "lamps", "pens", "shells", "tickets")


def arithmetic_rows(count: int, seed: int, held_out: bool) -> list[dict]:
    """`count` distinct word problems in the LLM-Adapters row format {instruction, input, output, answer}.

    Operands are multiples of three in the held-out part and never in the other.
    """
    rng = np.random.default_rng([seed, held_out])
    problems = _HELD_OUT_PROBLEMS if held_out else _TRAIN_PROBLEMS
    operands = [n for n in range(2, 30) if (n % 3 == 0) == held_out]
    rows: dict[str, dict] = {}
    while len(rows) < count:
        a, b = (int(n) for n in rng.choice(operands, size=2))
        question, working, calculation = problems[rng.integers(len(problems))]
        if "sum" in calculation and ((a + b) % 3 == 0) != held_out:
            continue
        values = {"a": a, "b": b, "sum": a + b, "who": rng.choice(_NAMES), "things": rng.choice(_THINGS)}
        left, operator, right = calculation.split()
        x, y = values[left], values[right]
        result = {"+": x + y, "-": x - y, "*": x * y}[operator]
        output = f"{working.format(**values)} {x} {operator} {y} = {result}. The answer is {result}."
        instruction = question.format(**values)
        rows[instruction] = {"instruction": instruction, "input": "", "output": output, "answer": str(result)}
    return list(rows.values())


@dataclass
class DemoDataArguments:
    output_dir: str = field(metadata={"help": "Where train.json, validation.json and held_out.json go."})
    train_rows: int = field(default=480, metadata={"help": "Rows of train.json."})
    validation_rows: int = field(default=64, metadata={"help": "Rows of validation.json: as train.json, other rows."})
    test_rows: int = field(default=96, metadata={"help": "Rows of held_out.json: other numbers and other templates."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows."})


@command
def main(argv: Sequence[str]) -> int:
    (arguments, _) = parse_arguments([DemoDataArguments], argv, "Write the demo's arithmetic word problems.")
    for key in ("train_rows", "validation_rows", "test_rows"):
        require(1 <= getattr(arguments, key) <= 1000, key, "from 1 to 1000", getattr(arguments, key))
    seen = arithmetic_rows(arguments.train_rows + arguments.validation_rows, arguments.seed, held_out=False)
    parts = {
        "train": seen[: arguments.train_rows],
        "validation": seen[arguments.train_rows :],
        "held_out": arithmetic_rows(arguments.test_rows, arguments.seed, held_out=True),
    }
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{folder / name}.json: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    run_command(main)
