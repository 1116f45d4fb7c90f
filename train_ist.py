"""Fine-tune a causal language model with Importance-aware Sparse Tuning, under Accelerate.

    accelerate launch --config_file accelerate_configs/single.yaml train_ist.py --config launch/recipes/demo.yaml
    python train_ist.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file rows.json --report_to none
    python train_ist.py --help

Arguments are `--key value`; a recipe (`--config`, YAML) comes first, flags override it. Exit codes: 0 done, 2 bad
input, 3 stopped by a signal after saving (run again with --resume_from_checkpoint auto), 1 anything else.
"""

import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from ist.training.command_line import quiet_known_warnings

quiet_known_warnings()

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from peft import AdaLoraConfig, PeftConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import get_scheduler

from ist.adapters.adalora import AdaLoraAllocation
from ist.config import ISTConfig, UsageError, require
from ist.distributed import (
    GradientReducer,
    StopAgreement,
    all_finite,
    full_tensor,
    reduce_sum,
    require_launcher,
    require_topology,
)
from ist.layers import adapter_state
from ist.loss import token_loss_sum
from ist.sampler import seeded_generator
from ist.selection import StepwiseUnmasking, make_rule
from ist.suppression import evaluation_mode
from ist.training import checkpoint as ckpt
from ist.training.command_line import brief, parse_arguments, run_command
from ist.training.data import IGNORE, Data, GlobalBatches, micro_batches, predicted_tokens, prepare_data, probe_rows
from ist.training.model import as_json, load_model, make_optimizer, make_peft_config, plan_layers, require_fitting
from ist.training.plan import plan_run
from ist.training.record import (
    METRICS,
    RunRecord,
    differing_keys,
    environment,
    is_finished_run,
    peak_memory_bytes,
    read_lines,
    require_tracker,
    require_writable,
)
from ist.training.resting_state import RestingState
from ist.tuner import SparseTuner

# ---------------------------------------------------------------------------------------------------------- arguments


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "A model on the Hub or in a folder."})
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Of the base weights; adapters are float32.")
    attn_implementation: str = option("sdpa", "sdpa, eager or flash_attention_2.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    load_in_4bit: bool = option(False, "QLoRA: base weights as 4-bit NF4 (bitsandbytes), computed in --dtype.")


@dataclass
class DataArguments:
    _argument_group_name = "data"

    train_file: list[str] | None = option(None, "JSON, JSONL or Parquet file(s) with instruction, output or messages.")
    dataset_name: str | None = option(None, "Instead: a dataset on the Hub or on disk (its train split).")
    validation_file: list[str] | None = option(None, "Rows to measure validation loss on.")
    validation_size: float = option(
        0, "Instead: take this share (below 1) or number of training rows; the same rows whatever the seed."
    )
    max_length: int = option(256, "Tokens of a row; what is longer is cut.")
    prompt_template: Literal["alpaca", "llm_adapters", "chat", "none"] = option(
        "alpaca", "llm_adapters: the paper's, to the byte; chat: the tokenizer's; none: instruction + input + output."
    )
    completion_only_loss: bool = option(False, "Loss on the answer (all assistant turns) only.")
    packing: bool = option(False, "Rows of a micro-batch end to end instead of padded, each attending to itself alone.")

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            raise UsageError("give --train_file FILE or --dataset_name NAME, and not both.")
        if self.validation_file and self.validation_size:
            raise UsageError("give --validation_file or --validation_size, not both.")
        size = self.validation_size
        whole = 0 <= size < math.inf and (size < 1 or size == int(size))
        require(whole, "validation_size", "a fraction below 1 or a number of rows", size)
        require(self.max_length >= 2, "max_length", "2 or more tokens", self.max_length)


@dataclass
class AdapterArguments:
    _argument_group_name = "adapter"

    peft_method: Literal["lora", "series", "parallel", "none"] = option(
        "lora",
        "LoRA, or a bottleneck adapter after (series) or beside (parallel) each target; none trains the model's own "
        "weights.",
    )
    lora_r: int = option(32, "Rank.")
    lora_alpha: int = option(64, "Scaling is lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.")
    target_modules: list[str] | None = option(
        None,
        "Names of the modules to adapt; default q, k, v, up, down or the architecture's equivalents (lora), "
        "up, down (series), up, gate (parallel).",
    )
    bottleneck_size: int = option(256, "Width of series and parallel adapters.")
    peft_config: str | None = option(
        None, "Instead of all other adapter keys: a JSON file, any PEFT configuration as adapter_config.json has it."
    )

    def __post_init__(self) -> None:
        if self.target_modules:
            self.target_modules = [name for part in self.target_modules for name in part.split(",") if name]
        require(self.lora_r >= 1, "lora_r", "1 or more", self.lora_r)
        require(self.lora_alpha >= 1, "lora_alpha", "1 or more", self.lora_alpha)
        require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)
        require(self.bottleneck_size >= 1, "bottleneck_size", "1 or more", self.bottleneck_size)


