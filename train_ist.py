"""Fine-tune a causal language model with Importance-aware Sparse Tuning, under Accelerate.

    accelerate launch --config_file accelerate_configs/single.yaml train_ist.py --config launch/recipes/demo.yaml
    python train_ist.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file rows.json --report_to none
    python train_ist.py --help

Arguments are `--key value`; a recipe (`--config`, YAML) comes first, flags override it. Exit codes: 0 done, 2 bad
input, 3 stopped by a signal after saving (run again with --resume_from_checkpoint auto), 1 anything else.
"""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ist.training.arguments import looks_only, parse_training_arguments, read_arguments
from ist.training.command_line import check_command_line, quiet_known_warnings
from ist.training.packages import require_packages

quiet_known_warnings()
if __name__ == "__main__":  # --help, and bad arguments: before the imports below, which take seconds
    check_command_line(partial(read_arguments, description=__doc__.split("\n")[0]))
    require_packages()

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from ist.config import ConfigError, ISTConfig
from ist.distributed import StopAgreement, from_main, in_turns, reduce_in_float32, require_launcher, require_topology
from ist.selection import SelectionRule, StepwiseUnmasking, make_rule
from ist.selection.keys import CONTROLS
from ist.training.checkpoint import find_checkpoint, last_checkpoint
from ist.training.checkpoints import Checkpoints, Progress, WholeAdapter
from ist.training.command_line import (
    UsageError,
    as_usage_error,
    brief,
    command,
    print_error,
    print_traceback,
    run_command,
)
from ist.training.continuing import adapter_folder, base_notes, earlier_scores, require_schedule
from ist.training.data import content_digests, prepare_data, shown_rows
from ist.training.environment import environment, nodes_of, require_optimizer, require_replicas
from ist.training.export import save_adapter, save_model
from ist.training.extensions import make_extensions
from ist.training.files import WriteError, json_digest
from ist.training.folder import held_folder
from ist.training.hub import push, require_hub
from ist.training.job import Job
from ist.training.model import ModelPlan, plan_layers, require_fitting
from ist.training.monitor import Monitor
from ist.training.objective import Objective
from ist.training.observer import Observer, StepClock
from ist.training.peft_config import as_json, config_key, make_peft_config
from ist.training.plan import plan_run
from ist.training.prepare import make_scheduler, prepare, require_schedule_of_rates
from ist.training.record import (
    RunRecord,
    differing_keys,
    is_finished_run,
    require_writable,
    total_steps,
)
from ist.training.resolving import resolve_batches, resolve_output_dir
from ist.training.signals import StopRequest
from ist.training.trackers import require_trackers
from ist.tuner import SparseTuner

# ------------------------------------------------------------------------------------------------------ checked first


@command
def main(argv: Sequence[str], observer: Observer | None = None) -> int:
    args, config, recipe = parse_training_arguments(argv, __doc__.split("\n")[0])
    if not looks_only(args):
        require_trackers(args.report_to)
    require_launcher()
    # An explicit precision: a launcher's own setting must not decide it.
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "no",
        project_dir=".",  # trackers ask for one now; RunRecord.open names the run's own
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
    )
    accelerator.gradient_accumulation_steps = 1  # accumulation is ours: it knows the tokens of the whole batch
    require_topology(accelerator)
    require_replicas(accelerator)
    require_optimizer(args.optim, accelerator, trains=not looks_only(args))
    if args.push_to_hub and not looks_only(args):
        from_main(lambda: require_hub(args), UsageError)
    if args.adapter_name_or_path:
        in_turns(lambda: adapter_folder(args.adapter_name_or_path))  # one rank fetches it, the others find it
    reduce_in_float32(accelerator)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and args.torch_compile:
        raise UsageError(
            "--torch_compile true is for one process and DDP: leave it out, or use accelerate_configs/ddp.yaml."
        )

    # Layers, from the model's configuration; then the run folder: this run's own, or free.
    planned = plan_layers(args, sharded)
    rule = make_rule(planned.layers.n_layers, config)
    planned = planned._replace(args=resolve_output_dir(planned.args, recipe))
    with nullcontext() if looks_only(args) else held_folder(Path(planned.args.output_dir)):
        return start(planned, config, rule, accelerator, observer or Observer())


