"""The loss of each row's answer, as a validation of train_ist.py with completion_only_loss has it; of text, of all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from ist.distributed import reduce_sum
from ist.evaluate.scorer import Scorer, ScorerArguments, progress, tokenizer_of
from ist.loss import row_loss_sums, row_predicted_tokens
from ist.training.command_line import UsageError
from ist.training.data import collate
from ist.training.encoding import encode_rows
from ist.training.files import json_digest, read_lines, reading, write_lines
from ist.training.reading import read_rows
from ist.training.sources import find_sources


class LossRows(NamedTuple):
    """Encoded rows of a file: input_ids, and labels that are -100 outside the answer."""

    name: str
    rows: Dataset

    @property
    def stem(self) -> str:
        return f"{self.name}.losses"  # of its file of results

    def digest(self) -> str:
        return json_digest([self.rows["input_ids"][:], self.rows["labels"][:]])


def read_loss_rows(args: ScorerArguments, files: Sequence[str], mapping: dict[str, str] | None) -> list[LossRows]:
    """
    Raises:
        UsageError: a file or a row that cannot be used, or a row without a token of its answer within max_length.
    """
    found, tokenizer = [], tokenizer_of(args) if files else None
    for file in files:
        read = read_rows("loss_file", find_sources("loss_file", [file]), mapping)
        template = args.prompt_template or "alpaca"
        answered = "text" not in read.column_names  # of rows of text all of it counts
        encoded, lengths = encode_rows(read, "loss_file", template, tokenizer, args.max_length, answered)
        if lengths.dropped:
            raise UsageError(
                f"--loss_file {file}: {lengths.dropped} of {len(read)} rows have nothing of their answer within "
                f"--max_length {args.max_length}. Raise --max_length."
            )
        found.append(LossRows(Path(file).stem, encoded))
    return found


def losses_of(
    given: LossRows, scorer: Callable[[], Scorer], args: ScorerArguments, state: PartialState
) -> dict[str, Any]:
    """{loss: per token, rows, tokens}; leaves output_dir/NAME.losses.jsonl, {row, loss: summed, tokens} a line.

    Raises:
        UsageError: the file is there, and not whole.
    """
    file = Path(args.output_dir) / f"{given.stem}.jsonl"
    if not file.exists():
        found = _measure(scorer(), given, args.batch_size, state).tolist()
        if state.is_main_process:
            write_lines(file, ({"row": i, "loss": loss, "tokens": int(n)} for i, (loss, n) in enumerate(found)))
        state.wait_for_everyone()
    lines = read_lines(file)
    if [line.get("row") for line in lines] != list(range(len(given.rows))):
        raise UsageError(f"--output_dir: {file} does not hold {len(given.rows)} whole rows. Remove it.")
    with reading(file, "the losses of rows"):
        loss, tokens = (sum(line[key] for line in lines) for key in ("loss", "tokens"))
    return {"loss": loss / tokens, "rows": len(lines), "tokens": tokens}


@torch.inference_mode()
def _measure(scorer: Scorer, given: LossRows, batch_size: int, state: PartialState) -> Tensor:
    """[rows, 2] float64: (sum of losses, predicted tokens). Rows are shared out over ranks, batch by batch."""
    ids, labels = given.rows["input_ids"][:], given.rows["labels"][:]
    by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the batch that needs most memory comes first
    batches = [by_length[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    sums = torch.zeros(len(ids), 2, dtype=torch.float64, device=scorer.device)
    for batch in progress(batches[state.process_index :: state.num_processes], "batch", state):
        rows = collate([ids[i] for i in batch], [labels[i] for i in batch], scorer.tokenizer.pad_token_id or 0)
        rows = {key: value.to(scorer.device) for key, value in rows.items()}
        sums[batch, 0] = row_loss_sums(scorer.model, rows).double()
        sums[batch, 1] = row_predicted_tokens(scorer.model, rows).double()
    return reduce_sum(sums)
