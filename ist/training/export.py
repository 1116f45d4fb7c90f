"""The result of a run: an adapter as stock PEFT writes it, or a model as stock transformers does."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ist.training.checkpoint import gathered
from ist.training.encoding import Encoder, load_tokenizer
from ist.training.figures import drawn, plot_importance
from ist.training.files import IMPORTANCE, PICTURE, publishing, read_lines
from ist.training.job import Job

MODEL_CARD = """---
{{ card_data }}
---
{{ kind }} `{{ base }}`, by the training scripts of Importance-aware Sparse Tuning (arXiv 2410.11772).

```python
{{ loading }}
```

| | |
|---|---|
{% for name, value in facts -%}
| {{ name }} | {{ value }} |
{% endfor %}
{{ layers }}
"""

ADAPTER_LOADING = """{registration}from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

MODEL_LOADING = """from transformers import AutoTokenizer, {name}
model, tokenizer = {name}.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")"""


def base_name(name: str) -> str:
    """A base model as another folder finds it: the Hub's name, or an absolute path."""
    return os.path.abspath(name) if Path(name).exists() else name


def save_adapter(job: Job, model: PeftModel, adapter: dict[str, Tensor], run: dict[str, Any], write: bool) -> Path:
    """output_dir/adapter as stock PEFT writes it, with tokenizer, picture and model card; whole or not there. All ranks
    call it.

    Args:
        adapter: by name, all tensors that PEFT may look for in the model's state_dict.
        run: what run.json holds.
    """
    final, temporary = job.output_dir / "adapter", job.output_dir / ".saving-adapter"
    whole = gathered(adapter, write)
    if not write:
        return final
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name(job.args.model_name_or_path)
    with publishing(temporary, final):
        model.save_pretrained(temporary, state_dict=whole)
        save_tokenizer(_tokenizer(job), temporary)
        _draw(temporary, job.output_dir, run)
        write_card(temporary, run, config.base_model_name_or_path, str(final.absolute()), config.peft_type.value)
    return final


def save_model(job: Job, model: PreTrainedModel, run: dict[str, Any], write: bool) -> Path:
    """output_dir/model as stock transformers writes it, tokenizer and model card with it. All ranks call it.

    In float32, as the weights train: the saved model is the validated one.
    """
    args, final, temporary = job.args, job.output_dir / "model", job.output_dir / ".saving-model"
    whole = gathered(model.state_dict(keep_vars=True), write)
    if not write:
        return final
    wide = {id(tensor): tensor.float() if tensor.is_floating_point() else tensor for tensor in whole.values()}
    whole = {name: wide[id(tensor)] for name, tensor in whole.items()}
    # FSDP2 makes a class of its own of each that it shards, FSDP<Name>, derived from it.
    name = next(kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers"))
    tokenizer = _tokenizer(job)
    add_stops(model, tokenizer, args.prompt_template)
    with publishing(temporary, final):
        model.save_pretrained(temporary, state_dict=whole)
        config = AutoConfig.from_pretrained(temporary, trust_remote_code=args.trust_remote_code)
        config.dtype = torch.float32
        config.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        _draw(temporary, job.output_dir, run)
        write_card(temporary, run, base_name(args.model_name_or_path), str(final.absolute()), name)
    return final


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, generation: GenerationConfig | None = None
) -> list[int]:
    """The tokens that end an answer: EOS of the tokenizer and of the model's generation configuration, and where rows
    are chats what the chat template ends a turn with."""
    own = generation.eos_token_id if generation else None
    stops = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if template == "chat":
        chat = Encoder(template, tokenizer, 2, False).chat
        stops += [tokenizer.convert_tokens_to_ids(stop) for stop in sorted(chat.stops)] if chat else []
    return sorted({stop for stop in stops if isinstance(stop, int)})


def add_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Let generation end where the rows' answers did."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    stops = stop_ids(tokenizer, template, generation)
    if len(stops) > 1 or generation.eos_token_id is None:
        generation.eos_token_id = stops or None