def start(
    planned: ModelPlan, config: ISTConfig, rule: SelectionRule, accelerator: Accelerator, observer: Observer
) -> int:
    """Look into the run folder, read the data, and run what is to be run."""
    output_dir, resume = Path(planned.args.output_dir), planned.args.resume_from_checkpoint
    checkpoint = find_checkpoint(output_dir, resume)
    resumed_batch_size = checkpoint[1]["configuration"]["global_batch_size"] if checkpoint else None
    args = resolve_batches(planned.args, config, accelerator.num_processes, resumed_batch_size)
    configuration = asdict(args)
    look = partial(is_finished_run, output_dir, configuration, resume != "none", checkpoint is not None)
    if not looks_only(args):
        from_main(look, UsageError)

    # Data, before any weight is loaded.
    data = in_turns(lambda: prepare_data(args))
    if args.show_rows:
        accelerator.print(shown_rows(args, data))
        return 0
    require_fitting(data, planned.config, planned.vocabulary)
    configuration |= {"train_rows": len(data.rows), "train_tokens": sum(map(len, data.rows["input_ids"]))}
    max_steps = total_steps(configuration)
    require_schedule_of_rates(args, max_steps)
    if isinstance(rule, StepwiseUnmasking) and planned.layers.n_scalars:
        rule.schedule(planned.layers.n_scalars, max_steps)
    peft_config = make_peft_config(args, max_steps)
    if args.plan:
        if accelerator.is_main_process:
            print(plan_run(planned, args, config, peft_config, data, accelerator))
        return 0
    if config_key(args):
        configuration["adapter"] = as_json(peft_config)
        data = data._replace(notes=(*data.notes, *base_notes(args)))
    configuration |= from_main(lambda: content_digests(args, data), UsageError)
    scores = None
    if args.keep_importance:
        adapter, layers = adapter_folder(args.adapter_name_or_path), planned.layers.names
        scores = from_main(lambda: earlier_scores(adapter, config, layers), UsageError)
        configuration["importance_digest"] = json_digest(scores)
    if from_main(look, UsageError):  # again, as the content of rows and weights is known now
        accelerator.print(f"{output_dir} holds this run, finished; nothing to do.")
        if args.push_to_hub and accelerator.is_main_process:
            push(output_dir, args)
        return 0
    if checkpoint and (differing := differing_keys(checkpoint[1]["configuration"], configuration, longer=True)):
        raise UsageError(f"--resume_from_checkpoint {checkpoint[0]} is of another configuration: {differing}.")
    if checkpoint:
        require_schedule(args, peft_config, total_steps(checkpoint[1]["configuration"]), max_steps)
    if checkpoint and checkpoint[1]["step"] > max_steps:
        steps = f"step {checkpoint[1]['step']}, past the run's {max_steps}"
        raise UsageError(f"--resume_from_checkpoint {checkpoint[0]} is of {steps}. Choose an earlier one.")
    from_main(lambda: require_writable(output_dir), UsageError)
    here = environment(accelerator)
    facts = {
        **{**here, "nodes": nodes_of(here)},
        **({"control": CONTROLS[args.selection]} if args.selection in CONTROLS else {}),
        **{"steps": checkpoint[1]["step"] if checkpoint else 0, "max_steps": max_steps},
        **{"layers": planned.layers.names, "layer_counts": rule.counts._asdict()},
        **{**data.facts, "resumed_from": str(checkpoint[0]) if checkpoint else None},
        "trained_counts": checkpoint[1]["tuner"]["trained_counts"] if checkpoint else [0] * planned.layers.n_layers,
    }
    job = Job(args, config, data, peft_config, max_steps, checkpoint, configuration, scores)
    return run(job, accelerator, facts, observer)


def run(job: Job, accelerator: Accelerator, facts: dict[str, Any], observer: Observer) -> int:
    """Train, and close the record, however it ends: from here on the run has one."""
    stop, record = StopRequest(), None
    try:
        record = RunRecord(job.output_dir, accelerator, job.configuration, **facts)
        return train(job, accelerator, record, stop, observer)
    except FloatingPointError as error:
        record.close("failed", error=str(error), diverged=True)
        accelerator.print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        if record:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            record.close(status, quiet=isinstance(error, WriteError), error=brief(error))
        if isinstance(error, ConfigError):
            error = as_usage_error(error)
        elif isinstance(error, WriteError):
            error = WriteError(f"{error}; {last_checkpoint(job.output_dir)}. Resume when it can be written again.")
        told = isinstance(error, (UsageError, WriteError))
        if accelerator.num_processes > 1:
            # The others may be waiting for this rank in a collective, and so would the end of the process group: say
            # what happened, and leave, so that the launcher ends them.
            print_error(error) if told else print_traceback(error)
            sys.stdout.flush()
            os._exit(2 if isinstance(error, UsageError) else 1)
        raise error
    finally:
        if record:
            record.trackers.finish()
        accelerator.end_training()
        stop.restore()  # last: a second signal must not interrupt the last writes


# ------------------------------------------------------------------------------------------------------------ the job


