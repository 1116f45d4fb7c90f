"""Exact save and resume: small, whole, and read without unpickling.

A checkpoint holds the adapter (without one, the weights that train), the optimizer and a JSON state; never the frozen
base. It is written under a temporary name and renamed, so a folder named step_* is whole at whatever moment the process
died; `checkpoint.json`, written last, has a digest of every other file and of itself, so a folder that was cut short
or changed is not taken for whole either.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ist.distributed import from_main, full_tensor, placed_from_main
from ist.selection.packed_adamw import PackedAdamW
from ist.training.command_line import UsageError
from ist.training.files import discard, file_digest, json_digest, publishing, read_text, write_json, writing

STATE = "checkpoint.json"
FORMAT = 2  # of the files and of checkpoint.json's keys; the first (which had no number at first) has no digests


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` finished steps."""
    return f"step_{step:06d}"


def _split_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], keep: bool
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """The optimizer's state by parameter name: tensors as {"name|key": tensor}, plain numbers as {name: {key: value}}.

    A layer that was never trained has no state, and gets none on loading. PackedAdamW's state is that of one process:
    indices into the whole parameter, and their values. Tensor by tensor: a rank that does not `keep` them never has
    more than one whole.
    """
    tensors, numbers = {}, {}
    packed = isinstance(optimizer, PackedAdamW)
    for name, parameter in parameters.items():
        state = optimizer.whole_state(parameter) if packed else optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                whole = full_tensor(value)
                if keep:
                    tensors[f"{name}|{key}"] = whole.detach().cpu().clone()  # bitsandbytes shares tables
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
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
        adapter: tensors by name, which `load_adapter` gives back and puts in place.
        parameters: those of the adapter that train, now or at another step, by name.
        state: JSON-ready; more keys of checkpoint.json.
    """
    final = output_dir / "checkpoints" / step_name(step)
    adapter = _once(adapter)
    if not write:
        gathered(adapter, keep=False)
        _split_optimizer(optimizer, parameters, keep=False)
        return final
    temporary = output_dir / f".saving-{final.name}"
    with publishing(temporary, final):
        # One file after the other: both together would need three times the memory of what trains.
        whole = {name: tensor.contiguous() for name, tensor in gathered(adapter, keep=True).items()}
        save_file(whole, temporary / "adapter.safetensors")
        del whole
        tensors, numbers = _split_optimizer(optimizer, parameters, keep=True)
        save_file(tensors, temporary / "optimizer.safetensors")
        digests = {file.name: file_digest(file) for file in sorted(temporary.iterdir())}
        # As JSON has it, so that the digest is that of what will be read: a tuple is a list there.
        whole = json.loads(json.dumps({"step": step, "files": digests, "optimizer": numbers, **state}, allow_nan=False))
        write_json(temporary / STATE, {"format": FORMAT, "digest": json_digest(whole), **whole})
    return final


def prune_checkpoints(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints (None: all), and the one of step `best`."""
    steps = sorted(checkpoint_steps(output_dir))
    with writing(output_dir / "checkpoints"):
        for step in steps[: max(0, len(steps) - limit)] if limit else []:
            if step != best:
                discard(output_dir / "checkpoints" / step_name(step), output_dir)


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of the checkpoint folders under `output_dir`, whole or not, in no order."""
    found = [re.fullmatch(r"step_([0-9]{6,})", path.name) for path in output_dir.glob("checkpoints/step_*")]
    return [int(name[1]) for name in found if name and name[0] == step_name(int(name[1]))]


def last_checkpoint(output_dir: Path) -> str:
    """Where a failed run can go on from, for its last line."""
    steps = checkpoint_steps(output_dir)
    return f"last good checkpoint: {output_dir / 'checkpoints' / step_name(max(steps)) if steps else 'none'}"


class Damaged(Exception):
    """Why a checkpoint cannot be used."""


_REQUIRED = {"step": int, "files": dict, "optimizer": dict, "configuration": dict, "scheduler": dict, "tuner": dict}


def read_state(path: Path) -> dict:
    """The JSON state of a checkpoint that is whole, unchanged and finite.

    Raises:
        Damaged: it is not.
        UsageError: a later version wrote it.
        OSError: a file is there and cannot be read, which is no fault of the checkpoint.
    """
    try:
        state = json.loads(read_text(path / STATE))
    except FileNotFoundError:
        raise Damaged(f"it has no {STATE}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{STATE} is not JSON") from None
    if not isinstance(state, dict):
        raise Damaged(f"{STATE} holds no object")
    number = state.get("format", 1)
    if type(number) is int and number > FORMAT:
        raise UsageError(
            f"--resume_from_checkpoint: {path} has format {number}, this version reads up to {FORMAT}. Resume with the "
            "version that wrote it."
        )
    if type(number) is not int or number < 1:
        raise Damaged(f"it has format {number}, which no version wrote")
    for key, kind in _REQUIRED.items():
        if not isinstance(state.get(key), kind):
            raise Damaged(f"{STATE} has no {key}")
    if state.get("data", {"next_global_batch": state["step"]}) != {"next_global_batch": state["step"]}:
        raise Damaged(f"{STATE} goes on at the batch of another step")
    if path.name.startswith("step_") and path.name != step_name(state["step"]):
        raise Damaged(f"{STATE} is that of step {state['step']}")
    if number == 1:
        print(f"{path} was written without digests: a change of its files cannot be seen.")
    elif state.get("digest") != json_digest({key: state[key] for key in state.keys() - {"format", "digest"}}):
        raise Damaged(f"{STATE} was changed: its digest is another")
    _require_unchanged(path, state["files"], sized=number == 1)
    return state


def _require_unchanged(path: Path, files: dict, sized: bool) -> None:
    """Raises Damaged unless the files are as checkpoint.json lists them, by size or digest, and finite."""
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        file = path / name
        if name not in files or not file.is_file():
            raise Damaged(f"{name} is missing")
        if files[name] != (file.stat().st_size if sized else file_digest(file)):
            raise Damaged(f"{name} was cut short or changed: its {'size' if sized else 'digest'} is another")
        try:
            for key, tensor in _tensors(file):
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise Damaged(f"{name} has a value of {key} that is not finite")
        except SafetensorError as error:
            raise Damaged(f"{name} is not a safetensors file ({error})") from None


def find_checkpoint(output_dir: Path, request: str | None) -> tuple[Path, dict] | None:
    """(path, state) of the checkpoint to resume from: None for none, and for auto where there is none yet.

    All ranks call it; the main process looks and tells, so that all go on from the same one.

    Raises:
        UsageError: the path asked for is not a whole checkpoint; a later version wrote it; a file cannot be read.
    """
    if request in (None, "none"):
        return None
    found = from_main(lambda: _find_checkpoint(output_dir, request), UsageError)
    return (Path(found[0]), found[1]) if found else None


def _find_checkpoint(output_dir: Path, request: str) -> tuple[str, dict] | None:
    steps = sorted(checkpoint_steps(output_dir), reverse=True)
    auto = request == "auto"
    for path in [output_dir / "checkpoints" / step_name(step) for step in steps] if auto else [Path(request)]:
        try:
            return str(path), read_state(path)
        except Damaged as error:
            if not auto:
                raise UsageError(
                    f"--resume_from_checkpoint must be none, auto or a whole checkpoint folder; got {request}: {error}."
                ) from None
            print(f"{path} is not used: {error}.")
        except OSError as error:
            raise UsageError(f"--resume_from_checkpoint {request}: {path} cannot be read: {error.strerror}.") from error
    return None


def load_adapter(path: Path, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a checkpoint's adapter into the tensors of `adapter`; what else its file holds is returned, on the CPU.

    All ranks call it: the main process reads the file, tensor by tensor, and the others get theirs from it.

    Raises:
        UsageError: the file is damaged, or its names or shapes are not the model's.
    """
    file = path / "adapter.safetensors"
    header, adapter = _header(file), _once(adapter)
    for name, tensor in adapter.items():
        if header.get(name) != (tensor.dtype, tensor.shape):
            raise UsageError(f"--resume_from_checkpoint {path} does not fit the model: {name} differs.")
    others = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in header.items() if name not in adapter}
    places = adapter | others
    with torch.no_grad():
        for name, tensor in _placed(file, header, places):
            places[name].copy_(tensor)
    return others