@dataclass
class TrainArguments:
    _argument_group_name = "training (names as in transformers.TrainingArguments)"

    per_device_train_batch_size: int = option(4, "Rows per micro-batch and process.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.")
    learning_rate: float = option(2e-4, "Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = option("linear", "Schedule after the warm-up.")
    warmup_steps: float = option(100, "Steps of linear warm-up; below 1, a share of all steps.")
    num_train_epochs: float = option(3.0, "Passes over the rows.")
    max_steps: int = option(-1, "Optimizer steps; overrides num_train_epochs when positive.")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = option(
        "adamw_torch", "8-bit: bitsandbytes'."
    )
    optimizer_state: Literal["keep", "drop", "offload"] = option(
        "keep",
        "Moments of resting layers: drop (zero when drawn again), or offload to the CPU (but for saves).",
    )
    weight_decay: float = option(0.0, "AdamW's.")
    max_grad_norm: float = option(1.0, "Clip the norm of the trained layers' gradient; 0: do not.")
    bf16: bool = option(False, "Mixed precision: autocast to bfloat16.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward (non-reentrant).")
    torch_compile: bool = option(False, "Compile each layer (not the whole model: its graph changes with the draw).")
    torch_compile_backend: str = option("inductor", "Of torch.compile.")

    def __post_init__(self) -> None:
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            require(getattr(self, key) >= 1, key, "1 or more", getattr(self, key))
        for key in ("learning_rate", "num_train_epochs"):
            require(0 < getattr(self, key) < math.inf, key, "a finite number above 0", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "max_grad_norm"):
            require(0 <= getattr(self, key) < math.inf, key, "a finite number, 0 or more", getattr(self, key))
        if self.optimizer_state == "offload" and self.optim.endswith("8bit"):
            raise UsageError(
                f"--optimizer_state offload cannot move the state of --optim {self.optim}: use adamw_torch."
            )
        if self.optimizer_state == "drop" and self.optim == "paged_adamw_8bit":
            raise UsageError(
                "--optimizer_state drop cannot free the pages of --optim paged_adamw_8bit: use adamw_8bit."
            )
        if self.torch_compile:
            backends = torch._dynamo.list_backends(exclude_tags=())
            known = self.torch_compile_backend in backends
            require(known, "torch_compile_backend", "one of " + ", ".join(backends), self.torch_compile_backend)
            if self.gradient_checkpointing:
                raise UsageError(
                    "--torch_compile true cannot be had with --gradient_checkpointing true: the recomputation inside a "
                    "compiled layer draws random numbers, which the compiler refuses. Leave one out."
                )
        if self.lr_scheduler_type == "polynomial":
            require(self.learning_rate > 1e-7, "learning_rate", "above 1e-7, where polynomial ends", self.learning_rate)
        require(self.max_steps >= 1 or self.max_steps == -1, "max_steps", "1 or more, or -1 (epochs)", self.max_steps)


@dataclass
class RunArguments:
    _argument_group_name = "run"

    output_dir: str | None = option(
        None, "Default runs/{run_name or recipe}-{WANDB_RUN_ID or start time}; {run_id} and {seed} are filled in."
    )
    logging_steps: int = option(10, "Steps between two lines of metrics.jsonl.")
    eval_steps: int | None = option(None, "Steps between two validations; first and last step are always validated.")
    save_steps: int | None = option(None, "Steps between two checkpoints.")
    save_total_limit: int | None = option(None, "Checkpoints to keep; the best one is kept besides.")
    load_best_model_at_end: bool = option(False, "adapter/ is the one of lowest validation loss, not the last.")
    resume_from_checkpoint: str = option("none", "none; auto: the newest whole checkpoint, else start; or a path.")
    report_to: Literal["wandb", "tensorboard", "none"] = option("wandb", "Tracker; the files are always written.")
    run_name: str | None = option(None, "Default: the recipe's name.")
    log_adapter: bool = option(False, "Give the finished adapter to W&B as an artifact.")
    plan: bool = option(False, "Predict the peak memory of each device, say whether it fits, and stop.")

    def __post_init__(self) -> None:
        if self.log_adapter and self.report_to != "wandb":
            raise UsageError(f"--log_adapter true needs --report_to wandb; got {self.report_to}.")
        for key in ("logging_steps", "eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, "1 or more", value)


ARGUMENTS = (ModelArguments, DataArguments, AdapterArguments, ISTConfig, TrainArguments, RunArguments)


def resolve_output_dir(args: Namespace, recipe: str | None) -> None:
    if args.resume_from_checkpoint == "auto" and not args.output_dir and "WANDB_RUN_ID" not in os.environ:
        raise UsageError("--resume_from_checkpoint auto needs --output_dir: the default folder is a new one each time.")
    args.run_name = args.run_name or (Path(recipe).stem if recipe else "ist")
    started = broadcast_object_list([time.strftime("%Y%m%d-%H%M%S")])[0]
    run_id = os.environ.get("WANDB_RUN_ID", started)
    template = args.output_dir or f"runs/{args.run_name}-{{run_id}}"
    args.output_dir = template.replace("{run_id}", run_id).replace("{seed}", str(args.seed))


def keep_global_batch(args: Namespace, round_size: int, batch_size: int) -> None:
    """Set gradient_accumulation_steps so that a resumed run goes on with its global batches on these processes.

    Raises:
        UsageError: `round_size`, the rows of one micro-batch on all processes, does not divide `batch_size`.
    """
    if batch_size % round_size:
        raise UsageError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size} cannot make up the run's global batch "
            f"of {batch_size} rows, {round_size} rows at a time. Choose another size or number of processes."
        )
    args.gradient_accumulation_steps = batch_size // round_size


