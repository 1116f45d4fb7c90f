"""Which layers of a trained adapter matter: their responses are taken away one by one, greedily (paper, Figure 2).

    python -m ist.analyze --model_name_or_path M --adapter runs/X/adapter --text_file TXT --output_dir O
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 -m ist.analyze ...  (shared out)

Leaves O/ablations.jsonl, a line per evaluation, O/analysis.json and O/layers.png (lines.jsonl has the losses that are
drawn as lines). A run that was stopped goes on from what it has written.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

from ist.training.command_line import quiet_known_warnings

quiet_known_warnings()

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ist.adapters.support import RESPONSE, limit
from ist.analyze.ablation import DIRECTIONS, AblationLoss, Ablations, Tokens, ablate_greedily, mean_loss
from ist.config import ISTConfig
from ist.evaluate.command import (
    ScorerArguments,
    adapter_digest,
    claim_folder,
    files_digest,
    load_scorer,
    read_text,
    require_base,
    start,
)
from ist.report.statistics import spearman
from ist.report.tables import joined, publish, require_publishing
from ist.training.command_line import UsageError, brief, command, markdown_table, parse_arguments, require
from ist.training.data import Data, collate, encode_rows, load_rows, predicted_tokens
from ist.training.files import IMPORTANCE, keep_lines, read_lines
from ist.training.model import require_fitting
from ist.training.record import environment

BASE, ADAPTER = "base model", "adapter"

# ----------------------------------------------------------------------------------------------------------- the input


@dataclass
class AnalyzeArguments(ScorerArguments):
    adapter: str = field(metadata={"help": "Folder of the PEFT adapter whose layers are taken away."})
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
        metadata={"help": "least: at each stage the layer goes that is missed least; most: that is missed most."},
    )
    lines: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=DIR of other models or adapters whose loss is drawn as a line.", "metavar": "NAME=DIR"},
    )
    importance: list[str] = field(
        default_factory=list,
        metadata={"help": "importance.jsonl of runs, or their folders: scores to compare the orders with."},
    )
    known: str | None = field(
        default=None,
        metadata={"help": "A finished analysis.json, as published: taken over, for more lines or other importance."},
    )
    publish: str | None = field(
        default=None, metadata={"help": "Also write the results to this JSON file, and the picture beside it."}
    )
    readme: str | None = field(
        default=None,
        metadata={"help": "And the table of --importance into it, between <!-- NAME --> and <!-- /NAME -->."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_publishing(self.publish, self.readme)
        if self.readme and not self.importance and not self.known:
            raise UsageError("--readme takes the table of --importance, which is not given.")
        require(self.max_tokens >= 2, "max_tokens", "2 or more", self.max_tokens)
        if (self.text_file is None) == (self.rows_file is None):
            raise UsageError("give --text_file TXT or --rows_file JSON, and not both.")
        known = set(self.directions) <= DIRECTIONS.keys()
        require(known, "directions", "least, most or both", " ".join(self.directions))
        self.directions = [direction for direction in DIRECTIONS if direction in self.directions]


# What may change between a run and the one that goes on with it.
FREE_KEYS = ("output_dir", "directions", "lines", "importance", "known", "publish", "readme")


def load_tokens(args: AnalyzeArguments, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tokens:
    """The first max_tokens tokens of the text in windows side by side, or as many whole rows, but one at least.

    Raises:
        UsageError: a file or a row that cannot be used, or tokens that the model cannot take.
    """
    if args.text_file:
        text = read_text("text_file", args.text_file)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: args.max_tokens]
        windows = [ids[i : i + args.max_length] for i in range(0, len(ids), args.max_length)]
        windows = [window for window in windows if len(window) > 1]  # the first token of a window is not predicted
        if not windows:
            raise UsageError(f"--text_file {args.text_file} has a single token, so there is none to predict.")
        rows = Dataset.from_dict({"input_ids": windows, "labels": windows})
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
    require_fitting(Data(rows, None, 0, pad_token_id), config, config.get_text_config().vocab_size)
    batches = []
    for i in range(0, len(rows), args.batch_size):
        part = rows[i : i + args.batch_size]
        batch = collate(part["input_ids"], part["labels"], pad_token_id)
        batches.append({key: tensor.to(device) for key, tensor in batch.items()})
    return Tokens(batches, sum(map(predicted_tokens, rows["labels"])))


def load_tokenizer(key: str, folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UsageError(f"--{key} {folder} has no tokenizer: {brief(error)}") from error


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
    try:
        scores = read_lines(file)[-1]["scores"]
    except (IndexError, KeyError, TypeError, OSError, UnicodeDecodeError):
        raise UsageError(f"--importance {path} has no importance scores (no line with scores in {file}).") from None
    if len(set(scores)) < 2:
        raise UsageError(f"--importance {path}: all scores are equal, so they rank no layer.")
    return scores


def read_known(args: AnalyzeArguments, settings: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    """The analysis of --known, {} without it.

    Args:
        settings: what decides the results; of adapter and text their digests count, and not where they are.

    Raises:
        UsageError: it cannot be read, or is one of another adapter, other tokens or other lines.
    """
    if not args.known:
        return {}
    try:
        known = json.loads(Path(args.known).read_text())
        decide = {key: value for key, value in settings.items() if key not in ("adapter", "text_file", "rows_file")}
        differing = [key for key, value in decide.items() if known["arguments"].get(key) != value]
        differing += ["number of tokens"] * (known["tokens"] != tokens.predicted)
        differing += ["directions"] * (list(known["directions"]) != args.directions)
        drawn = {line: line.partition("=")[0] in known["losses"] for line in args.lines}
        differing += [line for line in drawn if drawn[line] and line not in known["arguments"]["lines"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--known {args.known} is not an analysis.json: {brief(error)}.") from error
    if differing:
        raise UsageError(f"--known {args.known} has another {', '.join(differing)}: run without --known.")
    if args.readme and not args.importance and "importance" not in known:
        raise UsageError(f"--readme takes the table of --importance, which --known {args.known} does not have either.")
    return known


def require_layers(folder: str) -> None:
    """Raises UsageError when the adapter is of a method without a response per layer."""
    config = PeftConfig.from_pretrained(folder)
    if limit(config, RESPONSE):
        raise UsageError(f"--adapter {folder}: {config.peft_type.value} has no response of each layer to take away.")


def digest(args: AnalyzeArguments) -> str | None:
    """Tells an adapter, or a model on disk, from another that stood in the same place."""
    if args.adapter:
        return adapter_digest(args.adapter)
    files = [(path.name, path.stat()) for path in sorted(Path(args.model_name_or_path).glob("*.safetensors"))]
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]  # too large to be read for this
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16] if weights else None


def measure_lines(
    file: Path,
    models: dict[str, AnalyzeArguments],
    ablation: Callable[[], AblationLoss],
    tokens: Tokens,
    state: PartialState,
) -> dict[str, dict]:
    """{name: {name, folder, digest, loss}} of the models; of the adapter itself `layers` too, their module names.

    Rank 0 measures what `file` does not have.
    """
    wanted = {
        name: {"name": name, "folder": one.adapter or one.model_name_or_path, "digest": digest(one)}
        for name, one in models.items()
    }

    def known() -> dict[str, dict]:
        lines = {line["name"]: line for line in read_lines(file)}
        return {name: lines[name] for name, keys in wanted.items() if keys.items() <= lines.get(name, {}).items()}

    if state.is_main_process:
        keep_lines(file, lambda line: True)
        for name in [name for name in wanted if name not in known()]:
            if name == ADAPTER:
                found = {"loss": ablation().full, "layers": ablation().layers.names}
            else:
                found = {"loss": mean_loss(load_scorer(models[name], state.device).model, tokens)}
            with open(file, "a") as stream:
                stream.write(json.dumps(wanted[name] | found) + "\n")
    state.wait_for_everyone()
    return known()


# --------------------------------------------------------------------------------------------------------- the results


def greedy_order(analysis: dict, direction: str) -> list[int]:
    """The layers of an analysis.json from the one that matters least to the one that matters most."""
    order = analysis["directions"][direction]["order"]
    return list(order if direction == "least" else reversed(order))


def places(analysis: dict, direction: str) -> list[int]:
    """Each layer's place in a greedy order, from 0 for the one that matters least."""
    return np.argsort(greedy_order(analysis, direction)).tolist()