def load_optimizer(
    path: Path, state: dict, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    """Give each parameter the optimizer state that it had. All ranks call it, as `load_adapter`.

    Args:
        state: of the checkpoint; its keys optimizer (plain numbers by parameter name) and step are read.

    Raises:
        UsageError: the file is damaged, or its names are not those of the parameters.
    """
    file = path / "optimizer.safetensors"
    header = _header(file)
    states: dict[str, dict] = {name: dict(values) for name, values in state["optimizer"].items()}
    packed = isinstance(optimizer, PackedAdamW)
    places: dict[str, Tensor] = {}
    for key, (dtype, shape) in header.items():
        name, _, entry = key.rpartition("|")
        if name not in parameters:
            raise UsageError(f"--resume_from_checkpoint {path} does not fit the model: it has no parameter {name}.")
        sharded = not packed and entry != "step" and shape == parameters[name].shape
        places[key] = parameters[name] if sharded else torch.empty(0)
        states.setdefault(name, {})[entry] = dtype
    moments = {"exp_avg", "exp_avg_sq", "step", *(["indices"] if packed else [])}
    torchs = packed or isinstance(optimizer, torch.optim.AdamW)
    missing = torchs and any(not moments <= own.keys() for own in states.values())
    stateless = isinstance(optimizer, torch.optim.SGD)
    if (state["step"] and not states and not stateless) or missing:
        raise UsageError(f"--resume_from_checkpoint {path} cannot be used: moments of its optimizer are missing.")
    for name, own in states.items() if torchs else ():
        if {own["exp_avg"], own["exp_avg_sq"]} != {parameters[name].dtype}:
            raise UsageError(f"--resume_from_checkpoint {path} cannot be used: {name} has moments of another dtype.")
    for key, tensor in _placed(file, header, places):
        name, _, entry = key.rpartition("|")
        states[name][entry] = tensor
    if packed:
        for name, own in states.items():
            optimizer.load_whole_state(parameters[name], own)
        return
    names = {parameter: name for name, parameter in parameters.items()}
    whole = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole["state"] = {i: states[names[parameter]] for i, parameter in enumerate(order) if names[parameter] in states}
    optimizer.load_state_dict(whole)


Header = dict[str, tuple[torch.dtype, torch.Size]]


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """A file's tensors in turn, mapped into memory."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            yield name, tensors.get_tensor(name)


def _header(file: Path) -> Header:
    """{name: (dtype, shape)} of a file that the main process reads.

    Raises:
        UsageError: on every rank, where it cannot be read.
    """

    def read() -> dict[str, tuple[str, list[int]]]:
        try:
            return {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in _tensors(file)}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"--resume_from_checkpoint: {file} cannot be read ({error}).") from error

    header = from_main(read, UsageError)
    return {name: (getattr(torch, dtype[6:]), torch.Size(shape)) for name, (dtype, shape) in header.items()}


def _placed(file: Path, header: Header, places: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file in turn, each sharded and placed as the tensor of its name in `places` is. All ranks call
    it; the main process reads."""
    state = PartialState()
    read = _tensors(file) if state.is_main_process else ((name, None) for name in header)
    for name, whole in read:
        dtype, shape = header[name]
        yield name, placed_from_main(whole, dtype, shape, places[name], state.device)
