"""Merge the adapter of a run into its base model: a model that needs no PEFT.

python -m ist.export RUN --merged DIR [--dtype bfloat16]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import ist.adapters  # noqa: F401  its methods become known to PEFT
from ist.evaluate.scorer import adapter_config
from ist.training.command_line import PlainParser, UsageError, brief, command
from ist.training.encoding import load_tokenizer
from ist.training.export import add_stops, save_tokenizer, write_card
from ist.training.files import model_digest, publishing
from ist.training.model import auto_class
from ist.training.record import read_run
from ist.training.weights import is_quantised, load_adapter, load_pretrained


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = PlainParser(prog="python -m ist.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run, or of its adapter")
    parser.add_argument("--merged", metavar="DIR", type=Path, required=True, help="where the merged model goes")
    dtypes = ["auto", "float32", "bfloat16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the merged weights")
    parser.add_argument("--model_name_or_path", help="the base model, where it has moved")
    parser.add_argument("--any_base", action="store_true", help="take a base model whose files have changed")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    source, merged = args.run, args.merged
    adapter = source if (source / "adapter_config.json").exists() else source / "adapter"
    if (source / "model").is_dir() and not adapter.exists():
        raise UsageError(f"{source} holds a whole model already: {source / 'model'}.")
    if not (adapter / "adapter_config.json").exists():
        raise UsageError(f"{source} is not the folder of a finished run (no adapter/adapter_config.json).")
    if merged.exists() and (not merged.is_dir() or any(merged.iterdir())):
        raise UsageError(f"--merged {merged} is there already, and not empty. Choose another folder.")
    config = adapter_config(str(adapter))
    run = read_run(adapter.parent)
    configuration = run["configuration"] if run else {}
    base = args.model_name_or_path or config.base_model_name_or_path
    _require_base(base, configuration, args.any_base)
    tokenizer_from = adapter if (adapter / "tokenizer_config.json").exists() else Path(base)
    tokenizer = load_tokenizer("model_name_or_path", str(tokenizer_from))
    if configuration.get("load_in_4bit"):
        print("The adapter was trained on 4-bit weights; it is merged into the whole ones, which differ a little.")
    model = _merged(base, adapter, config, args.dtype)
    _save(model, tokenizer, run, base, merged)
    print(f"{config.peft_type.value} adapter {adapter} merged into {base}: {merged}")
    return 0


def _require_base(base: str | None, configuration: dict, any_base: bool) -> None:
    """
    Raises:
        UsageError: it is not the one that the adapter was trained on, or is packed.
    """
    if not base:
        raise UsageError("the adapter names no base model: --model_name_or_path does.")
    named = configuration.get("model_name_or_path", base)
    comparable = base == named or (Path(base).exists() and Path(named).exists())  # by name and commit, or by content
    if comparable and not any_base and configuration.get("model_digest", "") not in ("", model_digest(base)):
        raise UsageError(
            f"{base} is not the model that the adapter was trained on: its files have changed; --any_base takes it."
        )
    if not comparable:
        print(f"{base} is taken for {named}, which the adapter was trained on; their files are not compared.")
    if is_quantised(base):
        raise UsageError(f"{base} has quantised weights, which nothing can be merged into: name the whole model.")


def _merged(base: str, adapter: Path, config: PeftConfig, dtype: str) -> PreTrainedModel:
    """
    Raises:
        UsageError: the method's response is not one of weights alone, or the sum is not finite.
    """
    model = load_adapter(load_pretrained(auto_class(AutoConfig.from_pretrained(base)), base, dtype=dtype), str(adapter))
    method = config.peft_type.value
    try:
        whole = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # each method has its own words for that it cannot
        raise UsageError(f"{adapter}: a {method} adapter cannot be merged: {brief(error)}") from error
    if left := [name for name, module in whole.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise UsageError(f"{adapter}: a {method} adapter cannot be merged: {left[0]} is still one.")
    if any(not torch.isfinite(parameter).all() for parameter in whole.parameters()):
        raise UsageError(f"{adapter}: the merged weights are not finite.")
    return whole


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: dict | None, base: str, merged: Path
) -> None:
    """Whole, or not there."""
    add_stops(model, tokenizer, run["configuration"]["prompt_template"] if run else "alpaca")
    merged.parent.mkdir(parents=True, exist_ok=True)
    if merged.exists():
        merged.rmdir()  # it is empty
    temporary = merged.parent / f".saving-{merged.name}"
    with publishing(temporary, merged):
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        if run:
            write_card(temporary, run, base, str(merged.absolute()), type(model).__name__)
