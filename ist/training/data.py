"""The rows of a run, tokenised, and the one stream of global batches that depends on the seed alone."""

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from ist.loss import IGNORE, count_predicted
from ist.sampler import seeded_generator
from ist.training.arguments import Arguments
from ist.training.command_line import UsageError, require
from ist.training.continuing import adapter_digest, adapter_folder
from ist.training.encoding import Lengths, encode_rows, load_tokenizer
from ist.training.files import model_digest
from ist.training.reading import column_mapping, read_rows, unused_columns
from ist.training.sources import find_sources, hub_source


class Data(NamedTuple):
    """What a run trains and is validated on.

    Attributes:
        rows: columns input_ids, labels.
        facts: the lengths of the rows, for run.json.
        notes: lines about the rows that a user may not expect.
    """

    rows: Dataset
    validation: Dataset | None
    pad_token_id: int
    facts: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[str, ...] = ()


def prepare_data(args: Arguments) -> Data:
    """Rows read, split and tokenised.

    Raises:
        UsageError: a file, a row, a split or a tokenizer that cannot be used.
    """
    name, trust = args.model_name_or_path, args.trust_remote_code
    tokenizer = load_tokenizer(
        "model_name_or_path", name, args.prompt_template, args.chat_template, trust_remote_code=trust
    )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    key = "train_file" if args.train_file else "dataset_name"
    sets, validation = _read_training_sets(args, key), None
    notes = [line for rows in sets for line in unused_columns(rows)]
    if args.validation_file:
        sources = find_sources("validation_file", args.validation_file, args.dataset_split, "validation")
        validation = read_rows("validation_file", sources, column_mapping(args.column_mapping))
        notes += unused_columns(validation)
    elif args.validation_size:
        sets, validation = _split(sets, args.validation_size)
    encoding = (args.prompt_template, tokenizer, args.max_length, args.completion_only_loss)
    options = {"overlong": args.overlong, "workers": args.preprocessing_num_workers}
    encoded = [encode_rows(rows, key, *encoding, **options) for rows in sets]
    lengths = [summary for _, summary in encoded]
    facts = _facts("", lengths)
    notes += _messages("training", lengths, args)
    if validation is not None:
        key = "validation_file" if args.validation_file else key
        validation, summary = encode_rows(validation, key, *encoding, **options)
        facts |= _facts("validation_", [summary])
        notes += _messages("validation", [summary], args)
    rows = [
        _repeated(rows, weight)
        for (rows, _), weight in zip(encoded, args.train_weights or [1.0] * len(sets), strict=True)
    ]
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    joined = rows[0] if len(rows) == 1 else concatenate_datasets(rows)
    return Data(joined, validation, pad_token_id, facts, tuple(notes))


def shown_rows(args: Arguments, data: Data) -> str:
    """The first `show_rows` rows as the model gets them, decoded, what is learnt between ⟦ and ⟧."""
    tokenizer = load_tokenizer("model_name_or_path", args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    lines = []
    for i, row in enumerate(data.rows.select(range(min(args.show_rows or 0, len(data.rows))))):
        text = ""
        for learnt, group in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORE):
            part = tokenizer.decode([token for token, _ in group])
            text += f"⟦{part}⟧" if learnt else part
        lines.append(
            f"---- row {i}: {len(row['input_ids'])} tokens, {count_predicted(row['labels'])} with loss\n{text}"
        )
    return "\n".join([*data.notes, *lines])


def _read_training_sets(args: Arguments, key: str) -> list[Dataset]:
    """The rows of each --train_file, or of the dataset; with train_weights set by set, else as one."""
    mapping = column_mapping(args.column_mapping)
    if args.dataset_name:
        sources = [[hub_source(key, args.dataset_name, args.dataset_config, args.dataset_split)]]
    else:
        sources = [find_sources(key, [file], args.dataset_split) for file in args.train_file or ()]
    weights = args.train_weights
    if weights:
        many = f"as many numbers as there are sets ({len(sources)})"
        require(len(weights) == len(sources), "train_weights", many, " ".join(map(str, weights)))
    else:
        sources = [[source for those in sources for source in those]]
    sets = [read_rows(key, those, mapping) for those in sources]
    renamed = {name for rows in sets for text in rows.unique("renamed") for name in (text or "").split(", ")}
    if unknown := sorted(mapping.keys() - renamed):
        raise UsageError(f"--column_mapping {unknown[0]}={mapping[unknown[0]]}: no file has a column {unknown[0]}.")
    if args.max_samples:
        sets = [rows.select(range(min(args.max_samples, len(rows)))) for rows in sets]
    return sets


