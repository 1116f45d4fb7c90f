"""The keys of train_ist.py by group, and the checks across them; read before anything that imports torch.

The first sentence of a key's help is its phrase in `--help`; `--help GROUP` has the whole.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass, replace
from types import UnionType
from typing import Any, Literal, get_origin

from ist.config import ConfigError, Count, ISTConfig
from ist.selection import RULES, rule_fields
from ist.training.command_line import UsageError, as_usage_error, parse_arguments, require
from ist.training.keys import option
from ist.training.packages import require_package
from ist.training.synonyms import SYNONYMS
from ist.training.train_arguments import TrainArguments

# Accelerate's, which is not imported to name them.
TRACKERS = ("aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab")

# A resumed run may change the `free_keys` of each group, which say where and how it reports and saves, or change its
# speed and memory alone; and the `content_keys`, where the digests of what they name are equal.


@dataclass(frozen=True)
class ModelArguments:
    _argument_group_name = "model"
    free_keys = ("attn_implementation", "trust_remote_code")
    content_keys = ("model_name_or_path",)

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "auto, float32 or bfloat16, of the base weights. Adapters are always float32; auto is the type in "
        "which the weights were saved.",
    )
    attn_implementation: str = option("sdpa", "sdpa, eager or flash_attention_2.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    load_in_4bit: bool = option(
        False, "QLoRA: 4-bit base weights. NF4 with double quantisation, by bitsandbytes; computed in --dtype."
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit:
            require_package("bitsandbytes", "--load_in_4bit true")


@dataclass(frozen=True)
class DataArguments:
    _argument_group_name = "data"
    free_keys = ("preprocessing_num_workers", "show_rows")
    content_keys = (  # of the digests of encoded rows
        *("train_file", "dataset_name", "dataset_config", "dataset_split", "column_mapping", "max_samples"),
        *("train_weights", "validation_file", "validation_size", "max_length", "overlong", "prompt_template"),
        *("chat_template", "completion_only_loss"),
    )

    train_file: list[str] | None = option(
        None,
        "Rows: files, folders or patterns, one or several. JSON, JSONL, CSV, TSV, Parquet, Arrow, .txt (its lines), "
        "each also .gz. This or dataset_name is required.",
    )
    dataset_name: str | None = option(
        None, "Instead of train_file: a dataset on the Hub. Or a folder that save_to_disk wrote."
    )
    dataset_config: str | None = option(None, "Its configuration on the Hub. gsm8k has main and socratic.")
    dataset_split: str = option("train", "Its split. With train_file: the split of a folder that save_to_disk wrote.")
    column_mapping: list[str] | None = option(
        None, "Columns of other names, THEIRS=OURS. question=instruction answer=output; tools= leaves a column out."
    )
    max_samples: int | None = option(None, "Training rows at most, the first ones. With train_weights: of each file.")
    train_weights: list[float] | None = option(
        None, "How often each train_file comes in an epoch. One number for each file; 0.5 is its first half."
    )
    validation_file: list[str] | None = option(None, "Rows to measure the validation loss on.")
    validation_size: float = option(
        0, "Instead: a share (below 1) or number of the training rows. They are the same rows whatever the seed."
    )
    max_length: int = option(1024, "Tokens of a row. What becomes of longer ones says overlong.")
    overlong: Literal["truncate", "drop", "error"] = option(
        "truncate", "What becomes of longer rows: truncate, drop or error."
    )
    preprocessing_num_workers: int | None = option(None, "Processes that tokenise. Default: one.")
    prompt_template: Literal["alpaca", "llm_adapters", "ist_repository", "chat", "none"] = option(
        "alpaca",
        "alpaca, llm_adapters, ist_repository, chat or none. llm_adapters is that of LLM-Adapters to the byte; "
        "ist_repository is that without blanks in empty lines, as the authors of IST have it; chat is the tokenizer's "
        "chat template; none is instruction + input + output.",
    )
    chat_template: str | None = option(
        None,
        "Instead of the tokenizer's: a file, or a name of TRL's. Such as qwen3 (needs trl; an unknown name lists "
        "them); with prompt_template chat.",
    )
    completion_only_loss: bool = option(False, "Loss on the answers only. In chats: on all turns of the assistant.")
    show_rows: int | None = option(
        None, "Print so many rows and what is learnt of them, and stop. Learnt is what stands between ⟦ and ⟧."
    )
    packing: bool = option(False, "No padding: rows of a micro-batch end to end. Each attends to itself alone.")
    train_sampling_strategy: Literal["random", "group_by_length"] = option(
        "random",
        "random or group_by_length: alike rows share a micro-batch. The rows of a step, and its loss, stay the same: "
        "they are dealt to its micro-batches and ranks by length; with packing so that all have as many tokens.",
    )

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            raise UsageError(
                "give --train_file FILE or --dataset_name NAME, and not both (over a recipe: --dataset_name None)."
            )
        if self.validation_file and self.validation_size:
            raise UsageError("give --validation_file or --validation_size, not both.")
        size = self.validation_size
        whole = 0 <= size < math.inf and (size < 1 or size == int(size))
        require(whole, "validation_size", "a fraction below 1 or a number of rows", size)
        require(self.max_length >= 2, "max_length", "2 or more tokens", self.max_length)
        for key in ("max_samples", "preprocessing_num_workers", "show_rows"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, "1 or more", getattr(self, key))
        for weight in self.train_weights or ():
            require(0 < weight < math.inf, "train_weights", "finite numbers above 0", weight)
        if self.train_weights and not self.train_file:
            raise UsageError("--train_weights needs --train_file: a number for each of them.")
        if self.dataset_config and not self.dataset_name:
            raise UsageError("--dataset_config needs --dataset_name.")
        if self.chat_template and self.prompt_template != "chat":
            raise UsageError(f"--chat_template needs --prompt_template chat; got {self.prompt_template}.")


@dataclass(frozen=True)
class AdapterArguments:
    _argument_group_name = "adapter"
    free_keys = ("peft_config",)  # whose content the configuration has
    content_keys = ("adapter_name_or_path",)

    peft_method: Literal["lora", "series", "parallel", "none"] = option(
        "lora",
        "lora, series or parallel adapters; none trains the weights. A bottleneck adapter stands after (series) or "
        "beside (parallel) each target; none is full fine-tuning, of the layers that are selected.",
    )
    lora_r: int = option(32, "Rank.")
    lora_alpha: int = option(64, "Scaling is lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.")
    target_modules: list[str] | None = option(
        None,
        "Names of the modules to adapt. Default: q, k, v, up, down or the architecture's equivalents (lora); up, "
        "down (series); up, gate (parallel).",
    )
    bottleneck_size: int = option(256, "Width of series and parallel adapters.")
    peft_config: str | None = option(
        None,
        "Any PEFT method: a JSON file like adapter_config.json. Instead of all other adapter keys: DoRA, rsLoRA, "
        "AdaLoRA, ... with their own settings.",
    )
    adapter_name_or_path: str | None = option(
        None,
        "Go on from an adapter, with its configuration. A run's adapter/ or one on the Hub, with its weights; "
        "instead of all other adapter keys.",
    )
    keep_importance: bool = option(False, "Begin with the scores of that adapter's run, not with zero.")

    def __post_init__(self) -> None:
        if self.target_modules:
            names = [name for part in self.target_modules for name in part.split(",") if name]
            object.__setattr__(self, "target_modules", names)
        require(self.lora_r >= 1, "lora_r", "1 or more", self.lora_r)
        require(self.lora_alpha >= 1, "lora_alpha", "1 or more", self.lora_alpha)
        require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)
        require(self.bottleneck_size >= 1, "bottleneck_size", "1 or more", self.bottleneck_size)
        if self.keep_importance and not self.adapter_name_or_path:
            raise UsageError("--keep_importance true needs --adapter_name_or_path: the adapter of a run.")


@dataclass(frozen=True)
class RunArguments:
    _argument_group_name = "run"
    free_keys = (
        *("output_dir", "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps"),
        *("save_total_limit", "resume_from_checkpoint"),
        *("report_to", "run_name", "log_adapter", "log_layers", "profile", "ddp_timeout"),
        *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_base_model"),
    )

    output_dir: str | None = option(
        None,
        "Default runs/{run_name or recipe}-{start time or W&B id}. {run_id} and {seed} in it are filled in; {run_id}"
        " is WANDB_RUN_ID, or the start time.",
    )
    logging_steps: int = option(10, "Steps between two lines of metrics.jsonl.")
    eval_strategy: Literal["no", "steps", "epoch"] | None = option(
        None, "When to validate: no, steps or epoch. Default: steps where eval_steps is given, else no."
    )
    eval_steps: int | None = option(
        None, "Steps between two validations. The first and the last step are always validated."
    )
    save_strategy: Literal["no", "steps", "epoch"] | None = option(
        None,
        "When to write checkpoints: no, steps or epoch. Default: steps where save_steps is given, else no. epoch: "
        "after the step that ends a pass over the rows, and after the last one.",
    )
    save_steps: int | None = option(None, "Steps between two checkpoints. Default: only where the run is stopped.")
    save_total_limit: int | None = option(None, "Checkpoints to keep, and the best one. Default: all.")
    load_best_model_at_end: bool = option(False, "adapter/ is that of the lowest validation loss, not the last.")
    early_stopping_patience: int | None = option(
        None, "End after so many validations without improvement. The first one, before any step, does not count."
    )
    early_stopping_threshold: float = option(0.0, "By how much more the validation loss must fall below the best.")
    resume_from_checkpoint: str = option(
        "none",
        "none, auto or a checkpoint's folder. auto: the newest whole checkpoint in output_dir; where there is none, "
        "start.",
    )
    report_to: list[str] = field(
        default_factory=lambda: ["wandb"],
        metadata={
            "help": f"Trackers, one or several; all; or none. Of {', '.join(TRACKERS)}; the files are always written."
        },
    )
    run_name: str | None = option(
        None, "Default: the recipe's name. It names the run folder, and the run in the trackers."
    )
    log_adapter: bool = option(False, "Give the finished adapter to W&B as an artifact.")
    log_layers: bool = option(False, "Give trackers a key for each layer. W&B has a histogram and a table without it.")
    profile: bool = option(False, "Trace three steps with torch.profiler. To profile/ in the run's folder, by rank 0.")
    push_to_hub: bool = option(False, "Push adapter/ (model/) to the Hub at the end of the run.")
    hub_model_id: str | None = option(None, "Its name there. Default: that of the run folder.")
    hub_private_repo: bool | None = option(None, "A private repository, unless this is false.")
    hub_base_model: str | None = option(None, "Name of the base model on the Hub, where it is a folder here.")
    ddp_timeout: int = option(1800, "Seconds that processes wait for each other. In a collective, before it fails.")
    plan: bool = option(False, "Predict the peak memory of each device, and stop. Says whether it fits.")

    def __post_init__(self) -> None:
        names = [name for part in self.report_to for name in part.split(",") if name]
        object.__setattr__(self, "report_to", names)
        for name in names:
            require(name in (*TRACKERS, "all", "none"), "report_to", f"of {', '.join(TRACKERS)}, all or none", name)
        if len(names) > 1 and {"all", "none"} & {*names}:
            raise UsageError(f"--report_to {' '.join(names)}: all and none stand alone.")
        if self.log_adapter and not {"wandb", "all"} & {*names}:
            raise UsageError(f"--log_adapter true needs --report_to wandb; got {' '.join(names)}.")
        for key in ("hub_model_id", "hub_base_model"):
            if getattr(self, key) and not self.push_to_hub:
                raise UsageError(f"--{key} needs --push_to_hub true.")
            value = getattr(self, key) or "a/b"
            named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) is not None
            require(named, key, "a name on the Hub, such as user/name", value)
        for key in ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, "1 or more", value)
        threshold = self.early_stopping_threshold
        require(0 <= threshold < math.inf, "early_stopping_threshold", "a finite number, 0 or more", threshold)
        if threshold and not self.early_stopping_patience:
            raise UsageError("--early_stopping_threshold needs --early_stopping_patience N.")
        for name in ("eval", "save"):
            strategy, steps = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            if strategy == "steps" and not steps:
                raise UsageError(f"--{name}_strategy steps needs --{name}_steps N.")
            if strategy in ("no", "epoch") and steps:
                raise UsageError(
                    f"--{name}_strategy {strategy} and --{name}_steps {steps} are both given: leave one out."
                )
            object.__setattr__(self, f"{name}_strategy", strategy or ("steps" if steps else "no"))
        require(1 <= self.ddp_timeout <= 10**9, "ddp_timeout", "from 1 to 10^9 seconds", self.ddp_timeout)


def _selection_arguments() -> type:
    """ISTConfig's keys and those of all rules as one group of the command line, and the ISTConfig made of them."""
    plain = {Count: str, list[int] | None: list[str] | None}  # a count is text there, a list is made of texts

    def argument(key: Field, optional: bool) -> tuple[str, Any, Any]:
        if optional:
            kind = plain.get(key.type, key.type)
            kind = kind if get_origin(kind) is UnionType else kind | None
            metadata = {"help": key.metadata["help"], "default": key.default}  # None: not given, as for other rules
            return key.name, kind, field(default=None, metadata=metadata)
        kind = Literal[tuple(RULES)] if key.name == "selection" else plain.get(key.type, key.type)
        default = str(key.default) if kind is str else key.default
        return key.name, kind, option(default, key.metadata["help"])

    def make_config(self) -> None:
        given = {key.name: getattr(self, key.name) for key in fields(self)}
        try:
            config = ISTConfig(**{key: value for key, value in given.items() if value is not None})
        except ConfigError as error:
            raise as_usage_error(error) from error
        object.__setattr__(self, "config", config)

    own = [argument(key, False) for key in fields(ISTConfig)]
    last = next(i for i, key in enumerate(own) if key[0] == "layer_stack")
    rules = [argument(key, True) for key, _ in rule_fields()]
    namespace = {"__post_init__": make_config, "_argument_group_name": ISTConfig._argument_group_name}
    keys = [*own[:last], *rules, *own[last:]]
    return make_dataclass("SelectionArguments", keys, namespace=namespace, frozen=True)


