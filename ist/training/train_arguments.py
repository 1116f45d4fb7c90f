"""The keys of the group "training": batches, learning rate, optimizer, precision; part of arguments.py."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ist.training.command_line import UsageError, require
from ist.training.keys import option
from ist.training.packages import require_package


def _canonical_kwargs(text: str) -> str:
    """The same JSON object, its keys in order, its numbers as numbers: YAML reads 1e-5 as a text.

    Raises:
        UsageError: it is no JSON object of finite numbers and texts.
    """
    key, allowed = "lr_scheduler_kwargs", 'a JSON object of finite numbers and texts, such as {"min_lr": 1e-5}'
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--{key} must be {allowed}; got {text}.") from error
    require(isinstance(values, dict), key, allowed, text)
    for name, value in values.items():
        with suppress(ValueError):
            values[name] = float(value) if isinstance(value, str) else value
    finite = (isinstance(v, str) or (isinstance(v, (int, float)) and math.isfinite(v)) for v in values.values())
    require(all(finite), key, allowed, text)
    return json.dumps(values, sort_keys=True)


# Names of transformers' OptimizerNames.
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")  # theirs is torch's arithmetic by element
TORCH_OPTIMIZERS = (*SHARDED_OPTIMIZERS, "adagrad", "adafactor")
BITSANDBYTES_OPTIMIZERS = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
_WHOLE_MATRICES = "it projects the gradients of whole weights, and adapters are of low rank by themselves"
_OWN_LOOP = "it needs a training loop of its own"
_UNTESTED = "it needs a package that is not tested here"
REFUSED_OPTIMIZERS = {
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _WHOLE_MATRICES),
    **dict.fromkeys(("galore_adamw_layerwise", "galore_adamw_8bit_layerwise"), _OWN_LOOP),
    **dict.fromkeys(("galore_adafactor_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"), _OWN_LOOP),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _OWN_LOOP),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "its state cannot be written as safetensors"),
    **dict.fromkeys(("adamw_anyprecision", "adamw_apex_fused", "grokadamw", "stable_adamw"), _UNTESTED),
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), "it is for other devices"),
}


@dataclass(frozen=True)
class TrainArguments:
    _argument_group_name = "training (names as in transformers.TrainingArguments)"
    free_keys = (
        *("per_device_train_batch_size", "gradient_accumulation_steps"),  # global_batch_size stays
        *("per_device_eval_batch_size", "gradient_checkpointing", "torch_compile", "torch_compile_backend"),
    )
    # Of the same computation.
    same_values: ClassVar = {
        "adamw_torch_fused": "adamw_torch",
        "adamw_bnb_8bit": "adamw_8bit",
        "offload": "keep",
    }

    per_device_train_batch_size: int = option(4, "Rows per micro-batch and process.")
    per_device_eval_batch_size: int | None = option(
        None, "Rows per micro-batch of a validation. Default: per_device_train_batch_size; --plan does not count more."
    )
    gradient_accumulation_steps: int | None = option(
        None, "Micro-batches per optimizer step. Default: 1, or as many as global_batch_size needs."
    )
    global_batch_size: int | None = option(
        None, "Rows of an optimizer step, over all processes. Instead of gradient_accumulation_steps."
    )
    learning_rate: float = option(2e-4, "Peak learning rate.")
    lr_scheduler_type: Literal[
        *("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial"),
        *("constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"),
    ] = option("linear", "linear, cosine, constant, ...: the schedule after the warm-up.")
    lr_scheduler_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "The schedule's own arguments, JSON. Those of transformers: cosine_with_min_lr takes "
            '{"min_lr": 1e-5} or min_lr_rate, warmup_stable_decay needs {"num_decay_steps": 100}.',
            "metavar": "JSON",
        },
    )
    warmup_steps: float = option(100, "Steps of linear warm-up. Below 1: a share of all steps.")
    num_train_epochs: float = option(3.0, "Passes over the rows.")
    max_steps: int = option(-1, "Optimizer steps; -1: as num_train_epochs says.")
    optim: str = option(
        "adamw_torch",
        "adamw_torch, adamw_8bit, lion_8bit, adafactor, sgd, ... Those of transformers but for some: "
        + ", ".join((*TORCH_OPTIMIZERS, *BITSANDBYTES_OPTIMIZERS))
        + ". 8-bit and paged ones, lion and ademamix are bitsandbytes'.",
    )
    optimizer_state: Literal["keep", "drop", "offload"] = option(
        "keep",
        "Moments of resting layers: keep, drop or offload. drop: they are zero when the layer is drawn again; "
        "offload: on the CPU (but for saves).",
    )
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment.")
    adam_beta2: float = option(0.999, "AdamW's decay of the second moment.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    weight_decay: float = option(0.0, "AdamW's.")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: LoRA's B learns by learning_rate times this. 1 or more; 16 in its paper (arXiv 2402.12354)."
    )
    max_grad_norm: float = option(1.0, "Clip the gradient of the trained layers; 0: do not.")
    neftune_noise_alpha: float | None = option(
        None, "NEFTune: noise on the embeddings while training. Not in probes and validations; 5 to 15 in its paper."
    )
    bf16: bool | None = option(None, "Mixed precision: autocast to bfloat16. Default: as accelerate launch says.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward. Non-reentrant.")
    torch_compile: bool = option(False, "Compile each layer. Not the whole model: its graph changes with the draw.")
    torch_compile_backend: str = option("inductor", "Of torch.compile.")

    def __post_init__(self) -> None:
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
        for key in (*sizes, "gradient_accumulation_steps", "global_batch_size"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, "1 or more", getattr(self, key))
        if self.global_batch_size and self.gradient_accumulation_steps:
            raise UsageError(
                f"--global_batch_size {self.global_batch_size} and --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} are both given: leave one out (null, where a recipe has it)."
            )
        for key in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, key) < 1, key, "in [0, 1)", getattr(self, key))
        for key in ("learning_rate", "num_train_epochs", "adam_epsilon"):
            require(0 < getattr(self, key) < math.inf, key, "a finite number above 0", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "max_grad_norm"):
            require(0 <= getattr(self, key) < math.inf, key, "a finite number, 0 or more", getattr(self, key))
        ratio = self.loraplus_lr_ratio
        require(ratio is None or 1 <= ratio < math.inf, "loraplus_lr_ratio", "a finite number, 1 or more", ratio)
        alpha = self.neftune_noise_alpha
        require(alpha is None or 0 < alpha < math.inf, "neftune_noise_alpha", "a finite number above 0", alpha)
        self._require_optimizer()
        if self.torch_compile:
            self._require_compiler()
        if self.lr_scheduler_kwargs:
            object.__setattr__(self, "lr_scheduler_kwargs", _canonical_kwargs(self.lr_scheduler_kwargs))
        if self.lr_scheduler_type == "polynomial" and not self.lr_scheduler_kwargs:
            require(self.learning_rate > 1e-7, "learning_rate", "above 1e-7, where polynomial ends", self.learning_rate)
        require(self.max_steps >= 1 or self.max_steps == -1, "max_steps", "1 or more, or -1 (epochs)", self.max_steps)

    def _require_optimizer(self) -> None:
        if reason := REFUSED_OPTIMIZERS.get(self.optim):
            raise UsageError(
                f"--optim {self.optim} is not served: {reason}. Use adamw_torch, or another; see --help optim."
            )
        known = (*TORCH_OPTIMIZERS, *BITSANDBYTES_OPTIMIZERS)
        require(self.optim in known, "optim", f"one of {', '.join(known)}", self.optim)
        if self.optimizer_state == "offload" and not self.optim.startswith("adamw_torch"):
            raise UsageError(
                f"--optimizer_state offload cannot move the state of --optim {self.optim}: use adamw_torch."
            )
        if self.optimizer_state == "drop" and self.optim.startswith("paged"):
            raise UsageError(f"--optimizer_state drop cannot free the pages of --optim {self.optim}: use adamw_8bit.")
        if self.optimizer_state == "drop" and self.optim == "adagrad":
            raise UsageError("--optimizer_state drop: adagrad makes its state once, at the start. Use adamw_torch.")
        if self.optim in BITSANDBYTES_OPTIMIZERS:
            require_package("bitsandbytes", f"--optim {self.optim}")

    def _require_compiler(self) -> None:
        import torch

        if torch.__version__ < (2, 13):
            raise UsageError(
                f"--torch_compile true needs torch 2.13 or newer; {torch.__version__} compiles wrong gradients of "
                "layers that are trained by turns. Leave it out."
            )
        backends = torch._dynamo.list_backends(exclude_tags=())
        known = self.torch_compile_backend in backends
        require(known, "torch_compile_backend", "one of " + ", ".join(backends), self.torch_compile_backend)
        if self.gradient_checkpointing:
            raise UsageError(
                "--torch_compile true cannot be had with --gradient_checkpointing true: the recomputation inside a "
                "compiled layer draws random numbers, which the compiler refuses. Leave one out."
            )
