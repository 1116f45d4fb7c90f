"""Merge the adapter of a run into its base model: a model that needs no PEFT.

python -m ist.export RUN --merged DIR [--dtype bfloat16]
"""

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
from ist.training.export import add_stops, write_card
from ist.training.files import model_digest, publishing
from ist.training.model import auto_class
from ist.training.record import read_run
from ist.training.weights import is_quantised, load_adapter, load_pretrained


def _parse(argv: Sequence[str]) -> tuple[Path, Path, str, str | None]:
    parser = PlainParser(prog="python -m ist.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, or of its adapter")
    parser.add_argument("--merged", required=True, metavar="DIR", help="where the merged model goes")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the merged weights"
    )
    parser.add_argument("--model_name_or_path", help="the base model, where it has moved")
    args = parser.parse_args(argv)
    return Path(args.run), Path(args.merged), args.dtype, args.model_name_or_path


@command
def main(argv: Sequence[str]) -> int:
    source, merged, dtype, base = _parse(argv)
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
    base = base or config.base_model_name_or_path
    _require_base(base, configuration)
    tokenizer_from = adapter if (adapter / "tokenizer_config.json").exists() else Path(base)
    tokenizer = load_tokenizer("model_name_or_path", str(tokenizer_from))
    if configuration.get("load_in_4bit"):
        print("The adapter was trained on 4-bit weights; it is merged into the whole ones, which differ a little.")
    model = _merged(base, adapter, config, dtype)
    _save(model, tokenizer, run, base, merged)
    print(f"{config.peft_type.value} adapter {adapter} merged into {base}: {merged}")
    return 0


def _require_base(base: str | None, configuration: dict) -> None:
    """
    Raises:
        UsageError: it is not the one that the adapter was trained on, or is packed.
    """
    if not base:
        raise UsageError("the adapter names no base model: --model_name_or_path does.")
    if configuration.get("model_digest", "") not in ("", model_digest(base)):
        raise UsageError(f"{base} is not the model that the adapter was trained on: its files have changed.")
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
        tokenizer.save_pretrained(temporary)
        if run:
            write_card(temporary, run, base, str(merged.absolute()), type(model).__name__)