def agreement(scores: Sequence[float], importance: Sequence[float]) -> dict[str, Any]:
    """Spearman's rho over layers, and its 95 % interval: Fisher's z with Fieller's variance 1.06 / (n - 3).

    None where it is not defined: all values of a side are equal, or, for the interval, fewer than 4 layers.
    """
    rho, interval = spearman(scores, importance), None
    if math.isnan(rho):
        return {"rho": None, "interval": None}
    if len(scores) > 3:
        with np.errstate(divide="ignore"):  # a rho of 1 is infinitely far, and its interval is [1, 1]
            z = np.arctanh(np.clip(rho, -1, 1))
        spread = 1.959964 * math.sqrt(1.06 / (len(scores) - 3))
        interval = np.tanh([z - spread, z + spread]).tolist()
    return {"rho": rho, "interval": interval}


def compare_importance(analysis: dict, scores: Sequence[float]) -> dict[str, dict]:
    """How scores rank the layers beside each greedy order, and beside what the loss rises without a layer alone.

    Layers that are missed alike (adapters still at zero) stand in an order by their position, but share a rank alone.
    """
    values = {d: places(analysis, d) for d in analysis["directions"]} | {"single_ablation": analysis["single_ablation"]}
    return {name: agreement(scores, importance) for name, importance in values.items()}


