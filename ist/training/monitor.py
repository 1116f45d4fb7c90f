"""Logging, validation and checkpoints, each when it is due; the lines that a run prints."""

import math
import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ist.distributed import all_finite, full_tensor, largest, reduce_sum
from ist.training.checkpoints import Checkpoints, Progress
from ist.training.environment import differing_nodes, peak_memory_bytes
from ist.training.job import Job
from ist.training.objective import Objective
from ist.training.observer import Observer, StepClock
from ist.training.prepare import warmup_steps
from ist.training.profile import StepProfile
from ist.training.record import RunRecord, total_steps


class ProgressBar:
    """A bar on a terminal, lines elsewhere; of the main process."""

    def __init__(self, accelerator: Accelerator, total: int) -> None:
        self._total, self._quiet = total, not (accelerator.is_main_process and sys.stderr.isatty())
        self.say = accelerator.print

    def start(self, done: int) -> None:
        """From `done` finished steps on."""
        self._bar = tqdm(total=self._total, initial=done, unit="step", disable=self._quiet)
        self.update, self.close = self._bar.update, self._bar.close
        if not self._quiet:
            self.say = self._bar.write


class Monitor:
    """Called after each step: writes its line of metrics.jsonl, validates, saves, each when it is due."""

    def __init__(
        self,
        job: Job,
        accelerator: Accelerator,
        objective: Objective,
        record: RunRecord,
        checkpoints: Checkpoints,
        observer: Observer,
    ) -> None:
        self.job, self.accelerator, self.objective, self.record = job, accelerator, objective, record
        self.checkpoints, self.observer = checkpoints, observer
        self.bar = ProgressBar(accelerator, job.max_steps)
        self.profile: StepProfile | None = None

    def begin(self, progress: Progress, semantic: dict | None) -> None:
        """Print the description of the run, and measure the first validation loss of a run that begins.

        Args:
            semantic: the summary of a semantic rule.
        """
        tuner = self.checkpoints.tuner
        if semantic:
            self.record.semantic(semantic, tuner.rule.counts)
        lines = description(self.job, self.accelerator, self.checkpoints, progress.step, semantic)
        if self.accelerator.num_processes > 1:
            lines += self._ranks(progress.step)
        self.accelerator.print("\n".join(lines))
        self.bar.start(progress.step)
        if self.job.data.validation and progress.step == 0:
            self.validate(progress)
        if self.job.args.profile and self.accelerator.is_main_process:
            left = self.job.max_steps - progress.step
            self.profile = StepProfile(self.job.output_dir / "profile", left, self.bar.say)

    def _ranks(self, step: int) -> list[str]:
        """What ranks have in common, for the description and run.json."""
        checksum, topology = self.checkpoints.checksum, self.record.summary["topology"]
        self.record.progress(replica_checksum={"step": step, "checksum": checksum})
        replicas, shards = topology["replicas"], topology["shards"]
        whole = "the model whole on each" if shards == 1 else f"the model sharded over {shards}"
        copies = f", {replicas} replicas" if shards > 1 and replicas > 1 else ""
        return [
            f"{self.accelerator.num_processes} ranks ({topology['backend']}), {whole}{copies}; checksum of what trains "
            f"{checksum}",
            *differing_nodes(self.record.summary["nodes"]),
        ]

    def after_step(
        self,
        progress: Progress,
        loss: Tensor,
        grad_norm: Tensor,
        values: dict[str, Any],
        tokens: int,
        clock: StepClock,
    ) -> None:
        """
        Args:
            progress: the step is counted in it already.
            loss: this rank's part of the global batch's.
            grad_norm: sharded or not.
            values: more for the step's line of metrics.jsonl.
            tokens: of the global batch.

        Raises:
            FloatingPointError: loss, gradient norm, or a weight to be saved is not finite.
        """
        tuner, device = self.checkpoints.tuner, self.accelerator.device
        args, step, last = self.job.args, progress.step, progress.step == self.job.max_steps
        self.bar.update()
        logged = step % args.logging_steps == 0 or last
        numbers: tuple[float, float] | None = None
        if logged:
            numbers = self.reduce_and_check(progress, loss, grad_norm)
        clock.stop(tokens)
        self.record.progress(steps=step, trained_counts=tuner.trained_counts)
        if logged:
            progress.loss = numbers[0]
            line = {
                "step": step,
                "epoch": step * self.job.batch_size / len(self.job.data.rows),
                "loss": numbers[0],
                "grad_norm": numbers[1],
                "tokens": progress.tokens,
                "trained_layers": tuner.trained,
                **values,
                **clock.window(),
                "peak_memory_bytes": int(largest(peak_memory_bytes(device), device)),  # of the rank that has most
            }
            with self.observer.part("bookkeeping"):
                self.record.metrics(line)
            self.bar.say(
                f"step {step}/{self.job.max_steps}  loss {numbers[0]:.4f}  lr {values['learning_rate']:.2e}  "
                f"{line['step_seconds']:.2f} s/step"
            )
        if self.profile:
            self.profile.step()
        self._validate_and_save(progress, numbers, loss, grad_norm)

    def close(self) -> None:
        self.bar.close()
        if self.profile:
            self.profile.close()

    def _validate_and_save(
        self, progress: Progress, numbers: tuple[float, float] | None, loss: Tensor, grad_norm: Tensor
    ) -> None:
        """`numbers`: loss and gradient norm, where they are known already."""
        args, step, last = self.job.args, progress.step, progress.step == self.job.max_steps
        improved = False
        if self.job.data.validation and (last or self._is_due(args.eval_strategy, args.eval_steps, step)):
            self.validate(progress)
            progress.count_improvement(args.early_stopping_threshold)
            best = progress.best
            improved = args.load_best_model_at_end and (
                best is None or progress.validation_loss < best["validation_loss"]
            )
            if improved:
                progress.best = {"step": step, "validation_loss": progress.validation_loss}
        if improved or self._is_due(args.save_strategy, args.save_steps, step):
            if numbers is None:
                self.reduce_and_check(progress, loss, grad_norm)
            self.save(progress)

    def _is_due(self, strategy: str, every: int | None, step: int) -> bool:
        """What is done every so many steps, or at the end of each epoch; that of a run ends an epoch too."""
        if strategy == "epoch":
            return step == self.job.max_steps or self.objective.stream.ends_epoch(step)
        return bool(every) and step % every == 0

    def reduce_and_check(self, progress: Progress, loss: Tensor, grad_norm: Tensor) -> tuple[float, float]:
        """The step's loss and gradient norm as numbers, the same on every rank; waits for the device.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        numbers = reduce_sum(loss.double()).item(), full_tensor(grad_norm).item()
        if not all(map(math.isfinite, numbers)):
            numbers_read = f"loss {numbers[0]}, grad_norm {numbers[1]} at step {progress.step}"
            raise FloatingPointError(f"{numbers_read}; {self.checkpoints.last()}")
        return numbers

    def require_finite(self, progress: Progress) -> None:
        if not all_finite(self.checkpoints.parameters.values(), self.accelerator.device):
            raise FloatingPointError(
                f"a trained weight is not finite after step {progress.step}; {self.checkpoints.last()}"
            )

    def save(self, progress: Progress) -> None:
        self.require_finite(progress)
        self.checkpoints.save(progress)
        if self.accelerator.num_processes > 1:
            self.record.progress(replica_checksum={"step": progress.step, "checksum": self.checkpoints.checksum})

    def validate(self, progress: Progress) -> None:
        with self.observer.evaluating():
            loss = self.objective.validation_loss()
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss {loss} at step {progress.step}; {self.checkpoints.last()}")
        epoch = progress.step * self.job.batch_size / len(self.job.data.rows)
        self.record.validation({"step": progress.step, "epoch": epoch, "validation_loss": loss})
        self.bar.say(f"step {progress.step}/{self.job.max_steps}  validation loss {loss:.4f}")
        progress.validation_loss = loss


def description(
    job: Job, accelerator: Accelerator, checkpoints: Checkpoints, done: int, semantic: dict | None
) -> list[str]:
    """The lines at the start of a run: model, rows, folder, and settings that a user may not have meant."""
    args, max_steps, data, tuner = job.args, job.max_steps, job.data, checkpoints.tuner
    warmup = warmup_steps(args, max_steps)
    n_layers, n_trained, _ = tuner.rule.counts
    device, world_size = accelerator.device, accelerator.num_processes
    count = sum(parameter.numel() for parameter in checkpoints.parameters.values())
    lines = [
        f"{args.model_name_or_path}: {n_layers} layers, {n_trained} trained per step (selection {args.selection}), "
        f"{count:,} {'adapter' if job.peft_config else 'trainable'} parameters, "
        f"on {device.type}, {args.attn_implementation} attention",
        f"{len(data.rows)} training rows ({data.facts['dropped_rows']} dropped), "
        f"{len(data.validation or ())} validation rows; steps {done} to {max_steps} of {job.batch_size} rows",
        *data.notes,
        f"run folder: {job.output_dir}",
    ]
    if device.type == "cpu" and torch.get_num_threads() * world_size < (os.cpu_count() or 1):
        lines.append(f"using {torch.get_num_threads()} of {os.cpu_count()} CPU cores; OMP_NUM_THREADS sets it")
    if semantic:
        boundary, gains = semantic["boundary"], semantic["gains"]
        lines.append(
            f"Layers up to {boundary} are frozen for good; gains are {min(gains):.3f} to {max(gains):.3f}, that of the "
            "boundary " + (f"{gains[boundary]:.3f}" if boundary >= 0 else "none: no layer is")
        )
    lines += checkpoints.extensions.messages(max_steps)
    if tuner.layers.outside and args.selection != "id3":
        names = ", ".join(tuner.layers.outside[:5]) + (", …" if len(tuner.layers.outside) > 5 else "")
        lines.append(f"In no layer, or shared by several, so trained at every step: {names}")
        if args.selection in ("last", "semantic", "semantic+ist"):
            lines.append(
                "Their backward goes through the layers below the trained ones, whose activations are kept as well."
            )
    earlier = total_steps(job.checkpoint[1]["configuration"]) if job.checkpoint else None
    if earlier is not None and earlier != max_steps:
        rate = checkpoints.scheduler.get_last_lr()[0]
        lines.append(
            f"{max_steps} steps instead of {earlier}: schedule {args.lr_scheduler_type} over all of them, {warmup} of "
            f"warm-up; learning rate {rate:.2e} at step {done + 1}"
        )
    if warmup >= max_steps:
        lines.append(f"All {max_steps} steps are within the warm-up of {warmup}; --warmup_steps sets it.")
    return lines