def train(job: Job, accelerator: Accelerator, record: RunRecord, stop: StopRequest, observer: Observer) -> int:
    args, max_steps = job.args, job.max_steps

    # ---- Set-up. Model -> adapter -> optimizer over all that ever trains -> prepare -> tuner, which freezes. In this
    # order: a layer that is frozen when the optimizer is made would never move, and sharding replaces the parameters.
    model, peft_model, optimizer = prepare(args, job.peft_config, accelerator)
    adapter = WholeAdapter(peft_model)
    scheduler = make_scheduler(args, optimizer.optimizer, max_steps)
    objective = Objective(accelerator, model, adapter.parameters.values(), job.data, args, job.config)
    tuner = SparseTuner(peft_model, job.config, objective.probe_batches)
    if job.scores:
        tuner.rule.load_state_dict({"scores": job.scores})
    extensions = make_extensions(job, tuner, adapter.parameters, optimizer.optimizer)
    if args.torch_compile:
        tuner.compile_layers(args.torch_compile_backend)
    checkpoints = Checkpoints(job, adapter, optimizer.optimizer, scheduler, tuner, extensions)
    monitor = Monitor(job, accelerator, objective, record, checkpoints, observer)
    observer.ready(tuner, optimizer.optimizer)

    # ---- Resume.
    progress = checkpoints.resume(job.checkpoint)
    record.open(progress.step, args.run_name)
    objective.first_forward(resumed=job.checkpoint is not None)
    with accelerator.autocast():
        semantic = tuner.prepare()
    monitor.begin(progress, semantic)

    # ---- The loop.
    stop_agreed, clock = StopAgreement(accelerator.device), StepClock()
    while progress.step < max_steps and not (  # the validation loss, so the early stop, is the same on all ranks
        progress.stops_early(args.early_stopping_patience) or stop_agreed(progress.step, stop.signal is not None)
    ):
        clock.start()
        step = progress.step
        # 1. Draw this step's layers, after the importance update where one is due.
        observer.before_step(step)
        with observer.part("bookkeeping"):
            with accelerator.autocast():
                update = tuner.begin_step(step)
            extensions.begin_step(tuner.trained)
            if update:
                record.importance(update, tuner.trained_counts, tuner.probe_seconds / clock.elapsed())
        # 2. Forward and backward over the micro-batches.
        objective.seed_dropout(step)
        batch = objective.global_batch(step)
        loss = torch.zeros((), device=accelerator.device)
        for i, micro_batch in enumerate(batch.micro_batches, 1):
            with observer.part("forward"):
                micro_loss = objective.forward(micro_batch, batch.predicted)
            with observer.part("backward"):
                objective.backward(micro_loss, i == len(batch.micro_batches), tuner.trained_buckets())
            loss += micro_loss.detach()
        # 3. Reduce: gradients are those of the global batch now.
        objective.reduce()
        # 4. Clip, step.
        with observer.part("optimizer"):
            values = {"learning_rate": scheduler.get_last_lr()[0], **extensions.after_backward(step)}
            grad_norm = accelerator.clip_grad_norm_(tuner.trained_parameters(), args.max_grad_norm or math.inf)
            optimizer.step()
            scheduler.step()
            extensions.after_optimizer_step(step + 1)
            optimizer.zero_grad(set_to_none=True)
        # 5. Log, validate, save.
        progress.advance(batch.tokens)
        monitor.after_step(progress, loss, grad_norm, values, batch.tokens, clock)

    # ---- Finish.
    return finish(job, monitor, progress, stop)


def finish(job: Job, monitor: Monitor, progress: Progress, stop: StopRequest) -> int:
    """Write the result, or where a stopped run goes on; the exit code."""
    monitor.close()
    args, say, accelerator = job.args, monitor.bar.say, monitor.accelerator
    record, checkpoints = monitor.record, monitor.checkpoints
    extensions, adapter = checkpoints.extensions, checkpoints.adapter
    facts = {"steps": progress.step, "trained_counts": checkpoints.tuner.trained_counts, "best": progress.best}
    facts |= extensions.facts() | record.remarks(checkpoints.tuner.trained_counts, progress.step)
    final = {"final_train_loss": progress.loss, "final_validation_loss": progress.validation_loss}
    monitor.require_finite(progress)
    early = progress.step < job.max_steps and progress.stops_early(args.early_stopping_patience)
    if progress.step < job.max_steps and not early:
        if checkpoints.saved != progress.step:
            monitor.save(progress)
        record.close("interrupted", **facts, signal=stop.signal.name if stop.signal else None)
        by = stop.signal.name if stop.signal else "a signal to another rank"
        say(
            f"stopped by {by} after step {progress.step}; go on with --output_dir {job.output_dir} "
            "--resume_from_checkpoint auto"
        )
        accelerator.wait_for_everyone()  # the launcher ends all ranks as soon as one has left with a code other than 0
        return 3
    if progress.best:
        checkpoints.load_best(progress.best["step"])
    extensions.finish()
    record.progress(**facts, **final, **({"stopped_early": progress.step} if early else {}))
    write = accelerator.is_main_process
    if job.peft_config:
        result = save_adapter(job, adapter.model, adapter(), record.summary, write)
    else:
        result = save_model(job, adapter.model, record.summary, write)
    if args.log_adapter:
        record.artifact(result)
    record.close("finished")
    if args.push_to_hub and write:  # the run is finished, whatever becomes of this
        push(job.output_dir, args)
    for remark in facts.get("importance_remarks", ()):
        say(remark)
    if early:
        say(f"stopped early: {progress.unimproved} validations without improvement")
    say(f"finished {progress.step} steps; the result is in {result}")
    return 0


if __name__ == "__main__":
    run_command(main)
