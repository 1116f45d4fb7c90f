"""Layers of a trained adapter by importance: their responses are ablated one by one, greedily (paper, Figure 2).

    python -m ist.analyze --model_name_or_path M --adapter runs/X/adapter --text_file TXT --output_dir O
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 -m ist.analyze ...  (shared out)

Leaves O/ablations.jsonl, a line per evaluation, O/analysis.json and O/layers.png (lines.jsonl has the losses that are
drawn as lines). A stopped run goes on from its files.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from ist.adapters.support import RESPONSE, limit
from ist.analyze.ablation import DIRECTIONS, AblationLoss, Ablations, Tokens, ablate_greedily, mean_loss
from ist.analyze.results import ADAPTER, BASE, agreement_table, compare_all, draw, summary
from ist.distributed import from_main
from ist.evaluate.scorer import (
    ScorerArguments,
    adapter_config,
    claim_folder,
    deciding,
    digests_of,
    load_scorer,
    read_text,
    require_base,
    start,
    windows,
)
from ist.loss import count_predicted
from ist.report.tables import publish, require_publishing
from ist.training.command_line import UsageError, brief, command, parse_arguments, require
from ist.training.continuing import adapter_digest, files_digest
from ist.training.data import Data, collate
from ist.training.encoding import encode_rows, load_tokenizer
from ist.training.figures import drawn
from ist.training.files import IMPORTANCE, append_line, keep_lines, model_digest, read_lines, read_object, replacing
from ist.training.model import require_fitting
from ist.training.reading import load_rows


@dataclass
class AnalyzeArguments(ScorerArguments):
    free_keys = ("output_dir", "directions", "lines", "importance", "publish", "readme")

    adapter: str = field(metadata={"help": "Folder of the PEFT adapter whose layers are ablated."})
    text_file: str | None = field(default=None, metadata={"help": "Plain text, cut into windows of max_length tokens."})
    rows_file: str | None = field(
        default=None,
        metadata={
            "help": "Instead: rows with instruction and output; the loss is of the answers, as far as max_length."
        },
    )
    max_tokens: int = field(default=1024, metadata={"help": "Tokens of the text, or of whole rows, from the first on."})
    directions: list[str] = field(
        default_factory=lambda: list(DIRECTIONS),
        metadata={"help": "least: at each stage the layer goes whose loss rises least; most: whose loss rises most."},
    )
    lines: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=DIR of other models or adapters whose loss is drawn as a line.", "metavar": "NAME=DIR"},
    )
    importance: list[str] = field(
        default_factory=list,
        metadata={"help": "importance.jsonl of runs, or their folders: scores to compare the orders with."},
    )
    publish: str | None = field(
        default=None, metadata={"help": "Also write the results to this JSON file, and the picture next to it."}
    )
    readme: str | None = field(
        default=None,
        metadata={"help": "And the table of --importance into it, between <!-- NAME --> and <!-- /NAME -->."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_publishing(self.publish, self.readme)
        if self.readme and not self.importance:
            raise UsageError("--readme takes the table of --importance, which is not given.")
        require(self.max_tokens >= 2, "max_tokens", "2 or more", self.max_tokens)
        if (self.text_file is None) == (self.rows_file is None):
            raise UsageError("give --text_file TXT or --rows_file JSON, and not both.")
        require(
            set(self.directions) <= DIRECTIONS.keys(), "directions", "least, most or both", " ".join(self.directions)
        )
        self.directions = [direction for direction in DIRECTIONS if direction in self.directions]


def load_tokens(args: AnalyzeArguments, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tokens:
    """The first max_tokens tokens of the text in windows end to end, or as many whole rows, but one at least.

    Raises:
        UsageError: a file or a row that cannot be used, or tokens that the model cannot take.
    """
    if args.text_file:
        text = read_text("text_file", args.text_file)
        cut = windows(tokenizer, text, args.max_length, args.max_tokens)
        if not cut:
            raise UsageError(f"--text_file {args.text_file} has a single token, so there is none to predict.")
        rows = Dataset.from_dict({"input_ids": cut, "labels": cut})
    else:
        rows = load_rows("rows_file", [args.rows_file])
        rows = rows.select(range(min(len(rows), args.max_tokens)))
        rows, _ = encode_rows(rows, "rows_file", args.prompt_template, tokenizer, args.max_length, True)
        taken = sum(total <= args.max_tokens for total in accumulate(map(len, rows["input_ids"])))
        rows = rows.select(range(max(1, taken)))
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
    except Exception as error:
        raise UsageError(f"--model_name_or_path {args.model_name_or_path} cannot be used: {brief(error)}") from error
    require_fitting(Data(rows, None, pad_token_id), config, config.get_text_config().vocab_size)
    batches = []
    for i in range(0, len(rows), args.batch_size):
        part = rows[i : i + args.batch_size]
        batch = collate(part["input_ids"], part["labels"], pad_token_id)
        batches.append({key: tensor.to(device) for key, tensor in batch.items()})
    return Tokens(batches, sum(map(count_predicted, rows["labels"])))


def read_lines_argument(args: AnalyzeArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, AnalyzeArguments]:
    """The models that are measured whole, by the names of their lines, as arguments of `load_scorer`.

    Raises:
        UsageError: not NAME=DIR, a name twice, a folder with neither a model nor an adapter of this base model, or a
            model with other tokens.
    """
    models = {BASE: replace(args, adapter=None)}
    for line in args.lines:
        name, _, folder = line.partition("=")
        if not name or not folder or name in models or name == ADAPTER:
            raise UsageError(f"--lines must be NAME=DIR, each NAME once and not {BASE} or {ADAPTER}; got {line}.")
        if (Path(folder) / "adapter_config.json").exists():
            models[name] = replace(args, adapter=folder)
            require_base(models[name])
        elif (Path(folder) / "config.json").exists():
            models[name] = replace(args, adapter=None, model_name_or_path=folder)
            if load_tokenizer("lines", folder).get_vocab() != tokenizer.get_vocab():
                raise UsageError(f"--lines {line}: its tokenizer is not that of {args.model_name_or_path}.")
        else:
            raise UsageError(f"--lines {line}: {folder} has neither adapter_config.json nor config.json.")
    return models


def read_importance(path: str) -> list[float]:
    """The scores after the last importance update of a run.

    Raises:
        UsageError: there are none, or all are equal.
    """
    file = Path(path) / IMPORTANCE if Path(path).is_dir() else Path(path)
    lines = read_lines(file)
    scores = lines[-1].get("scores") if lines else None
    if not scores or not isinstance(scores, list) or not all(type(one) in (int, float) for one in scores):
        raise UsageError(f"--importance {path} has no importance scores (no line with scores in {file}).")
    if not all(map(math.isfinite, scores)):
        raise UsageError(f"--importance {path}: the last scores in {file} are not finite; name another run.")
    if len(set(scores)) < 2:
        raise UsageError(f"--importance {path}: all scores are equal, so they rank no layer.")
    return scores


def require_layers(folder: str) -> None:
    """Raises UsageError when the adapter is of a method without a response per layer."""
    config = adapter_config(folder)
    if limit(config, RESPONSE):
        raise UsageError(f"--adapter {folder}: {config.peft_type.value} has no response of each layer to ablate.")


def digest(args: AnalyzeArguments) -> str | None:
    """Digest of an adapter, or of a model, by content."""
    return adapter_digest(args.adapter) if args.adapter else model_digest(args.model_name_or_path)


def measure_lines(
    file: Path,
    models: dict[str, AnalyzeArguments],
    ablation: Callable[[], AblationLoss],
    tokens: Tokens,
    state: PartialState,
) -> dict[str, dict]:
    """{name: {name, folder, digest, loss}} of the models; of the adapter itself `layers` too, their module names.

    Rank 0 measures those that `file` does not have.
    """
    found_now = from_main(lambda: {name: digest(one) for name, one in models.items()}, UsageError)
    wanted = {
        name: {"name": name, "folder": one.adapter or one.model_name_or_path, "digest": found_now[name]}
        for name, one in models.items()
    }

    def known() -> dict[str, dict]:
        lines = {line["name"]: line for line in read_lines(file) if "name" in line and "loss" in line}
        return {name: lines[name] for name, keys in wanted.items() if keys.items() <= lines.get(name, {}).items()}

    if state.is_main_process:
        keep_lines(file, lambda line: True)
        earlier = {line.get("name") for line in read_lines(file)}
        for name in [name for name in wanted if name not in known()]:
            if name in earlier:
                print(f"{name}: not what was measured before under this name; its loss is measured again.", flush=True)
            if name == ADAPTER:
                found = {"loss": ablation().full, "layers": ablation().layers.names}
            else:
                found = {"loss": mean_loss(load_scorer(models[name], state.device).model, tokens.batches)}
            append_line(file, wanted[name] | found)
    state.wait_for_everyone()
    return known()


def load_ablation(args: AnalyzeArguments, tokens: Tokens, state: PartialState) -> AblationLoss:
    model = load_scorer(args, state.device).model
    model.set_adapter(model.active_adapter)  # layers are found by the parameters that train
    loss = AblationLoss(model, tokens)
    if not loss.reuses:
        state.print("Blocks of this model need more than the outputs of those below: every evaluation runs all.")
    if outside := loss.layers.outside:
        state.print(f"{outside[0]} and {len(outside) - 1} more are of no layer: they are never ablated.")
    return loss


def publish_analysis(args: AnalyzeArguments, analysis: dict[str, Any], command: str, state: PartialState) -> dict:
    """Write analysis.json and layers.png, and where they are published; analysis.json with its head."""
    output_dir = Path(args.output_dir)
    before = output_dir / "analysis.json"
    measured = read_object(before, "--output_dir") if before.exists() else {}
    head = ("date", "versions", "commit", "hardware")
    same = all(measured.get(key) == analysis[key] for key in ("losses", "directions"))
    if same and measured.keys() >= set(head):  # nothing new: the earlier head
        analysis |= {key: measured[key] for key in head}
    analysis = publish(before, command, state, "", **analysis)
    picture = output_dir / "layers.png"
    is_drawn = drawn(picture, draw, picture, analysis)
    if args.publish:
        target, readme = Path(args.publish), Path(args.readme) if args.readme else None
        table = agreement_table(analysis) if "importance" in analysis else ""
        publish(target, accelerator=state, table=table, readme=readme, **analysis)  # command and head as they are
        if is_drawn:
            with replacing(target.with_suffix(".png")) as temporary:
                temporary.write_bytes(picture.read_bytes())
    return analysis


@command
def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([AnalyzeArguments], argv, __doc__.split("\n")[0])
    state, training = start(args)
    require_layers(args.adapter)
    tokenizer = load_tokenizer("model_name_or_path", args.model_name_or_path)
    models = read_lines_argument(args, tokenizer) | {ADAPTER: args}
    scores = {path: read_importance(path) for path in args.importance}
    tokens = load_tokens(args, tokenizer, state.device)
    output_dir = Path(args.output_dir)
    digests = digests_of(args, training)
    digests["data_digest"] = files_digest([Path(args.text_file or args.rows_file)])
    claim_folder(output_dir, deciding(args) | digests, state, results=("ablations.jsonl",))
    # Loaded when the first evaluation needs it: a finished analysis needs none.
    ablation = cache(partial(load_ablation, args, tokens, state))
    lines = measure_lines(output_dir / "lines.jsonl", models, ablation, tokens, state)
    losses, names = {name: lines[name]["loss"] for name in models}, lines[ADAPTER]["layers"]
    for path, values in scores.items():
        if len(values) != len(names):
            raise UsageError(f"--importance {path} has {len(values)} scores, the adapter {len(names)} layers.")
    ablations = Ablations(output_dir / "ablations.jsonl", len(names), ablation, state)
    directions = {d: ablate_greedily(d, len(names), partial(ablations.losses, d)) for d in args.directions}
    singly = ablations.losses(args.directions[0], []).values()
    analysis = {
        "losses": losses,
        "directions": directions,
        "single_ablation": [loss - losses[ADAPTER] for loss in singly],
        "layers": names,
        "tokens": tokens.predicted,
        "arguments": asdict(args) | digests,
        "training": training,
    }
    analysis |= compare_all(analysis, scores)
    if state.is_main_process:
        analysis = publish_analysis(args, analysis, "python -m ist.analyze " + shlex.join(argv), state)
        print(summary(analysis), flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    return 0