def _split(sets: list[Dataset], asked: float) -> tuple[list[Dataset], Dataset]:
    """(what is left of each set to train on, the validation rows: the same ones whatever the seed)."""
    total = sum(map(len, sets))
    size = asked if asked < 1 else int(asked)
    taken = math.ceil(size * total) if size < 1 else size
    require(taken < total, "validation_size", f"less than the {total} rows there are", size)
    shares = [round(taken * len(rows) / total) for rows in sets]
    shares[-1] = int(taken) - sum(shares[:-1])
    if any(not 0 <= share < len(rows) for share, rows in zip(shares, sets, strict=True)):
        raise UsageError(f"--validation_size {size} leaves no training rows of a train_file; give --validation_file.")
    parts = [
        rows.train_test_split(test_size=share, seed=42) if share else {"train": rows}
        for rows, share in zip(sets, shares, strict=True)
    ]
    return [part["train"] for part in parts], concatenate_datasets([part["test"] for part in parts if "test" in part])


def _repeated(rows: Dataset, weight: float) -> Dataset:
    """`weight` times the rows in each epoch, rounded to rows; of the part that is not whole, the first ones."""
    count = max(1, round(weight * len(rows)))
    return rows if count == len(rows) else rows.select([i % len(rows) for i in range(count)])


def _facts(of: str, lengths: Sequence[Lengths]) -> dict[str, Any]:
    return {
        f"{of}dropped_rows": sum(summary.dropped for summary in lengths),
        f"{of}cut_rows": sum(summary.cut for summary in lengths),
        f"{of}longest_row": max(summary.longest for summary in lengths),
    }


def _messages(of: str, lengths: Sequence[Lengths], args: Arguments) -> list[str]:
    """Lines about rows that are not learnt as they are."""
    facts, lines = _facts("", lengths), []
    if facts["cut_rows"]:
        lines.append(
            f"{facts['cut_rows']} {of} rows are cut to --max_length {args.max_length} (the longest has "
            f"{facts['longest_row']} tokens), their ends are not learnt; --overlong drop leaves them out"
        )
    if facts["dropped_rows"]:
        why = "overlong, or " if args.overlong == "drop" else ""
        lines.append(
            f"{facts['dropped_rows']} {of} rows are dropped: {why}nothing to learn (weight 0), or nothing of it within "
            "--max_length"
        )
    if unstopped := sum(summary.unstopped for summary in lengths):
        lines.append(f"{unstopped} {of} rows end in no stop token: the model does not learn where to stop")
    return lines


def rows_digest(rows: Dataset) -> str:
    """sha256 of encoded rows in their order: of every token and label, and of where each row ends."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for column in ("input_ids", "labels"):
            lists = batch[column].combine_chunks()
            for values in (lists.value_lengths(), lists.flatten()):
                digest.update(values.to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def content_digests(args: Arguments, data: Data) -> dict[str, str]:
    """What a run is made from, by content and not by name, for its configuration: it resumes on the same alone.

    Raises:
        ReadError: the model's files cannot be read.
    """
    digests = {"model_digest": model_digest(args.model_name_or_path), "train_digest": rows_digest(data.rows)}
    if args.adapter_name_or_path:
        folder = adapter_folder(args.adapter_name_or_path)
        digests["adapter_digest"] = adapter_digest(folder, "--adapter_name_or_path")
    if data.validation is not None:
        digests["validation_digest"] = rows_digest(data.validation)
    return digests


class GlobalBatches:
    """The stream of row indices: one permutation of the rows per epoch, end to end, cut into full global batches.

    It depends on (n_rows, batch_size, seed) alone, never on the number of ranks: batch `step` is stream[step * B :
    (step + 1) * B] and may span two epochs.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self._permutations: dict[int, list[int]] = {}

    def rows(self, step: int) -> list[int]:
        """The [B] row indices of the global batch of `step`."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._permutation(place // self.n_rows)[place % self.n_rows] for place in places]

    def ends_epoch(self, steps: int) -> bool:
        """Whether the last of so many finished steps has ended a pass over the rows."""
        return steps * self.batch_size // self.n_rows > (steps - 1) * self.batch_size // self.n_rows

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            generator = seeded_generator(self.seed, epoch, "data")
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = torch.randperm(self.n_rows, generator=generator).tolist()
        return self._permutations[epoch]


def dealt_by_length(
    indices: Sequence[int], lengths: Sequence[int], size: int, world_size: int, packing: bool
) -> list[int]:
    """The rows of a global batch in the order in which `micro_batches` deals them out, so that little is padded.

    Padded, rows are sorted and cut into micro-batches; the longest come first, and ranks take turns in getting the
    longer ones, so that all have as much to do. Packed, where the sum of a micro-batch counts, each row in turn, the
    longest first, goes to the emptiest micro-batch with room; then rows of the fullest are swapped for others' as long
    as that helps.

    Args:
        indices: [B] the rows of a step.
        lengths: tokens of each row of the set.
        size: rows of a micro-batch.
    """
    longest_first = sorted(indices, key=lambda row: -lengths[row])
    if packing:
        bins = _of_equal_sums(longest_first, lengths, size)
    else:
        bins = [longest_first[start : start + size] for start in range(0, len(indices), size)]
        for start in range(world_size, len(bins) - world_size + 1, 2 * world_size):
            bins[start : start + world_size] = bins[start : start + world_size][::-1]
    return [row for rows in bins for row in rows]


def _of_equal_sums(longest_first: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Bins of `size` rows, the last of what is left, whose lengths sum up to about the same."""
    bins: list[list[int]] = [[] for _ in range(math.ceil(len(longest_first) / size))]
    tokens, last = [0] * len(bins), len(longest_first) - (len(bins) - 1) * size
    for row in longest_first:
        room = [i for i, rows in enumerate(bins) if len(rows) < (size if i < len(bins) - 1 else last)]
        emptiest = min(room, key=tokens.__getitem__)
        bins[emptiest].append(row)
        tokens[emptiest] += lengths[row]
    for _ in range(len(longest_first)):
        full = max(range(len(bins)), key=tokens.__getitem__)
        others = sorted(range(len(bins)), key=tokens.__getitem__)[:-1]
        if not any(_swapped(bins, tokens, lengths, full, other) for other in others):
            break
    return bins


