"""Importance-aware Sparse Tuning as a callback of transformers.Trainer, and of TRL's SFTTrainer.

    trainer = Trainer(model=peft_model, args=args, train_dataset=rows, callbacks=[ISTCallback(ISTConfig())])

One process or several under DistributedDataParallel; train_ist.py has FSDP2 as well.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import AdaLoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, WandbCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from ist.config import ISTConfig
from ist.layers import drop_input_grad_hooks
from ist.probe import probe_rows
from ist.training.files import IMPORTANCE, PICTURE, keep_lines, read_lines, write_json
from ist.training.trackers import importance_values
from ist.tuner import SparseTuner


class ISTCallback(TrainerCallback, ExportableState):
    """The paper's Algorithm 1 in a Trainer's loop.

    Before each optimizer step the layers that train are chosen, by IST or another rule (`selection`). When an
    importance update is due, the losses of the candidate sets are measured on rows of the training set, collated as for
    training.

    A resumed Trainer goes on with the scores of its checkpoint, under the same configuration. In `args.output_dir`
    stand importance.jsonl, a line for each update, importance.png, and semantic.json of a semantic rule; W&B gets
    importance/… and probe/… where the Trainer reports to it.

    Args:
        config: the method's hyper-parameters, or a dictionary of them. `probe_batch_size` defaults to the global batch.

    Attributes:
        tuner: the SparseTuner, from the beginning of training on (of the callback that the Trainer holds: with
            `restore_callback_states_from_checkpoint` it makes another one from the checkpoint).

    Raises:
        ValueError: at the beginning of training, where the Trainer is set up so that layers could not rest.
    """

    def __init__(self, config: ISTConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, ISTConfig):  # a checkpoint of an earlier version has None for keys of other rules
            config = ISTConfig(**{key: value for key, value in (config or {}).items() if value is not None})
        self.config = config
        self.tuner: SparseTuner | None = None
        self.restored: dict | None = None  # the tuner's state, where the Trainer restored this callback itself

    def state(self) -> dict:
        """The entry in trainer_state.json of each checkpoint."""
        attributes = {"restored": self.tuner.state_dict() if self.tuner else None}
        return {"args": {"config": asdict(self.config)}, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_dataloader: DataLoader,
        **kwargs,
    ) -> None:
        if self.tuner is not None:  # training began before, and may have been broken off
            self.tuner.release()
        _require_served(self.config, args, model, train_dataloader)
        drop_input_grad_hooks(model)
        self.tuner = SparseTuner(
            model,
            self.config,
            lambda step: _batches(step, self.config, args, train_dataloader),
        )
        if self.config.anneal_to_fixed:
            self.tuner.rule.total_steps = state.max_steps
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not all(id(parameter) in trained for parameter in self.tuner.trained_parameters()):
            raise ValueError("the optimizer lacks adapter parameters: make it while all layers can be trained")
        if state.global_step:
            self._resume(state)
        semantic = self.tuner.prepare()
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            keep_lines(Path(args.output_dir) / IMPORTANCE, lambda line: line["step"] < state.global_step)
            layers, (n_layers, n_trained, _) = self.tuner.layers, self.tuner.rule.counts
            print(f"IST: {n_layers} layers, {n_trained} trained per step (selection {self.config.selection})")
            if semantic:
                write_json(Path(args.output_dir) / "semantic.json", semantic)
            if layers.outside:
                print(f"In no layer, or shared by several, so trained at every step: {', '.join(layers.outside[:5])}")

    def _resume(self, state: TrainerState) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {"args": {}, "attributes": {}})
        saved = saved[0] if isinstance(saved, list) else saved
        here = json.loads(json.dumps(asdict(self.config)))
        there = saved["args"].get("config", here)
        if differing := [key for key in here if key in there and there[key] != here[key]]:
            raise ValueError(f"the checkpoint was made with another {', '.join(differing)}: resume with its ISTConfig")
        if tuner := self.restored or saved["attributes"].get("restored"):
            self.tuner.load_state_dict(tuner)
        elif state.is_world_process_zero:
            print("IST: the checkpoint was made without ISTCallback, so scores start from zero")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.tuner.observe_gradients()
        trained = {id(parameter) for parameter in self.tuner.trained_parameters()}
        adapter = (parameter for layer in self.tuner.layers.parameters for parameter in layer)
        if any(parameter.grad is not None for parameter in adapter if id(parameter) not in trained):
            raise RuntimeError("a resting layer has a gradient: this Trainer makes layers train by itself")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        update = self.tuner.begin_step(state.global_step)
        if update and state.is_world_process_zero:
            with open(Path(args.output_dir) / IMPORTANCE, "a") as file:
                file.write(json.dumps(update) + "\n")
            self._report(importance_values(update, self.tuner.trained_counts), args, state, control)

    def _report(
        self, values: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Give values to the Trainer's trackers: to W&B as they are named, to others as Trainer names what it logs
        (train/importance/score/layer_00)."""
        for callback in _trackers():
            if isinstance(callback, WandbCallback):
                import wandb

                if wandb.run is not None:
                    wandb.log(values | {"train/global_step": state.global_step})
            elif type(callback).__name__ == "DVCLiveCallback":  # its on_log ends a step of Trainer's
                for key, value in values.items() if callback.live is not None else ():
                    callback.live.log_metric(f"train/{key}", value)
            else:
                callback.on_log(args, state, control, logs=dict(values))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuner.release()
        if state.is_world_process_zero:
            self._draw(Path(args.output_dir), state.global_step)

    def _draw(self, output_dir: Path, steps: int) -> None:
        try:
            from ist.training.figures import plot_importance
        except ImportError:
            print(f"{output_dir / PICTURE} is not drawn: pip install matplotlib")
            return
        updates, counts = read_lines(output_dir / IMPORTANCE), self.tuner.trained_counts
        plot_importance(output_dir / PICTURE, updates, counts, steps, output_dir.name, self.tuner.prepare())