SelectionArguments = _selection_arguments()
ARGUMENTS = (ModelArguments, DataArguments, AdapterArguments, SelectionArguments, TrainArguments, RunArguments)


@dataclass(frozen=True)
class Arguments(RunArguments, TrainArguments, SelectionArguments, AdapterArguments, DataArguments, ModelArguments):
    """All keys of train_ist.py, each as its group has checked it."""

    def __post_init__(self) -> None:
        """Nothing: each group has checked its own keys, and a check that is inherited would be that of one group."""

    @classmethod
    def joined(cls, groups: Sequence[Any]) -> "Arguments":
        """Of parsed groups; keys of the selection as its config has them, None where a key is another rule's."""
        keys: dict[str, Any] = {}
        for group in groups:
            keys |= asdict(group)
            if isinstance(group, SelectionArguments):
                keys |= asdict(group.config)
        return cls(**keys)


@dataclass(frozen=True)
class Resolved(Arguments):
    """The arguments of a run with the values that its model, its processes and its folder give them.

    dtype, attn_implementation and target_modules are the model's, output_dir and run_name the run's, the accumulation
    and the probe's size those of the global batch. run.json has them as its configuration.

    Attributes:
        exclude_modules: regular expression of the modules that stay without an adapter, as PEFT takes it.
    """

    exclude_modules: str | None = None

    @classmethod
    def of(cls, args: Arguments, **values: Any) -> "Resolved":
        """`args` with other values."""
        return cls(**{**vars(args), **values})