def _swapped(bins: list[list[int]], tokens: list[int], lengths: Sequence[int], full: int, other: int) -> bool:
    """Whether a row of the bin `full` could be swapped for one of `other`, so that the larger of the two sums falls."""
    half = (tokens[full] - tokens[other]) / 2
    pairs = [(i, j) for i in range(len(bins[full])) for j in range(len(bins[other]))]
    moved = {(i, j): lengths[bins[full][i]] - lengths[bins[other][j]] for i, j in pairs}
    i, j = min(pairs, key=lambda pair: abs(moved[pair] - half))
    if abs(moved[i, j] - half) >= half:
        return False
    bins[full][i], bins[other][j] = bins[other][j], bins[full][i]
    tokens[full] -= moved[i, j]
    tokens[other] += moved[i, j]
    return True


def micro_batches(
    rows: Dataset,
    indices: Sequence[int],
    size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    last_tokens: int | None = None,
    packing: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of `indices` as padded batches of `size` rows: input_ids, attention_mask, labels, all [B, S].

    Every rank gets the same number of batches (sharded forwards need it); where rows run out, a masked one stands. Of
    each row the `last_tokens` up to its last predicted one are taken. With `packing`, see `pack`.
    """
    for start in range(0, len(indices), size * world_size):
        share = indices[start + rank * size : start + (rank + 1) * size]
        batch = rows[list(share)] if share else {"input_ids": [[pad_token_id] * 2], "labels": [[IGNORE] * 2]}
        input_ids, labels = batch["input_ids"], batch["labels"]
        if last_tokens is not None:
            ends = [max((i for i, label in enumerate(row) if label != IGNORE), default=1) + 1 for row in labels]
            input_ids, labels = (
                [row[max(0, end - last_tokens) : end] for row, end in zip(rows_of, ends, strict=True)]
                for rows_of in (input_ids, labels)
            )
        yield pack(input_ids, labels) if packing else collate(input_ids, labels, pad_token_id)


def pack(input_ids: list[list[int]], labels: list[list[int]]) -> dict[str, Tensor]:
    """Rows end to end in one, without padding: input_ids, position_ids, labels, int64 [1, S].

    Positions begin anew with each row; transformers makes block-diagonal attention of that where there is no
    attention_mask. No row predicts the first token of the next.
    """
    return {
        "input_ids": torch.tensor([[token for ids in input_ids for token in ids]]),
        "position_ids": torch.tensor([[position for ids in input_ids for position in range(len(ids))]]),
        "labels": torch.tensor([[label for ids in labels for label in (IGNORE, *ids[1:])]]),
    }


def collate(input_ids: list[list[int]], labels: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows padded on the right to the longest: input_ids, attention_mask and labels, int64 [B, S]."""
    width = max(map(len, input_ids))
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in input_ids]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in input_ids]),
        "labels": torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels]),
    }