def require_consistent(args: Namespace) -> None:
    """What no single argument can tell of itself."""
    has_validation = bool(args.validation_file or args.validation_size)
    for key in ("load_best_model_at_end", "eval_steps"):
        if getattr(args, key) and not has_validation:
            raise UsageError(f"--{key} needs --validation_file or --validation_size.")
    if args.load_best_model_at_end and not args.eval_steps:
        raise UsageError("--load_best_model_at_end needs --eval_steps.")
    if args.selection == "id3" and args.optim != "adamw_torch":
        raise UsageError(f"--optim {args.optim} keeps moments of masked weights too: use adamw_torch with id3.")


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; the loop looks at it between steps. A second Ctrl-C stops at once.

    Slurm sends a signal to all processes of a job step. The launcher must outlive it, so it has them blocked, and so
    have its workers (launch/block_signals.py): one that came early is received here.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------ the job


def main(argv: Sequence[str]) -> int:
    others = [key.name for key in fields(AdapterArguments) if key.name != "peft_config"]
    *parsed, recipe = parse_arguments(ARGUMENTS, argv, __doc__.split("\n")[0], alone=("peft_config", others))
    ist_config = next(group for group in parsed if isinstance(group, ISTConfig))
    args = Namespace(**{key: value for group in parsed for key, value in asdict(group).items()})
    require_consistent(args)
    if not args.plan:
        require_tracker(args.report_to)

    require_launcher()
    # An explicit precision: a launcher's own setting must not decide what is computed.
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "no",
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=".",  # trackers ask for one now; RunRecord.start_trackers names the run's own
    )
    accelerator.gradient_accumulation_steps = 1  # accumulation is ours: it knows the tokens of the whole batch
    require_topology(accelerator, args.optim)

    # Layers, from the model's configuration; then the run folder: this run's own, or free.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and args.torch_compile:
        raise UsageError(
            "--torch_compile true is for one process and DDP: leave it out, or use accelerate_configs/ddp.yaml."
        )
    layers, model_config, vocabulary = plan_layers(args, sharded)
    rule = make_rule(layers.n_layers, ist_config)
    resolve_output_dir(args, recipe)
    output_dir = Path(args.output_dir)
    checkpoint = ckpt.find_checkpoint(output_dir, args.resume_from_checkpoint)
    round_size = args.per_device_train_batch_size * accelerator.num_processes
    if checkpoint:
        keep_global_batch(args, round_size, checkpoint[1]["configuration"]["global_batch_size"])
    batch_size = round_size * args.gradient_accumulation_steps
    args.probe_max_length = ist_config.probe_tokens(batch_size, args.max_length)
    args.probe_batch_size = ist_config.probe_rows(batch_size)
    configuration = {**vars(args), "global_batch_size": batch_size}
    if not args.plan and is_finished_run(output_dir, configuration, resume=args.resume_from_checkpoint != "none"):
        accelerator.print(f"{output_dir} holds this run, finished; nothing to do.")
        return 0

    # Data, before any weight is loaded.
    data = None
    with accelerator.main_process_first():
        try:
            data = prepare_data(args)
        except UsageError as error:  # raised below: a rank that left now would leave the others at a barrier
            unusable = error
    if data is None:
        raise unusable
    require_fitting(data, model_config, vocabulary)
    max_steps = args.max_steps
    if max_steps == -1:
        max_steps = math.ceil(args.num_train_epochs * len(data.rows) / batch_size)
    if isinstance(rule, StepwiseUnmasking) and layers.n_scalars:
        rule.schedule(layers.n_scalars, max_steps)
    peft_config = make_peft_config(args, max_steps)
    if args.plan:
        if accelerator.is_main_process:
            print(plan_run(args, ist_config, peft_config, model_config, layers.n_layers, data, accelerator))
        return 0
    configuration |= {"train_rows": len(data.rows), "train_tokens": sum(map(len, data.rows["input_ids"]))}
    if args.peft_config:
        configuration["adapter"] = as_json(peft_config)
    if checkpoint and (differing := differing_keys(checkpoint[1]["configuration"], configuration)):
        raise UsageError(f"--resume_from_checkpoint {checkpoint[0]} is of another configuration: {differing}.")

    # From here on the run has a record, whatever becomes of it; no rank may still be looking whether there is one.
    require_writable(output_dir)
    accelerator.wait_for_everyone()
    record = RunRecord(
        output_dir,
        accelerator,
        configuration,
        **environment(accelerator),
        **{"steps": checkpoint[1]["step"] if checkpoint else 0, "max_steps": max_steps},
        **{"layers": layers.names, "layer_counts": rule.counts._asdict()},
        **{"dropped_rows": data.dropped, "resumed_from": str(checkpoint[0]) if checkpoint else None},
        trained_counts=checkpoint[1]["tuner"]["trained_counts"] if checkpoint else [0] * layers.n_layers,
    )
    stop = StopRequest()
    try:
        return train(args, ist_config, accelerator, data, peft_config, max_steps, checkpoint, record, stop)
    except FloatingPointError as error:
        record.close("failed", error=str(error), diverged=True)
        accelerator.print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        record.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=brief(error))
        raise
    finally:
        accelerator.end_training()
        stop.restore()  # last: a second signal must not cut short what is still written


