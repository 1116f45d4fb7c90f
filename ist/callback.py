"""Importance-aware Sparse Tuning as a callback of transformers.Trainer and of TRL's trainers.

    trainer = Trainer(model=peft_model, args=args, train_dataset=rows, callbacks=[ISTCallback(ISTConfig())])

where the loss is the cross entropy of labels; where it is another (DPOTrainer, KTOTrainer, SFTTrainer with dft):

    trainer.add_callback(ISTCallback(ISTConfig(), trainer=trainer))

One process or several under DistributedDataParallel; train_ist.py has FSDP2 as well.
"""

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import AdaLoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, WandbCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from ist.config import ISTConfig
from ist.layers import drop_input_grad_hooks
from ist.loss import predicted_tokens, token_loss
from ist.probe import probe_rows
from ist.training.files import IMPORTANCE, PICTURE, keep_lines, read_lines, write_json
from ist.training.trackers import importance_values
from ist.tuner import SparseTuner

if TYPE_CHECKING:  # transformers.Trainer imports datasets
    from transformers import Trainer


class ISTCallback(TrainerCallback, ExportableState):
    """The paper's Algorithm 1 in a Trainer's loop.

    Before each optimizer step the layers that train are chosen, by IST or another rule (`selection`). When an
    importance update is due, the losses of the candidate sets are measured on rows of the training set, collated as for
    training: the cross entropy of their labels, or with `trainer` the loss that it trains by.

    A resumed Trainer goes on with the scores of its checkpoint, under the same configuration. In `args.output_dir`
    stand importance.jsonl, a line for each update, importance.png, and semantic.json of a semantic rule; W&B gets
    importance/… and probe/… where the Trainer reports to it.

    Args:
        config: the method's hyper-parameters, or a dictionary of them. `probe_batch_size` defaults to the global batch.
        trainer: the Trainer that the callback is added to; its `compute_loss` is then what probes measure. Several
            processes take as many rows each: `probe_batch_size` is rounded up to a multiple of them.

    Attributes:
        tuner: the SparseTuner, from the beginning of training on (of the callback that the Trainer holds: with
            `restore_callback_states_from_checkpoint` it makes another one from the checkpoint).

    Raises:
        ValueError: at the beginning of training, where the Trainer is set up so that layers could not rest, or so that
            the losses that the rule learns from cannot be measured.
    """

    def __init__(self, config: ISTConfig | Mapping[str, Any] | None = None, trainer: "Trainer | None" = None) -> None:
        if not isinstance(config, ISTConfig):  # a checkpoint of an earlier version has None for keys of other rules
            config = ISTConfig(**{key: value for key, value in (config or {}).items() if value is not None})
        self.config = config
        self.trainer = trainer
        self.by_trainer = trainer is not None  # in checkpoints, which the Trainer itself does not go into
        self.tuner: SparseTuner | None = None
        self._holds: list[RemovableHandle] = []
        self.restored: dict | None = None  # the tuner's state, where the Trainer restored this callback itself

    def state(self) -> dict:
        """The entry in trainer_state.json of each checkpoint."""
        attributes = {"restored": self.tuner.state_dict() if self.tuner else None, "by_trainer": self.by_trainer}
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
            self._let_go()
            self.tuner.release()
        if self.by_trainer and self.trainer is None:  # restored from a checkpoint
            self.trainer = _up_the_stack(sys.modules["transformers.trainer"].Trainer)
        _require_served(self.config, args, model)
        _require_measurable(self.config, args, model, train_dataloader, self.trainer)
        drop_input_grad_hooks(model)
        self.tuner = SparseTuner(
            model,
            self.config,
            lambda step: _batches(step, self.config, args, train_dataloader, self.by_trainer),
            TrainerLoss(self.trainer) if self.trainer else token_loss,
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
        if saved["attributes"].get("by_trainer") and not self.by_trainer:
            raise ValueError("the checkpoint was made with ISTCallback(config, trainer=trainer): resume with it")
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
        self._let_go()
        update = self.tuner.begin_step(state.global_step)
        self._hold()
        if update and state.is_world_process_zero:
            with open(Path(args.output_dir) / IMPORTANCE, "a") as file:
                file.write(json.dumps(update) + "\n")
            self._report(importance_values(update, self.tuner.trained_counts), args, state, control)

    def _hold(self) -> None:
        """Let no other layers train before the next step begins: where PEFT's `disable_adapter` ends, with which TRL's
        trainers compute the reference's log-probabilities, every adapter is set to train. They also turn gradient
        checkpointing off and on, which brings its hooks on the embedding back."""
        layers, model = self.tuner.layers, self.tuner.model
        embedding = model.get_input_embeddings()
        self._holds.append(embedding.register_forward_pre_hook(lambda *_: drop_input_grad_hooks(model)))
        for i, (modules, parameters) in enumerate(zip(layers.modules, layers.parameters, strict=True)):
            own = {id(parameter) for parameter in parameters}
            for module in modules:  # not on the layer, whose hooks gradient checkpointing leaves out in the backward
                adapter = [parameter for parameter in module.parameters() if id(parameter) in own]
                set_again = partial(_set_training, adapter, i in self.tuner.trained)
                self._holds.append(module.register_forward_pre_hook(set_again))

    def _let_go(self) -> None:
        while self._holds:
            self._holds.pop().remove()

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
        self._let_go()
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


def _set_training(parameters: list[nn.Parameter], train: bool, *_: Any) -> None:
    """Called before the forward of their module; also by gradient checkpointing, in the backward."""
    if torch.is_grad_enabled():
        for parameter in parameters:
            parameter.requires_grad_(train)


class TrainerLoss:
    """The loss of a Trainer's `compute_loss`, as SparseTuner takes it.

    It is taken for a mean: over the predicted tokens where the batch has labels [B, T], over its rows otherwise (pairs
    with DPO). Batches are those of `_batches`: {"inputs": what the collator gave, "rows": how many rows that are}.
    """

    # What the loss of a batch adds to in TRL's trainers: metrics of the next line of the log, BCO's running mean.
    ADDED_TO = ("_metrics", "_stored_metrics", "running")

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | int]:
        """(loss times count, count): predicted tokens or rows; nothing of the Trainer is changed."""
        trainer = self._copy()
        inputs = trainer._prepare_inputs(dict(batch["inputs"]))
        count = predicted_tokens(model, inputs) if _by_tokens(inputs) else batch["rows"]
        drop_input_grad_hooks(model)  # they and the flags: as `_hold` does for training
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return (loss.double() * count if count else torch.zeros_like(loss)), count

    def _copy(self) -> "Trainer":
        """A Trainer whose counts and metrics are its own, and the rest the Trainer's."""
        trainer = copy.copy(self.trainer)
        for name in set(self.ADDED_TO) & vars(trainer).keys():
            value = getattr(trainer, name)
            setattr(trainer, name, copy.deepcopy(value) if isinstance(value, dict) else copy.copy(value))
        return trainer


