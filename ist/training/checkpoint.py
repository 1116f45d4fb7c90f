"""Exact save and resume: small, whole, and read without unpickling.

A checkpoint holds the adapter (without one, the weights that train), the optimizer and a JSON state; never the frozen
base. It is written under a temporary name and renamed, so a folder named step_* is whole at whatever moment the process
died; `checkpoint.json`, written last, has a digest of every other file and of itself, so a folder that was cut short
or changed is not taken for whole either.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ist.distributed import checksum, from_main, full_tensor, like, require_agreement
from ist.layers import adapter_state
from ist.selection.packed_adamw import PackedAdamW
from ist.training.command_line import UsageError, brief
from ist.training.extensions import Extension
from ist.training.files import discard, file_digest, json_digest, publishing, read_text, sweep, write_json, writing
from ist.training.job import Job
from ist.tuner import SparseTuner

STATE = "checkpoint.json"
FORMAT = 2  # of the files and of checkpoint.json's keys; the first (which had no number at first) has no digests


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` finished steps."""
    return f"step_{step:06d}"


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
    adapter = {name: tensor.contiguous() for name, tensor in gathered(_once(adapter), write).items()}
    tensors, numbers = _split_optimizer(optimizer, parameters)
    final = output_dir / "checkpoints" / step_name(step)
    if not write:
        return final
    temporary = output_dir / f".saving-{final.name}"
    with publishing(temporary, final):
        save_file(adapter, temporary / "adapter.safetensors")
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


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


_REQUIRED = {"step": int, "files": dict, "optimizer": dict, "configuration": dict, "scheduler": dict, "tuner": dict}


def _read_state(path: Path) -> dict:
    """The JSON state of a checkpoint that is whole, unchanged and finite.

    Raises:
        _Damaged: it is not.
        UsageError: a later version wrote it.
        OSError: a file is there and cannot be read, which is no fault of the checkpoint.
    """
    try:
        state = json.loads(read_text(path / STATE))
    except FileNotFoundError:
        raise _Damaged(f"it has no {STATE}") from None
    except (ValueError, RecursionError):
        raise _Damaged(f"{STATE} is not JSON") from None
    if not isinstance(state, dict):
        raise _Damaged(f"{STATE} holds no object")
    number = state.get("format", 1)
    if type(number) is int and number > FORMAT:
        raise UsageError(
            f"--resume_from_checkpoint: {path} has format {number}, this version reads up to {FORMAT}. Resume with the "
            "version that wrote it."
        )
    if type(number) is not int or number < 1:
        raise _Damaged(f"it has format {number}, which no version wrote")
    for key, kind in _REQUIRED.items():
        if not isinstance(state.get(key), kind):
            raise _Damaged(f"{STATE} has no {key}")
    if state.get("data", {"next_global_batch": state["step"]}) != {"next_global_batch": state["step"]}:
        raise _Damaged(f"{STATE} goes on at the batch of another step")
    if path.name.startswith("step_") and path.name != step_name(state["step"]):
        raise _Damaged(f"{STATE} is that of step {state['step']}")
    if number == 1:
        print(f"{path} was written without digests: a change of its files cannot be seen.")
    elif state.get("digest") != json_digest({key: state[key] for key in state.keys() - {"format", "digest"}}):
        raise _Damaged(f"{STATE} was changed: its digest is another")
    _require_unchanged(path, state["files"], sized=number == 1)
    return state


def _require_unchanged(path: Path, files: dict, sized: bool) -> None:
    """Raises _Damaged unless the files are as checkpoint.json lists them, by size or digest, and finite."""
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        file = path / name
        if name not in files or not file.is_file():
            raise _Damaged(f"{name} is missing")
        if files[name] != (file.stat().st_size if sized else file_digest(file)):
            raise _Damaged(f"{name} was cut short or changed: its {'size' if sized else 'digest'} is another")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise _Damaged(f"{name} is not a safetensors file ({error})") from None
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise _Damaged(f"{name} has a value of {key} that is not finite")


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
            return str(path), _read_state(path)
        except _Damaged as error:
            if not auto:
                raise UsageError(
                    f"--resume_from_checkpoint must be none, auto or a whole checkpoint folder; got {request}: {error}."
                ) from None
            print(f"{path} is not used: {error}.")
        except OSError as error:
            raise UsageError(f"--resume_from_checkpoint {request}: {path} cannot be read: {error.strerror}.") from error
    return None


