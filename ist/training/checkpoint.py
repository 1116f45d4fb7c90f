"""Exact save and resume: small, whole, and read without unpickling.

A checkpoint holds the adapter (without one, the weights that train), the optimizer and a JSON state; never the frozen
base. It is written under a temporary name and renamed, so a folder named step_* is whole at whatever moment the process
died; `checkpoint.json`, written last, lists the sizes of the other files, so a folder that was cut short by a copy is
not taken for whole either.
"""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ist.config import UsageError
from ist.distributed import full_tensor, like
from ist.selection.packed_adamw import PackedAdamW

STATE = "checkpoint.json"
FORMAT = 1  # of the files and of what checkpoint.json has; one that names no format is of the first


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` finished steps."""
    return f"step_{step:06d}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place, its files on disk before its name; an older `final` makes room first."""
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    if final.exists():
        discard(final, temporary.parent)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(temporary, final)
    _sync(final.parent)


def discard(folder: Path, output_dir: Path) -> None:
    """Remove a folder so that it is gone under its own name at once, not file by file."""
    trash = output_dir / f".discarded-{folder.name}"
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def sweep(output_dir: Path) -> None:
    """Remove what a process that died while saving or discarding has left under temporary names."""
    for pattern in (".saving-*", ".discarded-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)


def _split_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """The optimizer's state by parameter name: tensors as {"name|key": tensor}, plain numbers as {name: {key: value}}.

    A layer that was never trained has no state, and gets none on loading. PackedAdamW's state is that of one process:
    indices into the whole parameter, and their values.
    """
    tensors, numbers = {}, {}
    packed = isinstance(optimizer, PackedAdamW)
    for name, parameter in parameters.items():
        state = optimizer.whole_state(parameter) if packed else optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = full_tensor(value).detach().cpu().clone()  # bitsandbytes shares tables
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """On the CPU and whole, where they are to be kept; one tensor under several names stays one. All ranks call it."""
    whole = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        gathered = full_tensor(tensor)
        if keep:
            whole[id(tensor)] = gathered.detach().cpu()
    return {name: whole[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def _once(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under the first of its names."""
    first: dict[int, str] = {}
    for name, tensor in adapter.items():
        first.setdefault(id(tensor), name)
    return {name: adapter[name] for name in first.values()}


def save_checkpoint(
    output_dir: Path,
    step: int,
    adapter: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict,
    write: bool,
) -> Path:
    """Write output_dir/checkpoints/step_000100 after `step` finished steps. All ranks call it, one with `write`.

    Args:
        adapter: what `load_adapter` gives back and puts in place, by name.
        parameters: those of the adapter that train, now or at another step, by name.
        state: JSON-ready; what `load_checkpoint` gives back.
    """
    adapter = {name: tensor.contiguous() for name, tensor in _gathered(_once(adapter), write).items()}
    tensors, numbers = _split_optimizer(optimizer, parameters)
    final = output_dir / "checkpoints" / step_name(step)
    if not write:
        return final
    temporary = output_dir / f".saving-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(adapter, temporary / "adapter.safetensors")
    save_file(tensors, temporary / "optimizer.safetensors")
    sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
    write_json(temporary / STATE, {"format": FORMAT, "step": step, "files": sizes, "optimizer": numbers, **state})
    publish(temporary, final)
    return final


def prune_checkpoints(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints (None: all), and the one of step `best` beside them."""
    steps = sorted(checkpoint_steps(output_dir))
    for step in steps[: max(0, len(steps) - limit)] if limit else []:
        if step != best:
            discard(output_dir / "checkpoints" / step_name(step), output_dir)


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of the checkpoint folders under `output_dir`, whole or not, in no order."""
    return [int(path.name[5:]) for path in output_dir.glob("checkpoints/step_*") if path.name[5:].isdigit()]


def read_state(path: Path) -> dict | None:
    """The JSON state of a whole checkpoint; None when a file is missing, cut short or unreadable."""
    try:
        state = json.loads((path / STATE).read_text())
        whole = all((path / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state if whole else None


def find_checkpoint(output_dir: Path, request: str | None) -> tuple[Path, dict] | None:
    """(path, state) of what resume_from_checkpoint asks for: None for none, and for auto where there is none yet.

    Raises:
        UsageError: the path asked for is not a whole checkpoint, or it was written by a later version.
    """

    def known(path: Path, state: dict) -> tuple[Path, dict]:
        if (number := state.get("format", 1)) > FORMAT:
            raise UsageError(
                f"--resume_from_checkpoint: {path} has format {number}, this version reads up to {FORMAT}. Resume with "
                "the version that wrote it."
            )
        return path, state

    if request in (None, "none"):
        return None
    if request == "auto":
        for step in sorted(checkpoint_steps(output_dir), reverse=True):
            path = output_dir / "checkpoints" / step_name(step)
            if (state := read_state(path)) is not None:
                return known(path, state)
            print(f"{path} is not whole; it is left out.")
        return None
    if (state := read_state(Path(request))) is None:
        raise UsageError(f"--resume_from_checkpoint must be none, auto or a whole checkpoint folder; got {request}.")
    return known(Path(request), state)


def load_adapter(path: Path, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a checkpoint's adapter into the tensors of `adapter`; all that the checkpoint has is returned as well.

    Raises:
        UsageError: the file is damaged, or its names or shapes are not the model's.
    """
    tensors = _load(path / "adapter.safetensors")
    for name, tensor in _once(adapter).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UsageError(f"--resume_from_checkpoint {path} does not fit the model: {name} differs.")
        with torch.no_grad():
            tensor.copy_(like(tensors[name], tensor))
    return tensors


def load_optimizer(
    path: Path, numbers: dict, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    """Give each parameter the optimizer state that it had; `numbers` is the checkpoint's state["optimizer"]."""
    states: dict[str, dict] = {name: dict(values) for name, values in numbers.items()}
    packed = isinstance(optimizer, PackedAdamW)
    for key, tensor in _load(path / "optimizer.safetensors").items():
        name, _, entry = key.rpartition("|")
        sharded = not packed and entry != "step" and tensor.shape == parameters[name].shape
        states.setdefault(name, {})[entry] = like(tensor, parameters[name]) if sharded else tensor
    if packed:
        for name, state in states.items():
            optimizer.load_whole_state(parameters[name], state)
        return
    names = {parameter: name for name, parameter in parameters.items()}
    whole = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole["state"] = {i: states[names[parameter]] for i, parameter in enumerate(order) if names[parameter] in states}
    optimizer.load_state_dict(whole)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--resume_from_checkpoint: {path} cannot be read ({error}).") from error


MODEL_CARD = """---
base_model: {base}
library_name: {library}
---
{what} `{base}`, by the training scripts of Importance-aware Sparse Tuning (arXiv 2410.11772).
Selection `{selection}`: {trained} of {n_layers} layers per step, {steps} steps of {batch} rows. `run.json` beside this
folder has everything else.

```python
{loading}
```
"""

ADAPTER_LOADING = """{registration}from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")"""

MODEL_LOADING = """from transformers import AutoTokenizer, {name}
model, tokenizer = {name}.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")"""


def save_adapter(model: PeftModel, adapter: dict[str, Tensor], args: Namespace, summary: dict, write: bool) -> Path:
    """output_dir/adapter as stock PEFT writes it, with a model card; whole or not there. All ranks call it.

    `adapter` is, by name, what PEFT may look for in the model's state_dict.
    """
    final, temporary = Path(args.output_dir) / "adapter", Path(args.output_dir) / ".saving-adapter"
    whole = _gathered(adapter, write)
    if not write:
        return final
    model.save_pretrained(temporary, state_dict=whole)
    method = model.peft_config["default"].peft_type.value
    ours = "import ist.adapters  # makes this method known to PEFT\n" if method in ("SERIES", "PARALLEL") else ""
    loading = ADAPTER_LOADING.format(registration=ours, base=args.model_name_or_path, folder=final)
    _write_card(temporary, args, summary, f"peft\ntags: [ist, {method}]", f"A {method} adapter for", loading)
    publish(temporary, final)
    return final


def save_model(model: PreTrainedModel, args: Namespace, summary: dict, write: bool) -> Path:
    """output_dir/model as stock transformers writes it, tokenizer and model card with it. All ranks call it.

    In float32, as weights train: what was validated is what is saved.
    """
    final, temporary = Path(args.output_dir) / "model", Path(args.output_dir) / ".saving-model"
    whole = _gathered(model.state_dict(keep_vars=True), write)
    if not write:
        return final
    wide = {id(tensor): tensor.float() if tensor.is_floating_point() else tensor for tensor in whole.values()}
    whole = {name: wide[id(tensor)] for name, tensor in whole.items()}
    model.save_pretrained(temporary, state_dict=whole)
    config = AutoConfig.from_pretrained(temporary, trust_remote_code=args.trust_remote_code)
    config.dtype = torch.float32
    config.save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    tokenizer.save_pretrained(temporary)
    # FSDP2 makes a class of its own of each that it shards, FSDP<Name>, derived from it.
    name = next(kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers"))
    loading = MODEL_LOADING.format(name=name, folder=final)
    _write_card(temporary, args, summary, "transformers\ntags: [ist]", "Fine-tuned from", loading)
    publish(temporary, final)
    return final


def _write_card(folder: Path, args: Namespace, summary: dict, library: str, what: str, loading: str) -> None:
    card = MODEL_CARD.format(
        base=args.model_name_or_path,
        library=library,
        what=what,
        loading=loading,
        selection=args.selection,
        trained=summary["layer_counts"]["trained"],
        n_layers=summary["layer_counts"]["n_layers"],
        steps=summary["max_steps"],
        batch=summary["configuration"]["global_batch_size"],
    )
    (folder / "README.md").write_text(card)
