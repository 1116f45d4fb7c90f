"""The keys of the rules whose own files import torch: `--help` and a refused command line do without it."""

from dataclasses import dataclass, field

from ist.config import Count, ISTConfig, check, parse_count, resolve_count

# Selections that a reader must not take for a method; run.json and the model card say it.
CONTROLS = {
    "placebo": "a control: importance updates without information (what was measured is permuted)",
    "oracle": "a control: layers are drawn by given scores, which do not move",
}


@dataclass
class LisaConfig(ISTConfig):
    lisa_interval: int = field(default=20, metadata={"help": "lisa: K, the steps that drawn layers stay for."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lisa_interval >= 1, "lisa_interval", "1 or more", self.lisa_interval)


@dataclass
class SemanticConfig(ISTConfig):
    min_trained_layers: Count = field(
        default=0.25,
        metadata={"help": "semantic rules: layers above the boundary, at least. A fraction, a count, or all."},
    )
    semantic_budget: float | None = field(
        default=None,
        metadata={
            "help": "semantic rules: most of the layers that a backward passes. As a share of all; default: no limit."
        },
    )
    semantic_rows: int = field(
        default=64, metadata={"help": "semantic rules: training rows of the pass before training."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.min_trained_layers = parse_count("min_trained_layers", self.min_trained_layers)
        if self.semantic_budget is not None:
            check(0 < self.semantic_budget < 1, "semantic_budget", "in (0, 1)", self.semantic_budget)
        check(self.semantic_rows >= 1, "semantic_rows", "1 or more", self.semantic_rows)
        allowed = "decoder: semantic compares hidden states with the tokens that a decoder predicts"
        check(self.layer_stack == "decoder", "layer_stack", allowed, self.layer_stack)

    @property
    def calibrates(self) -> bool:
        return True


@dataclass
class ID3Config(ISTConfig):
    """The defaults of exponent and eps: that of the authors' selective_optimizers 0.4, and that of its examples."""

    id3_budget: Count = field(
        default=0.1,
        metadata={"help": "id3: B, weights unmasked in the end. A share of those that may train, a count, or all."},
    )
    id3_steps: int | None = field(
        default=None, metadata={"help": "id3: T, steps over which they are unmasked. Default: all of the run."}
    )
    id3_exponent: float = field(default=1.0, metadata={"help": "id3: exp in the score |grad| / (|weight| + eps)^exp."})
    id3_eps: float = field(default=1e-3, metadata={"help": "id3: eps in the score."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.id3_budget = parse_count("id3_budget", self.id3_budget)
        if self.id3_steps is not None:
            check(self.id3_steps >= 1, "id3_steps", "1 or more", self.id3_steps)
        finite = 0 <= self.id3_exponent < float("inf")
        check(finite, "id3_exponent", "a finite number, 0 or more", self.id3_exponent)
        check(0 < self.id3_eps < float("inf"), "id3_eps", "a finite number above 0", self.id3_eps)
        underflows = f"large enough for its power {self.id3_exponent} to be 1e-30 or more (it divides a gradient)"
        check(self.id3_eps**self.id3_exponent >= 1e-30, "id3_eps", underflows, self.id3_eps)

    def scalar_budget(self, candidates: int) -> int:
        """B for a model in which `candidates` scalars may train.

        Raises:
            ConfigError: it is more than those.
        """
        return resolve_count("id3_budget", self.id3_budget, candidates, False, "the scalars that may train")


@dataclass
class GradientNormConfig(ISTConfig):
    gradient_norm_decay: float = field(
        default=0.9, metadata={"help": "gradient_norm: weight of a layer's mean against its new norm."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.gradient_norm_decay < 1, "gradient_norm_decay", "0 or more, below 1", self.gradient_norm_decay)


@dataclass
class OracleConfig(ISTConfig):
    oracle_scores: str = field(
        default="", metadata={"help": "oracle: a JSON file with a score for each layer. Layers are drawn by these."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.oracle_scores), "oracle_scores", "given with `selection=oracle`: a JSON file", "none")