def load_adapter(path: Path, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a checkpoint's adapter into the tensors of `adapter`; all that the checkpoint has is returned as well.

    Raises:
        UsageError: the file is damaged, or its names or shapes are not the model's.
    """
    tensors = _load(path / "adapter.safetensors")
    for name, tensor in _once(adapter).items():
        if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (tensor.shape, tensor.dtype):
            raise UsageError(f"--resume_from_checkpoint {path} does not fit the model: {name} differs.")
        with torch.no_grad():
            tensor.copy_(like(tensors[name], tensor))
    return tensors


def load_optimizer(
    path: Path, state: dict, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    """Give each parameter the optimizer state that it had.

    Args:
        state: of the checkpoint; its keys optimizer (plain numbers by parameter name) and step are read.

    Raises:
        UsageError: the file is damaged, or its names are not those of the parameters.
    """
    states: dict[str, dict] = {name: dict(values) for name, values in state["optimizer"].items()}
    packed = isinstance(optimizer, PackedAdamW)
    for key, tensor in _load(path / "optimizer.safetensors").items():
        name, _, entry = key.rpartition("|")
        if name not in parameters:
            raise UsageError(f"--resume_from_checkpoint {path} does not fit the model: it has no parameter {name}.")
        sharded = not packed and entry != "step" and tensor.shape == parameters[name].shape
        states.setdefault(name, {})[entry] = like(tensor, parameters[name]) if sharded else tensor
    moments = {"exp_avg", "exp_avg_sq", "step", *(["indices"] if packed else [])}
    torchs = packed or isinstance(optimizer, torch.optim.AdamW)
    missing = torchs and any(not moments <= own.keys() for own in states.values())
    if (state["step"] and not states) or missing:
        raise UsageError(f"--resume_from_checkpoint {path} cannot be used: moments of its optimizer are missing.")
    for name, own in states.items() if torchs else ():
        if {own["exp_avg"].dtype, own["exp_avg_sq"].dtype} != {parameters[name].dtype}:
            raise UsageError(f"--resume_from_checkpoint {path} cannot be used: {name} has moments of another dtype.")
    if packed:
        for name, own in states.items():
            optimizer.load_whole_state(parameters[name], own)
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


@dataclass
class Progress:
    """Where a run is, as the loop resumes from it; tuner, optimizer and schedule have states of their own.

    Attributes:
        step: finished optimizer steps.
        tokens: of all ranks, so far.
        loss: of the last logged step.
        validation_loss: of the last validation.
        best: {step, validation_loss} of the checkpoint of lowest validation loss, where the run wants it.
    """

    step: int = 0
    tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    best: dict | None = None

    @classmethod
    def of(cls, state: dict) -> "Progress":
        """Of a checkpoint's state.

        Raises:
            ValueError: one of its values is missing, or of another type.
        """
        progress = cls(**{key.name: state.get(key.name) for key in fields(cls)})
        best = {"step": 0, "validation_loss": 0.0} if progress.best is None else progress.best
        counts = (progress.step, progress.tokens, best["step"])
        losses = (progress.loss or 0.0, progress.validation_loss or 0.0, best["validation_loss"])
        if any(type(count) is not int for count in counts) or not all(isinstance(one, (int, float)) for one in losses):
            raise ValueError("step, tokens, loss, validation_loss or best is missing, or of another type")
        return progress

    def advance(self, tokens: int) -> None:
        """A step is finished; its global batch had so many tokens."""
        self.step += 1
        self.tokens += tokens


class WholeAdapter:
    """All tensors of the adapter by name, trainable or not; without an adapter, the trainable parameters.

    Make it before the first forward: after one without gradients FSDP has other objects in the place of some
    parameters.

    Args:
        model: unwrapped, its adapter whole: no layer is frozen yet.

    Attributes:
        parameters: {name: parameter} of all that train at some step; each parameter once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._trained = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self) -> dict[str, Tensor]:
        return adapter_state(self.model) | self._trained


