"""W&B and TensorBoard: whether they can start, and the numbers that they get."""

import os
from collections.abc import Sequence

from ist.training.command_line import UsageError, brief


def require_tracker(report_to: str) -> None:
    """Stop now, not after the model is loaded, when the tracker cannot start."""
    if report_to == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UsageError("--report_to tensorboard needs a package: pip install tensorboard.") from None
    if report_to == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        try:
            reason = "" if wandb.login(prompt=False) else "finds no W&B login"
        except Exception as error:  # a wrong key, a service out of reach
            reason = f"cannot start ({brief(error)})"
        if reason:
            raise UsageError(
                f"--report_to wandb (the default) {reason}: run `wandb login`, or set WANDB_MODE=offline, "
                "or pass --report_to none."
            )


def importance_values(update: dict, trained_counts: Sequence[int]) -> dict[str, float]:
    """An importance update as trackers get it."""
    values: dict[str, float] = {"probe/seconds": update["probe_seconds"]}
    for j, (loss, reward) in enumerate(zip(update["losses"], update["rewards"], strict=True)):
        values |= {f"probe/loss_{j}": loss, f"probe/reward_{j}": reward}
    values |= {f"importance/score/layer_{i:02d}": score for i, score in enumerate(update["scores"])}
    return values | {f"importance/trained_steps/layer_{i:02d}": count for i, count in enumerate(trained_counts)}


def tracked_values(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl or importance.jsonl as trackers get it."""
    if "scores" in line:
        return importance_values(line, ())
    if "validation_loss" in line:
        return {"eval/loss": line["validation_loss"]}
    return {f"train/{key}": value for key, value in line.items() if not isinstance(value, list)}