def train(
    args: Namespace,
    ist_config: ISTConfig,
    accelerator: Accelerator,
    data: Data,
    peft_config: PeftConfig | None,
    max_steps: int,
    checkpoint: tuple[Path, dict] | None,
    record: RunRecord,
    stop: StopRequest,
) -> int:
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    output_dir, rows, micro_size = Path(args.output_dir), data.rows, args.per_device_train_batch_size
    batch_size, seed = record.summary["configuration"]["global_batch_size"], args.seed
    checkpoints = output_dir / "checkpoints"

    # Model -> adapter -> optimizer over all that ever trains -> prepare -> tuner, which freezes. In this order: a
    # layer that is frozen when the optimizer is made would never move, and sharding replaces the parameters.
    model = load_model(args, peft_config, device)
    optimizer = make_optimizer(args, [p for p in model.parameters() if p.requires_grad])
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:  # in evaluation mode Accelerate leaves out DistributedDataParallel: GradientReducer stands in for it
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer)
    peft_model = accelerator.unwrap_model(model)
    # Without Accelerate's own wrapper, which makes float32 of all logits: autocast stands around the forwards instead.
    if vars(peft_model).pop("_original_forward", None) is not None:
        del peft_model.forward
    if sharded and not all(isinstance(parameter, DTensor) for parameter in peft_model.parameters()):
        raise RuntimeError("FSDP is on, but not every parameter of the model is sharded")
    # By name now: after a forward without gradients FSDP has other objects in the place of some of them.
    trained_names = {n: p for n, p in peft_model.named_parameters(remove_duplicate=False) if p.requires_grad}
    parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    allocation = AdaLoraAllocation(peft_model) if isinstance(peft_config, AdaLoraConfig) else None
    if allocation and peft_config.total_step != max_steps:
        accelerator.print(f"AdaLoRA's schedule has {peft_config.total_step} steps (total_step), the run {max_steps}.")
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer.optimizer, warmup, max_steps)

    def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def batches_of(
        dataset: Dataset, indices: Sequence[int], tokens: int | None = None, packing: bool = args.packing
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's share of `indices`, in micro-batches on its device; of each row the last `tokens`."""
        return map(
            on_device,
            micro_batches(dataset, indices, micro_size, rank, world_size, data.pad_token_id, tokens, packing),
        )

    def loss_over(dataset: Dataset, indices: Sequence[int], *options) -> Tensor:
        """[2] float64: (sum of token losses, predicted tokens) over this rank's share of `indices`."""
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches_of(dataset, indices, *options):
            with accelerator.autocast():
                total[0] += token_loss_sum(model, batch)
            total[1] += (batch["labels"][:, 1:] != IGNORE).sum()
        return total

    def probe_indices(step: int | str) -> list[int]:
        count = ist_config.semantic_rows if step == "calibration" else args.probe_batch_size
        return probe_rows(len(rows), count, seed, step)

    def probe_batches(step: int | str) -> Iterator[dict[str, Tensor]]:
        return batches_of(rows, probe_indices(step), None if step == "calibration" else args.probe_max_length)

    tuner = SparseTuner(
        peft_model,
        ist_config,
        lambda step: loss_over(rows, probe_indices(step), args.probe_max_length),
        probe_batches,
    )
    unmasking = tuner.rule if isinstance(tuner.rule, StepwiseUnmasking) else None
    if unmasking:
        unmasking.attach(parameters, optimizer.optimizer, max_steps)
    resting_state = RestingState(optimizer.optimizer, tuner.layers, args.optimizer_state)
    if args.torch_compile:
        for block in tuner.layers.blocks:
            # Dynamic: rows differ in length, and each new length would be another graph.
            block.compile(backend=args.torch_compile_backend, dynamic=True)

    def whole_adapter() -> dict[str, Tensor]:
        """All that makes up the adapter, what trains and what does not, by name; without one, what trains."""
        return adapter_state(peft_model) | trained_names

    # Resume.
    finished, tokens, best, validation_loss = 0, 0, None, None
    if checkpoint:
        path, state = checkpoint
        tensors = ckpt.load_adapter(path, whole_adapter())
        if allocation:
            allocation.load(tensors, state["allocation"])
        ckpt.load_optimizer(path, state["optimizer"], optimizer.optimizer, parameters)
        scheduler.load_state_dict(state["scheduler"])
        for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        tuner.load_state_dict(state["tuner"])
        finished, tokens, best, validation_loss = (state[k] for k in ("step", "tokens", "best", "validation_loss"))
        if best and not (checkpoints / ckpt.step_name(best["step"])).exists():
            accelerator.print(f"The best checkpoint so far, of step {best['step']}, is gone; looking for a new best.")
            best = None
    if accelerator.is_main_process:
        ckpt.sweep(output_dir)
        for later in (step for step in ckpt.checkpoint_steps(output_dir) if step > finished):
            ckpt.discard(checkpoints / ckpt.step_name(later), output_dir)
    record.rewind(finished)
    accelerator.wait_for_everyone()
    record.start_trackers(args.run_name)

    if sharded:
        # FSDP fixes each group's reduce dtypes at its first forward, from what is trainable then: it must see all.
        with evaluation_mode(peft_model):
            loss_over(rows, [0])
    # Proven when the run began: what is trained since rounds further apart in bfloat16, and no longer tells a leak.
    if args.packing and not checkpoint:
        with evaluation_mode(peft_model):
            some = range(min(len(rows), batch_size))
            packed, apart = (reduce_sum(loss_over(rows, some, None, packing)) for packing in (True, False))
        if not torch.allclose(packed, apart, rtol=5e-3 if args.bf16 or args.dtype == "bfloat16" else 1e-4):
            raise UsageError(
                f"--packing true gives this model another loss ({packed[0] / packed[1]:.5f}, rows apart "
                f"{apart[0] / apart[1]:.5f}): its attention, or its state, goes across rows. Leave it out."
            )
    with accelerator.autocast():
        semantic = tuner.prepare()
    if semantic:
        record.semantic(semantic, tuner.rule.counts)

    n_layers, n_trained, _ = tuner.rule.counts
    accelerator.print(
        f"{args.model_name_or_path}: {n_layers} layers, {n_trained} trained per step (selection {args.selection}), "
        f"{sum(p.numel() for p in parameters.values()):,} {'adapter' if peft_config else 'trainable'} parameters, "
        f"on {device.type}, {args.attn_implementation} attention\n"
        f"{len(rows)} training rows ({data.dropped} dropped: nothing of their answer within --max_length), "
        f"{len(data.validation or ())} validation rows; steps {finished} to {max_steps} of {batch_size} rows\n"
        f"run folder: {output_dir}"
    )
    if device.type == "cpu" and torch.get_num_threads() * world_size < (os.cpu_count() or 1):
        accelerator.print(f"using {torch.get_num_threads()} of {os.cpu_count()} CPU cores; OMP_NUM_THREADS sets it")
    if semantic:
        accelerator.print(
            f"Layers up to {semantic['boundary']} are frozen for good; gains are {min(semantic['gains']):.3f} to "
            f"{max(semantic['gains']):.3f}, that of the boundary "
            + (f"{semantic['gains'][semantic['boundary']]:.3f}" if semantic["boundary"] >= 0 else "none: no layer is")
        )
    if unmasking:
        accelerator.print(
            f"id3: {unmasking.budget:,} of {unmasking.candidates:,} scalars are unmasked over {unmasking.steps} steps, "
            f"{unmasking.unmasked:,} so far"
        )
    elif tuner.layers.outside:
        names = ", ".join(tuner.layers.outside[:5]) + (", …" if len(tuner.layers.outside) > 5 else "")
        accelerator.print(f"In no layer, or shared by several, so trained at every step: {names}")
        if args.selection in ("last", "semantic", "semantic+ist"):
            accelerator.print("What these need of the layers below the trained ones is kept for the backward as well.")
    if warmup >= max_steps:
        accelerator.print(f"All {max_steps} steps are within the warm-up of {warmup}; --warmup_steps sets it.")

    quiet = not (accelerator.is_main_process and sys.stderr.isatty())
    progress = tqdm(total=max_steps, initial=finished, unit="step", disable=quiet)
    say = accelerator.print if quiet else progress.write

    def last_good_checkpoint() -> str:
        steps = ckpt.checkpoint_steps(output_dir)
        return f"last good checkpoint: {checkpoints / ckpt.step_name(max(steps)) if steps else 'none'}"

    def require_finite_adapter() -> None:
        if not all_finite(parameters.values(), device):
            raise FloatingPointError(f"a trained weight is not finite after step {finished}; {last_good_checkpoint()}")

    def validate() -> float:
        with evaluation_mode(peft_model):
            loss_sum, count = reduce_sum(loss_over(data.validation, range(len(data.validation))))
        loss = (loss_sum / count).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss {loss} at step {finished}; {last_good_checkpoint()}")
        record.validation({"step": finished, "epoch": finished * batch_size / len(rows), "validation_loss": loss})
        say(f"step {finished}/{max_steps}  validation loss {loss:.4f}")
        return loss

    def reduce_and_check() -> None:
        """Make the step's loss and gradient norm numbers, the same on every rank; waits for the device."""
        nonlocal loss, grad_norm
        if isinstance(loss, Tensor):
            loss, grad_norm = reduce_sum(loss.double()).item(), full_tensor(grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"loss {loss}, grad_norm {grad_norm} at step {finished}; {last_good_checkpoint()}")

    def save() -> None:
        reduce_and_check()
        require_finite_adapter()
        resting_state.restore()
        state = {
            "configuration": record.summary["configuration"],
            "scheduler": scheduler.state_dict(),
            "tuner": tuner.state_dict(),
            "data": {"next_global_batch": finished},
            "rng": {"reseeded_by": ["seed", "step", "rank"], "seed": seed, "step": finished},
            **{"tokens": tokens, "best": best, "validation_loss": validation_loss},
            "allocation": allocation.state_dict() if allocation else None,
        }
        write = accelerator.is_main_process
        tensors = whole_adapter() | (allocation.tensors() if allocation else {})
        ckpt.save_checkpoint(output_dir, finished, tensors, parameters, optimizer.optimizer, state, write)
        resting_state.switch(tuner.trained)
        if write:
            keep = best["step"] if best and args.load_best_model_at_end else None
            ckpt.prune_checkpoints(output_dir, args.save_total_limit, keep)

    if data.validation and finished == 0:
        validation_loss = validate()
    lengths = [len(ids) for ids in rows["input_ids"]]
    predicted = [predicted_tokens(labels) for labels in rows["labels"]]
    stream = GlobalBatches(len(rows), batch_size, seed)
    loss = grad_norm = 0.0
    run_seconds = window_seconds = 0.0
    window_steps = window_tokens = 0
    saved = finished
    reducer = GradientReducer(() if sharded else parameters.values())
    stop_agreed = StopAgreement()
    while finished < max_steps and not stop_agreed(stop.signal is not None):
        start = time.perf_counter()
        step = finished
        with accelerator.autocast():
            update = tuner.begin_step(step)
        resting_state.switch(tuner.trained)
        if update:
            elapsed = run_seconds + time.perf_counter() - start
            record.importance(update, tuner.trained_counts, tuner.probe_seconds / elapsed)
        torch.manual_seed(seeded_generator(seed, step, rank, "dropout").initial_seed())

        # Every rank knows the whole global batch, so it can divide by the batch's predicted tokens without asking.
        indices = stream.rows(step)
        divisor = sum(predicted[i] for i in indices)
        batches = list(batches_of(rows, indices))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            if last and not sharded:
                reducer.begin(tuner.trained_buckets())
            with nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    micro_loss = token_loss_sum(model, batch) / divisor
                accelerator.backward(micro_loss * (world_size if sharded else 1))  # FSDP takes the mean over ranks
            loss += micro_loss.detach()
        reducer.finish()
        if allocation:
            allocation.add_regularization()
        if unmasking:
            unmasked = unmasking.unmask(step)
        grad_norm = accelerator.clip_grad_norm_(tuner.trained_parameters(), args.max_grad_norm or math.inf)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        finished += 1
        if allocation:
            allocation.step(finished)
        optimizer.zero_grad(set_to_none=True)

        progress.update()
        window_steps += 1
        window_tokens += sum(lengths[i] for i in indices)
        tokens += sum(lengths[i] for i in indices)
        logged = finished % args.logging_steps == 0 or finished == max_steps
        if logged:
            reduce_and_check()
        window_seconds += time.perf_counter() - start
        run_seconds += time.perf_counter() - start
        record.summary.update(steps=finished, trained_counts=tuner.trained_counts)
        if logged:
            step_seconds = window_seconds / window_steps
            record.metrics(
                {
                    "step": finished,
                    "epoch": finished * batch_size / len(rows),
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "tokens": tokens,
                    "trained_layers": tuner.trained,
                    **({"unmasked_scalars": unmasked} if unmasking else {}),
                    "step_seconds": step_seconds,
                    "tokens_per_second": window_tokens / window_seconds,
                    "peak_memory_bytes": peak_memory_bytes(device),
                }
            )
            say(f"step {finished}/{max_steps}  loss {loss:.4f}  lr {learning_rate:.2e}  {step_seconds:.2f} s/step")
            window_seconds, window_steps, window_tokens = 0.0, 0, 0

        improved = False
        if data.validation and (finished == max_steps or (args.eval_steps and finished % args.eval_steps == 0)):
            validation_loss = validate()
            improved = args.load_best_model_at_end and (best is None or validation_loss < best["validation_loss"])
            if improved:
                best = {"step": finished, "validation_loss": validation_loss}
        if improved or (args.save_steps and finished % args.save_steps == 0):
            save()
            saved = finished
    progress.close()
    stop_agreed.close()

    facts = {"steps": finished, "trained_counts": tuner.trained_counts, "best": best}
    if unmasking:
        facts["id3"] = unmasking.summary(tuner.layers.parameters)
    require_finite_adapter()
    if finished < max_steps:
        if saved != finished:
            save()
        record.close("interrupted", **facts, signal=stop.signal.name if stop.signal else None)
        by = stop.signal.name if stop.signal else "a signal to another rank"
        say(
            f"stopped by {by} after step {finished}; go on with --output_dir {output_dir} --resume_from_checkpoint auto"
        )
        accelerator.wait_for_everyone()  # the launcher ends all ranks as soon as one has left with a code other than 0
        return 3
    if best:
        accelerator.wait_for_everyone()  # until the main process has written it
        tensors = ckpt.load_adapter(checkpoints / ckpt.step_name(best["step"]), whole_adapter())
        if allocation:
            allocation.load(tensors, ckpt.read_state(checkpoints / ckpt.step_name(best["step"]))["allocation"])
    if allocation:
        allocation.keep_what_trained()
    if peft_config:
        result = ckpt.save_adapter(peft_model, whole_adapter(), args, record.summary, accelerator.is_main_process)
    else:
        result = ckpt.save_model(peft_model, args, record.summary, accelerator.is_main_process)
    if args.log_adapter:
        record.artifact(result)
    losses = [line["loss"] for line in read_lines(output_dir / METRICS) if "loss" in line]
    final = {"final_train_loss": losses[-1] if losses else None, "final_validation_loss": validation_loss}
    record.close("finished", **facts, **final)
    say(f"finished {max_steps} steps; the result is in {result}")
    return 0


if __name__ == "__main__":
    run_command(main)
