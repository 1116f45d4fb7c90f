"""Values that a run gives its arguments: its name and folder, its global batch, the rows of a probe."""

import os
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

from ist.config import ISTConfig
from ist.training.arguments import Resolved
from ist.training.command_line import UsageError


def resolve_output_dir(args: Resolved, recipe: str | None) -> Resolved:
    """Name the run and its folder.

    Raises:
        UsageError: resume_from_checkpoint auto, and nothing names the folder.
    """
    if args.resume_from_checkpoint == "auto" and not args.output_dir and "WANDB_RUN_ID" not in os.environ:
        raise UsageError("--resume_from_checkpoint auto needs --output_dir: the default folder is a new one each time.")
    named = None if args.output_dir else args.run_name  # with an output_dir it is the tracker's name alone
    for key, value in (("--run_name", named), ("WANDB_RUN_ID", os.environ.get("WANDB_RUN_ID"))):
        if value is not None and (value in ("", ".", "..") or set(value) & set("/\\\0\n")):
            raise UsageError(f"{key} is a part of the run folder's name and must not hold a path; got {value!r}.")
    run_name = args.run_name or (Path(recipe).stem if recipe else "ist")
    started = broadcast_object_list([time.strftime("%Y%m%d-%H%M%S")])[0]
    run_id = os.environ.get("WANDB_RUN_ID", started)
    template = args.output_dir or f"runs/{run_name}-{{run_id}}"
    output_dir = template.replace("{run_id}", run_id).replace("{seed}", str(args.seed))
    return Resolved.of(args, run_name=run_name, output_dir=output_dir)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is `most` or less."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def resolve_batches(args: Resolved, config: ISTConfig, processes: int, resumed_batch_size: int | None) -> Resolved:
    """Set the global batch, and the rows of a probe and of a validation's micro-batch; a resumed run keeps its global
    batch by accumulating otherwise.

    Raises:
        UsageError: the rows of one micro-batch on all processes do not divide the global batch that is given, or that
            of the run to resume.
    """
    round_size = args.per_device_train_batch_size * processes
    batch_size = args.global_batch_size or resumed_batch_size or round_size * (args.gradient_accumulation_steps or 1)
    if batch_size % round_size:
        given = "--global_batch_size" if args.global_batch_size else "the global batch of the run to resume"
        share = batch_size // processes if batch_size % processes == 0 else 0
        if share:
            remedy = f"Choose --per_device_train_batch_size {_divisor(share, args.per_device_train_batch_size)}."
        else:
            remedy = "Choose another number of processes."
        raise UsageError(
            f"{given} {batch_size} is not whole micro-batches: --per_device_train_batch_size "
            f"{args.per_device_train_batch_size} on {processes} process{'es' * (processes > 1)} are {round_size} rows. "
            f"{remedy}"
        )
    return Resolved.of(
        args,
        per_device_eval_batch_size=args.per_device_eval_batch_size or args.per_device_train_batch_size,
        gradient_accumulation_steps=batch_size // round_size,
        global_batch_size=batch_size,
        probe_batch_size=config.probe_rows(batch_size),
        probe_max_length=config.probe_tokens(batch_size, args.max_length),
    )