def parse_training_arguments(argv: Sequence[str], description: str) -> tuple[Arguments, ISTConfig, str | None]:
    """(all keys, those of the method as its config, path of the recipe).

    Raises:
        UsageError: an unknown key, a bad value, or keys that do not go together or with the launcher.
    """
    args, config, recipe = read_arguments(argv, description)
    return _with_precision(args), config, recipe


def read_arguments(argv: Sequence[str], description: str) -> tuple[Arguments, ISTConfig, str | None]:
    """The same, whatever the launcher says."""
    own = [key.name for key in fields(AdapterArguments) if key.name != "keep_importance"]
    alone = {whole: [key for key in own if key != whole] for whole in ("peft_config", "adapter_name_or_path")}
    *groups, recipe = parse_arguments(ARGUMENTS, argv, description, alone, SYNONYMS)
    config = next(group.config for group in groups if isinstance(group, SelectionArguments))
    args = Arguments.joined(groups)
    _require_consistent(args)
    return args, config, recipe


def looks_only(args: Arguments) -> bool:
    """Whether this command only tells what a run would be."""
    return bool(args.plan or args.show_rows)


def _with_precision(args: Arguments) -> Arguments:
    """With the launcher's mixed precision where bf16 is not given; the launcher's `no`, which it always sets, says
    nothing.

    Raises:
        UsageError: the launcher says otherwise, or fp16 or fp8.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    given = "" if args.bf16 is None else f"--bf16 {str(args.bf16).lower()}, and "
    if launched not in ("no", "bf16"):
        why = "gradients of suppressed layers are too small for it" if launched == "fp16" else "it is not served"
        raise UsageError(f"{given}accelerate's mixed_precision is {launched}: {why}. Launch with bf16, or no.")
    if launched == "bf16" and args.bf16 is False:
        raise UsageError(f"{given}accelerate's mixed_precision is bf16: leave out --bf16, or launch with no.")
    if launched == "bf16" and args.bf16 is None and os.environ.get("RANK", "0") == "0":
        print("Mixed precision bf16, as accelerate's mixed_precision says.")
    return replace(args, bf16=args.bf16 if args.bf16 is not None else launched == "bf16")


def _require_consistent(args: Arguments) -> None:
    """Raises UsageError for keys of several groups that do not go together."""
    has_validation = bool(args.validation_file or args.validation_size)
    for key in ("load_best_model_at_end", "eval_steps", "early_stopping_patience"):
        if getattr(args, key) and not has_validation:
            raise UsageError(f"--{key} needs --validation_file or --validation_size.")
    if args.eval_strategy == "epoch" and not has_validation:
        raise UsageError("--eval_strategy epoch needs --validation_file or --validation_size.")
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(args, key) and args.eval_strategy == "no":
            raise UsageError(f"--{key} needs --eval_steps, or --eval_strategy epoch.")
    if args.packing and args.neftune_noise_alpha:
        raise UsageError(
            "--neftune_noise_alpha scales its noise by the length of a row, --packing true makes one of many: leave "
            "one out."
        )
    if args.loraplus_lr_ratio and (args.peft_method == "none" or args.selection == "id3"):
        given = "--peft_method none" if args.peft_method == "none" else "--selection id3"
        raise UsageError(f"--loraplus_lr_ratio is for whole matrices A and B of LoRA; {given} has none: leave one out.")
    if args.selection == "id3" and args.optim != "adamw_torch":
        raise UsageError(f"--optim {args.optim} keeps moments of masked weights too: use adamw_torch with id3.")