class Checkpoints:
    """The checkpoints of one run. Every rank makes one and calls it alike; the main process writes.

    Args:
        job: its configuration is kept in each checkpoint.
        optimizer: torch's, not Accelerate's wrapper of it.
    """

    def __init__(
        self,
        job: Job,
        adapter: WholeAdapter,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        tuner: SparseTuner,
        extensions: Extension,
    ) -> None:
        self.output_dir, self.folder = job.output_dir, job.output_dir / "checkpoints"
        self.adapter, self.parameters, self.optimizer, self.scheduler = (
            adapter,
            adapter.parameters,
            optimizer,
            scheduler,
        )
        self.tuner, self.extensions, self.configuration = tuner, extensions, job.configuration
        self.keep = job.args.save_total_limit
        self.write = PartialState().is_main_process
        self.saved: int | None = None  # the step of the last one

    def resume(self, checkpoint: tuple[Path, dict] | None) -> Progress:
        """Put a checkpoint's state in place, and remove later checkpoints and temporary folders."""
        progress = Progress()
        if checkpoint:
            path, state = checkpoint
            load_optimizer(path, state, self.optimizer, self.parameters)
            try:
                progress = Progress.of(state)
                self.extensions.load(load_adapter(path, self.adapter()), state)
                if missing := {"_last_lr", "last_epoch"} - state["scheduler"].keys():
                    raise ValueError(f"scheduler has no {missing.pop()}")
                self.scheduler.load_state_dict(state["scheduler"])
                scheduler = self.scheduler  # whose rate of this step is another one where the run has more steps now
                rates = [
                    base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)
                ]
                scheduler._last_lr = rates
                for group, learning_rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = float(learning_rate)
                self.tuner.load_state_dict(state["tuner"])
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # of an edited state
                reason = f"{STATE} does not fit this run ({brief(error)})"
                raise UsageError(f"--resume_from_checkpoint {path} cannot be used: {reason}.") from error
            best = progress.best
            if best and not (self.folder / step_name(best["step"])).exists():
                if self.write:
                    print(f"The best checkpoint so far, of step {best['step']}, is gone; looking for a new best.")
                progress.best = None
        if self.write:
            with writing(self.output_dir):
                sweep(self.output_dir)
                for later in (step for step in checkpoint_steps(self.output_dir) if step > progress.step):
                    discard(self.folder / step_name(later), self.output_dir)
        self.saved = progress.step
        return progress

    def save(self, progress: Progress) -> None:
        """After `progress.step` finished steps; the trained weights must be finite.

        Raises:
            RuntimeError: replicas of them differ between ranks.
        """
        require_agreement(f"the weights after step {progress.step}", checksum(self.parameters.values()))
        self.extensions.before_save()
        seed = self.configuration["seed"]
        state = {
            "configuration": self.configuration,
            "scheduler": self.scheduler.state_dict(),
            "tuner": self.tuner.state_dict(),
            "data": {"next_global_batch": progress.step},
            "rng": {"reseeded_by": ["seed", "step", "rank"], "seed": seed, "step": progress.step},
            **asdict(progress),
            **self.extensions.state_dict(),
        }
        tensors = self.adapter() | self.extensions.tensors()
        save_checkpoint(self.output_dir, progress.step, tensors, self.parameters, self.optimizer, state, self.write)
        self.extensions.begin_step(self.tuner.trained)
        if self.write:
            prune_checkpoints(self.output_dir, self.keep, progress.best["step"] if progress.best else None)
        self.saved = progress.step

    def load_best(self, step: int) -> None:
        """Put the adapter of the checkpoint of `step` in place."""
        PartialState().wait_for_everyone()  # until the main process has written it
        path = self.folder / step_name(step)
        try:
            state = _read_state(path)
        except _Damaged as error:
            raise UsageError(f"{path}, of the lowest validation loss, was damaged since: {error}.") from None
        self.extensions.load(load_adapter(path, self.adapter()), state)

    def last(self) -> str:
        """Where a failed run can go on from."""
        return last_checkpoint(self.output_dir)