def _trackers() -> list[TrainerCallback]:
    """The tracking callbacks of the Trainer that called: it names them to no callback, so they are those of the handler
    up the stack."""
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is None:
        return []
    kinds = tuple({**INTEGRATION_TO_CALLBACK}.values())
    return [callback for callback in frame.f_locals["self"].callbacks if isinstance(callback, kinds)]


def _require_served(config: ISTConfig, args: TrainingArguments, model: nn.Module, train_dataloader: DataLoader) -> None:
    kind = AcceleratorState().distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"ISTCallback runs on one process or under DDP, not under {kind.value}: use train_ist.py")
    if config.selection == "id3":
        raise ValueError(
            "id3 needs an optimizer of its own and reads gradients before each of its steps: use train_ist.py"
        )
    if args.world_size > 1 and args.ddp_find_unused_parameters is False:
        raise ValueError("ddp_find_unused_parameters must be true (the default with PEFT): layers that rest are unused")
    checkpointed = args.gradient_checkpointing and not hasattr(model, "peft_config")
    if args.world_size > 1 and args.ddp_find_unused_parameters is None and checkpointed:
        raise ValueError(
            "pass ddp_find_unused_parameters=True: with checkpointing and without PEFT, Trainer sets it false"
        )
    if args.n_gpu > 1:
        raise ValueError("DataParallel (one process, several GPUs) is not served: use accelerate launch, or one GPU")
    if any(isinstance(config, AdaLoraConfig) for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("AdaLoRA's budget needs steps of its own, which train_ist.py has: use it")
    if args.torch_compile:
        raise ValueError("torch_compile must be false: a compiled model ignores the hooks that suppress responses")
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    if any(function.keywords.get("use_reentrant", True) for function in functions if isinstance(function, partial)):
        raise ValueError('activation_checkpointing_kwargs must be {"use_reentrant": False}, the default')
    if not hasattr(train_dataloader.dataset, "__getitem__") or not hasattr(train_dataloader.dataset, "__len__"):
        raise ValueError("train_dataset must have a length and rows by number: probes are drawn from it")
    if config.probe_max_length:
        raise ValueError("probe_max_length is train_ist.py's: here rows come collated; leave it out")
    if config.calibrates and model.config.is_encoder_decoder:
        raise ValueError("semantic rules compare hidden states with next tokens: not served in an encoder-decoder")
    labels = train_dataloader.collate_fn([train_dataloader.dataset[0]]).get("labels")
    if labels is None or labels.dim() != 2:
        raise ValueError("the collator must give labels [B, T], as for language modelling: probes are measured by them")


def _batches(
    step: int | str, config: ISTConfig, args: TrainingArguments, loader: DataLoader
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the probe rows of `step`, or those of "calibration", collated as for training."""
    size, rank, world_size = args.per_device_train_batch_size, args.process_index, args.world_size
    count = config.probe_rows(size * args.gradient_accumulation_steps * world_size)
    count = config.semantic_rows if step == "calibration" else count
    indices = probe_rows(len(loader.dataset), count, config.seed, step)
    for start in range(rank * size, len(indices), size * world_size):
        batch = loader.collate_fn([loader.dataset[i] for i in indices[start : start + size]])
        yield {key: value.to(args.device) for key, value in batch.items() if isinstance(value, Tensor)}