def _tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """With the chat template that the rows were rendered by."""
    args = job.args
    options = {"chat_template": args.chat_template, "trust_remote_code": args.trust_remote_code}
    return load_tokenizer("model_name_or_path", args.model_name_or_path, **options)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Into a folder of any name: tokenizers takes only paths that are text in this locale's encoding."""
    try:
        tokenizer.save_pretrained(folder)
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as other:
            tokenizer.save_pretrained(other)
            shutil.copytree(other, folder, dirs_exist_ok=True)


def _draw(folder: Path, output_dir: Path, run: dict[str, Any]) -> None:
    updates = read_lines(output_dir / IMPORTANCE)
    counts, steps, title, path = run["trained_counts"], run["steps"], output_dir.name, folder / PICTURE
    kept = run["configuration"].get("keep_importance", False)
    drawn(path, plot_importance, path, updates, counts, steps, title, run.get("semantic"), kept)


def write_card(folder: Path, run: dict[str, Any], base: str, location: str, kind: str) -> None:
    """README.md of an adapter's or model's folder: how to load it, what it learnt from, and which layers trained.

    Args:
        run: what run.json holds.
        base: the base model, as a loader finds it.
        location: the folder, or the name on the Hub, to load it from.
        kind: PEFT's name of the method, or the class of a model.
    """
    configuration, counts = run["configuration"], run["layer_counts"]
    if adapted := (folder / "adapter_config.json").exists():
        ours = "import ist.adapters  # makes this method known to PEFT\n" if kind in ("SERIES", "PARALLEL") else ""
        loading = ADAPTER_LOADING.format(registration=ours, folder=location)
    else:
        loading = MODEL_LOADING.format(name=kind, folder=location)
    library = "peft" if adapted else "transformers"
    tags = ["ist", configuration["selection"], *([kind.lower()] if adapted else [])]
    data = ModelCardData(base_model=base, library_name=library, pipeline_tag="text-generation", tags=tags)
    table = ", ".join(f"{name} {count}" for name, count in zip(run["layers"], run["trained_counts"], strict=True))
    picture = f"![importance of each layer over the steps, and how often it was trained]({PICTURE})\n\n"
    card = ModelCard.from_template(
        data,
        template_str=MODEL_CARD,
        base=base,
        kind=f"A {kind} adapter for" if adapted else "Fine-tuned from",
        loading=loading,
        facts=list(_facts(run).items()),
        layers=f"{picture if (folder / PICTURE).exists() else ''}Steps that each layer was trained for: {table}; of "
        f"{run['steps']} steps with {counts['trained']} of {counts['n_layers']} layers each.",
    )
    # A path that is no text in this locale's encoding is no text in the card either.
    text = str(card).encode("utf-8", "backslashreplace").decode()
    (folder / "README.md").write_text(text, encoding="utf-8")


def _dataset(configuration: dict[str, Any]) -> str:
    name = str(configuration.get("dataset_name"))
    return Path(name).name if Path(name).exists() else name


def _facts(run: dict[str, Any]) -> dict[str, Any]:
    """What a card says of a run, by name; files by their name alone, as a path says nothing elsewhere."""
    configuration = run["configuration"]
    files = [Path(file).name for file in configuration.get("train_file") or ()]
    rows = f"{configuration['train_rows']:,} rows, {configuration['train_tokens']:,} tokens"
    found = {
        "rows": f"{', '.join(files) or _dataset(configuration)} ({rows})",
        "prompt template": configuration["prompt_template"],
        "selection": configuration["selection"],
        "steps": f"{run['steps']} of {configuration['global_batch_size']} rows",
        "learning rate": f"{configuration['learning_rate']:g}, {configuration['lr_scheduler_type']}",
    }
    best = run.get("best") or {}
    for name, loss in (
        ("training loss at the end", run.get("final_train_loss")),
        ("validation loss at the end", run.get("final_validation_loss")),
        (f"validation loss of step {best.get('step')}, which this is", best.get("validation_loss")),
    ):
        if loss is not None:
            found[name] = f"{loss:.4f}"
    found |= {name: run[name] for name in ("control",) if name in run}
    if said := run.get("importance_remarks"):
        found["importance"] = said[0]
    libraries = (f"{name} {version}" for name, version in run["versions"].items())
    return {**found, "seed": configuration["seed"], "versions": ", ".join(libraries)}