def compare_all(analysis: dict, scores: dict[str, Sequence[float]]) -> dict[str, Any]:
    """What analysis.json says of importance: how each run's scores, and their mean, rank the layers beside the orders;
    and what there is to agree with, as far as two runs, and the two orders, agree with each other."""
    runs = {path: compare_importance(analysis, values) for path, values in scores.items()}
    found: dict[str, Any] = {"importance": runs} if runs else {}
    if len(scores) > 1:
        mean = np.mean(list(scores.values()), axis=0).tolist()
        runs[f"the mean of {len(scores)} runs"] = compare_importance(analysis, mean)
        found["between_runs"] = [agreement(one, two) for one, two in combinations(scores.values(), 2)]
    if len(analysis["directions"]) > 1:
        found["between_orders"] = agreement(*(places(analysis, d) for d in DIRECTIONS))
    return found


def draw(path: Path, analysis: dict) -> None:
    """layers.png (paper, Figure 2): loss over the number of layers taken away, and the other models as lines."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    full, labels = analysis["losses"][ADAPTER], {"least": "least important first", "most": "most important first"}
    for colour, (direction, result) in zip(("tab:blue", "tab:red"), analysis["directions"].items()):
        losses = [full, *result["losses"]]
        axis.plot(range(len(losses)), losses, marker=".", lw=1.2, color=colour, label=labels[direction])
    colours = iter(["0.3", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink"] * len(analysis["losses"]))
    for name, loss in analysis["losses"].items():
        axis.axhline(loss, color=next(colours), ls="--", lw=1, label=f"{name}: {loss:.3f}")
    title = f"Layers taken away one by one; loss on {analysis['tokens']} tokens"
    axis.set(xlabel="layers without their adapter response", ylabel="loss per token", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def told(found: dict) -> str:
    """A rank correlation with its interval."""
    if found["rho"] is None:
        return "undefined"
    return f"{found['rho']:+.2f}" + (" ({:+.2f} … {:+.2f})".format(*found["interval"]) if found["interval"] else "")


def agreement_table(analysis: dict) -> str:
    """Markdown: how the importance scores of runs rank the layers beside the greedy orders, from an analysis.json."""
    names = {"least": "least important first", "most": "most important first", "single_ablation": "each layer alone"}
    orders = [*analysis["directions"], "single_ablation"]
    rows = []
    for path, found in analysis["importance"].items():
        rows.append([Path(path.removesuffix(IMPORTANCE)).name, *(told(found[name]) for name in orders)])
    lines = markdown_table(["scores of", *(names[name] for name in orders)], rows)
    lines += ["", f"Spearman's rho over {len(analysis['layers'])} layers"]
    lines[-1] += " between IST's scores after the last update and"
    lines[-1] += f" what the loss of {analysis['tokens']} tokens says without them, 95 % interval by Fisher's z."
    if "between_runs" in analysis:
        lines[-1] += f" Of two runs with each other: {', '.join(map(told, analysis['between_runs']))}."
    if "between_orders" in analysis:
        lines[-1] += f" Of the two orders with each other: {told(analysis['between_orders'])}."
    hardware = ", ".join(f"{key} {value}" for key, value in analysis["hardware"].items())
    lines[-1] += f" {analysis['date']}, commit {analysis['commit']}; {hardware}."
    return "\n".join(lines)


def summary(analysis: dict) -> str:
    """What is printed: the losses, the orders, and how to train only the layers at either end of an order."""
    lines = [f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}" for name, loss in analysis["losses"].items()]
    count = ISTConfig().counts(len(analysis["layers"])).trained
    for direction, result in analysis["directions"].items():
        order = greedy_order(analysis, direction)
        lines.append(f"{direction} important first: {', '.join(map(str, result['order']))}")
        for name, layers in ((f"the {count} most important", order[-count:]), (f"the {count} least", order[:count])):
            lines.append(f"  train {name}: --selection fixed --fixed_layers {','.join(map(str, sorted(layers)))}")
    for path, orders in analysis.get("importance", {}).items():
        lines.append(f"rank correlation (95 % interval) of the importance scores of {path}")
        lines += [f"  with {name}: {told(found)}" for name, found in orders.items()]
    if "between_runs" in analysis:
        lines.append("  of two runs with each other: " + ", ".join(map(told, analysis["between_runs"])))
    if "between_orders" in analysis:
        lines.append(f"  of the two orders with each other: {told(analysis['between_orders'])}")
    return "\n".join(lines)


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
    settings = {key: value for key, value in asdict(args).items() if key not in FREE_KEYS}
    settings["adapter_digest"] = adapter_digest(args.adapter)
    settings["data_digest"] = files_digest([Path(args.text_file or args.rows_file)])
    known = read_known(args, settings, tokens)
    claim_folder(output_dir, settings, state)

    @cache
    def ablation() -> AblationLoss:
        """Loaded when the first evaluation needs it: a finished analysis needs none."""
        model = load_scorer(args, state.device).model
        model.set_adapter(model.active_adapter)  # layers are told by what trains
        loss = AblationLoss(model, tokens)
        if not loss.reuses:
            state.print("Blocks of this model need more than the outputs of those below: every evaluation runs all.")
        if outside := loss.layers.outside:
            state.print(f"{outside[0]} and {len(outside) - 1} more are of no layer: they are never taken away.")
        return loss

    there = known.get("losses", {})
    new = {name: model for name, model in models.items() if name not in there}
    lines = measure_lines(output_dir / "lines.jsonl", new, ablation, tokens, state)
    losses = there | {name: lines[name]["loss"] for name in new}
    losses[ADAPTER] = losses.pop(ADAPTER)  # drawn last
    names = known["layers"] if known else lines[ADAPTER]["layers"]
    for path, values in scores.items():
        if len(values) != len(names):
            raise UsageError(f"--importance {path} has {len(values)} scores, the adapter {len(names)} layers.")
    if known:
        drawn = list(dict.fromkeys([*known["arguments"]["lines"], *args.lines]))
        arguments = known["arguments"] | {"lines": drawn} | ({"importance": args.importance} if scores else {})
        analysis = known | {"losses": losses, "arguments": arguments}
        analysis["earlier_commands"] = [*known.get("earlier_commands", []), analysis.pop("command")]
        for key in ("importance", "between_runs") if scores else ():
            analysis.pop(key, None)
    else:
        ablations = Ablations(output_dir / "ablations.jsonl", len(names), ablation, state)
        results = {
            direction: ablate_greedily(direction, len(names), partial(ablations.losses, direction))
            for direction in args.directions
        }
        singly = ablations.losses(args.directions[0], []).values()
        analysis = {
            "losses": losses,
            "directions": results,
            "single_ablation": [loss - losses[ADAPTER] for loss in singly],
            "layers": names,
            "tokens": tokens.predicted,
            "arguments": asdict(args) | {key: settings[key] for key in ("adapter_digest", "data_digest")},
            "training": training,
        }
    if scores or not known:
        analysis |= compare_all(analysis, scores)
    if state.is_main_process:
        command = "python -m ist.analyze " + shlex.join(argv)
        before = output_dir / "analysis.json"
        measured = json.loads(before.read_text()) if before.exists() else {}
        if known and new:
            analysis |= joined([known, environment(state) | {"date": datetime.now(UTC).date().isoformat()}])
        if all(measured.get(key) == analysis[key] for key in ("losses", "directions")):  # nothing new: when it was
            analysis |= {key: measured[key] for key in ("date", "versions", "commit", "hardware")}
        analysis = publish(before, command, state, "", **analysis)
        draw(output_dir / "layers.png", analysis)
        if args.publish:
            target, readme = Path(args.publish), Path(args.readme) if args.readme else None
            table = agreement_table(analysis) if "importance" in analysis else ""
            publish(target, accelerator=state, table=table, readme=readme, **analysis)  # command and head as they are
            target.with_suffix(".png").write_bytes((output_dir / "layers.png").read_bytes())
        print(summary(analysis), flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    return 0