def _by_tokens(batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.dim() == 2


def _up_the_stack(kind: type) -> Any:
    """The `self` of the nearest caller of that class; None where there is none."""
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _trackers() -> list[TrainerCallback]:
    """The tracking callbacks of the Trainer that called: it names them to no callback, so they are those of the handler
    up the stack."""
    handler = _up_the_stack(CallbackHandler)
    kinds = tuple({**INTEGRATION_TO_CALLBACK}.values())
    return [callback for callback in handler.callbacks if isinstance(callback, kinds)] if handler else []


def _require_served(config: ISTConfig, args: TrainingArguments, model: nn.Module) -> None:
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


MEASURE_NOTHING = "choose a rule that measures no losses, such as random, lisa or last"


def _require_measurable(
    config: ISTConfig, args: TrainingArguments, model: nn.Module, loader: DataLoader, trainer: "Trainer | None"
) -> None:
    """What the rule learns from can be measured on rows of the training set."""
    if trainer is not None and trainer.args is not args:
        raise ValueError("ISTCallback(config, trainer=trainer) was added to another Trainer: give it that one")
    if not (config.suppresses or config.calibrates):
        return
    rule = f"selection={config.selection}"
    rows = loader.dataset
    if isinstance(rows, IterableDataset) or not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise ValueError(
            f"train_dataset must have a length and rows by number, as {rule} measures losses on rows drawn from it, "
            f"and streamed rows have neither: load it whole, or {MEASURE_NOTHING}"
        )
    if config.probe_max_length:
        raise ValueError("probe_max_length is train_ist.py's: here rows come collated; leave it out")
    if config.calibrates and model.config.is_encoder_decoder:
        raise ValueError("semantic rules compare hidden states with next tokens: not served in an encoder-decoder")
    batch = loader.collate_fn([rows[0]])
    if not isinstance(batch, Mapping) or (trainer is not None and _generates(type(trainer), batch)):
        name = type(trainer or args).__name__
        raise ValueError(
            f"{rule} measures losses on rows of train_dataset, and the loss of {name} is one of texts that are "
            f"generated in training: {MEASURE_NOTHING}"
        )
    if config.calibrates and not _by_tokens(batch):
        raise ValueError(f"the collator must give labels [B, T]: {rule} compares hidden states with next tokens")
    if config.suppresses and trainer is None and (loss := _loss_of_its_own(args, batch)):
        raise ValueError(
            f"{rule} would measure the cross entropy of labels, and {loss}: "
            "trainer.add_callback(ISTCallback(config, trainer=trainer)) measures the Trainer's own loss"
        )


def _generates(trainer: "type[Trainer]", batch: Mapping[str, Any]) -> bool:
    """Whether a training step makes its batch by generation, and not of the collator's alone (GRPO, online DPO)."""
    base = sys.modules["transformers.trainer"].Trainer
    prepares = trainer._prepare_inputs.__module__.split(".")[0] == "trl"  # by generation, wherever TRL has its own
    steps = trainer.training_step is not base.training_step and trainer.compute_loss is base.compute_loss
    return prepares or (steps and "labels" not in batch)


def _loss_of_its_own(args: TrainingArguments, batch: Mapping[str, Any]) -> str | None:
    """What says that the Trainer's loss is not the mean cross entropy of labels, where something does."""
    if (loss_type := getattr(args, "loss_type", None)) not in (None, "nll", "chunked_nll"):
        return f"this Trainer trains by loss_type={loss_type}"
    if args.label_smoothing_factor:
        return f"this Trainer trains by label_smoothing_factor={args.label_smoothing_factor}"
    return None if _by_tokens(batch) else "the collator gives no labels [B, T]"


def _batches(
    step: int | str, config: ISTConfig, args: TrainingArguments, loader: DataLoader, by_trainer: bool
) -> Iterator[dict[str, Any]]:
    """This rank's share of the probe rows of `step`, or those of "calibration", collated as for training.

    by_trainer: as TrainerLoss takes them, and of each batch as many rows on every rank: the losses of TRL's trainers
    gather their metrics over ranks.
    """
    size, rank, world_size = args.per_device_train_batch_size, args.process_index, args.world_size
    count = config.probe_rows(size * args.gradient_accumulation_steps * world_size)
    if step == "calibration":
        count, by_trainer = config.semantic_rows, False
    if by_trainer:
        count = -(-count // world_size) * world_size
        size = 1 if config.score_rule == "expected" else size  # standard errors are by the spread over batches
    indices = probe_rows(len(loader.dataset), count, config.seed, step)
    indices = indices[: len(indices) // world_size * world_size] if by_trainer else indices
    for start in range(0, len(indices), size * world_size):
        together = indices[start : start + size * world_size]
        share = -(-len(together) // world_size)
        if rows := [loader.dataset[i] for i in together[rank * share : (rank + 1) * share]]:
            batch = loader.collate_fn(rows)
            if by_trainer:
                yield {"inputs": batch, "rows": len(rows)}
            else:
                yield {key: value.to(args.device) for key, value in batch.items() if isinstance(value, Tensor)}
