"""ISTConfig: every hyper-parameter of the method in one place, and the checks of each."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args


class UsageError(Exception):
    """What a user can mend: bad arguments, bad data, a wrong folder. Its text is the one line that they see."""


def require(ok: bool, key: str, allowed: str, value: Any) -> None:
    """Raise a UsageError naming `key`, what is `allowed` and the `value` that was given, unless `ok`."""
    if not ok:
        raise UsageError(f"--{key} must be {allowed}; got {value}.")


class LayerCounts(NamedTuple):
    """{N_L, N_u, N_v} of the paper's Table 8."""

    n_layers: int
    trained: int
    kept: int


def _parse_count(key: str, value: int | float | str) -> int | float | str:
    """An int (a count), a float in (0, 1) (a fraction) or "all"; from a number or the text of a command line."""
    allowed = "a fraction in (0, 1), a count of 1 or more, or all"
    if value == "all":
        return value
    if isinstance(value, str):
        try:
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:
            require(False, key, allowed, value)
    if isinstance(value, float) and value == 1:
        raise UsageError(f"--{key} 1.0 is ambiguous: write 1 for one layer, all for every layer.")
    fraction = isinstance(value, float) and 0 < value < 1
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(fraction or count, key, allowed, value)
    return value


def _resolve_count(key: str, value: int | float | str, total: int, floor: bool, of: str) -> int:
    if value == "all":
        return total
    if isinstance(value, float):
        return max(1, int(value * total + (0 if floor else 0.5)))
    if value > total:
        raise UsageError(
            f"--{key} must be a fraction in (0, 1), a count from 1 to {total} ({of}), or all; got {value}. "
            f"Lower --{key}."
        )
    return value


# A cheap probe has the rows of a full one by this: 3 candidates each 10 steps are then some 2 % of the time.
CHEAP = 8
SUPPRESSING = ("ist", "semantic+ist")
# The keys that belong to one rule: {key: (rule, its default)}. `semantic+ist` has those of semantic.
RULE_KEYS = {
    "lisa_interval": ("lisa", 20),
    "fixed_layers": ("fixed", None),
    "min_trained_layers": ("semantic", 0.25),
    "semantic_budget": ("semantic", None),
    "semantic_rows": ("semantic", 64),
    "id3_budget": ("id3", 0.1),
    "id3_steps": ("id3", None),
    # The default of the authors' selective_optimizers 0.4, and the eps of its examples.
    "id3_exponent": ("id3", 1.0),
    "id3_eps": ("id3", 1e-3),
}


@dataclass
class ISTConfig:
    """Hyper-parameters of Importance-aware Sparse Tuning; the defaults are the paper's (section 4 and Table 8).

    A layer count is a fraction in (0, 1) of the N_L layers that carry an adapter, rounded half up and at least 1; an
    int from 1 to N_L; or "all". 1.0 is refused as ambiguous.

    Raises:
        UsageError: at construction, when a value is out of its range; by `counts`, when a count exceeds N_L.
    """

    _argument_group_name = "selection: which layers are trained"

    selection: Literal["ist", "random", "all", "lisa", "fixed", "first", "last", "semantic", "semantic+ist", "id3"] = (
        field(
            default="ist",
            metadata={
                "help": "ist learns layer importance; random draws N_u layers at each step, lisa every lisa_interval "
                "steps; all is plain PEFT, or full fine-tuning; fixed, first and last always train the same; semantic "
                "trains the layers above a boundary that it finds before training, semantic+ist draws by importance "
                "among those; id3 unmasks single weights step by step, in all layers."
            },
        )
    )
    trained_layers: str = field(
        default="0.25", metadata={"help": "N_u, layers trained at each step: a fraction in (0, 1), a count, or all."}
    )
    kept_layers: str = field(
        default="0.5", metadata={"help": "N_v, layers that keep their full response in a candidate set."}
    )
    candidates: int = field(default=3, metadata={"help": "N_c, candidate sets compared at each importance update."})
    update_interval: int = field(default=10, metadata={"help": "T_c, optimizer steps between importance updates."})
    suppression: float = field(
        default=0.25, metadata={"help": "beta, factor on the adapter response of the layers outside a candidate set."}
    )
    score_lr: float = field(
        default=10.0, metadata={"help": "mu, step size of the importance scores; 100 for short runs such as math."}
    )
    score_rule: Literal["paper", "released"] = field(
        default="paper", metadata={"help": "paper is Eq. 6-10; released is what the authors' code does."}
    )
    probe: Literal["full", "cheap", "gradient"] = field(
        default="full",
        metadata={
            "help": "full is the paper's; cheap takes an eighth of the rows, and all candidates in one forward; "
            "gradient (experimental, not the paper's) estimates the candidates' losses from one backward on as many."
        },
    )
    probe_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Training rows per candidate loss; default: the global batch (16 with score_rule released; an "
            "eighth with probe cheap or gradient)."
        },
    )
    probe_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a probe row, the last ones; default: all (cheap, gradient: an eighth of max_length for "
            "each row of a global batch of fewer than 8)."
        },
    )
    lisa_interval: int | None = field(
        default=None, metadata={"help": "lisa: K, the steps that drawn layers stay for; 20 if not given."}
    )
    fixed_layers: list[str] | None = field(
        default=None, metadata={"help": "fixed: the layers to train, from 0; N_u at equal distances if not given."}
    )
    min_trained_layers: str | None = field(
        default=None,
        metadata={"help": "semantic rules: layers above the boundary at the least; 0.25 of all if not given."},
    )
    semantic_budget: float | None = field(
        default=None,
        metadata={
            "help": "semantic rules: share of the layers that the backward may go through; no limit if not given."
        },
    )
    semantic_rows: int | None = field(
        default=None, metadata={"help": "semantic rules: training rows of the pass before training; 64 if not given."}
    )
    id3_budget: str | None = field(
        default=None,
        metadata={
            "help": "id3: B, weights unmasked in the end: a share of those that may train, a count, or all; "
            "default 0.1."
        },
    )
    id3_steps: int | None = field(
        default=None, metadata={"help": "id3: T, steps over which they are unmasked; default: all of the run."}
    )
    id3_exponent: float | None = field(
        default=None, metadata={"help": "id3: exp in the score |grad| / (|weight| + eps)^exp; default 1."}
    )
    id3_eps: float | None = field(default=None, metadata={"help": "id3: eps in the score; default 1e-3."})
    layer_stack: Literal["decoder", "encoder", "both"] = field(
        default="decoder",
        metadata={"help": "Where a model has more than one list of layers: which of them layers are chosen from."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of adapter initialisation, data order, draws and dropout."})

    def __post_init__(self) -> None:
        for key in ("selection", "score_rule", "probe", "layer_stack"):
            allowed = get_args(ISTConfig.__annotations__[key])
            require(getattr(self, key) in allowed, key, "one of " + ", ".join(allowed), getattr(self, key))
        self.trained_layers = _parse_count("trained_layers", self.trained_layers)
        self.kept_layers = _parse_count("kept_layers", self.kept_layers)
        require(self.candidates >= 2, "candidates", "2 or more (one set is its own mean: reward 0)", self.candidates)
        require(self.update_interval >= 1, "update_interval", "1 or more", self.update_interval)
        require(0 <= self.suppression <= 1, "suppression", "in [0, 1]", self.suppression)
        require(0 <= self.score_lr < float("inf"), "score_lr", "a finite number, 0 or more", self.score_lr)
        if self.probe_batch_size is not None:
            require(self.probe_batch_size >= 1, "probe_batch_size", "1 or more", self.probe_batch_size)
        if self.probe_max_length is not None:
            require(self.probe_max_length >= 2, "probe_max_length", "2 or more tokens", self.probe_max_length)
        require(0 <= self.seed < 2**32, "seed", "an integer from 0 to 2^32 - 1", self.seed)
        self._check_keys_of_rules()

    def _check_keys_of_rules(self) -> None:
        """A key of one rule given to another is refused. IST's own may stand in a recipe that all arms share."""
        for key, (rule, default) in RULE_KEYS.items():
            if self.selection not in (rule, f"{rule}+ist"):
                value = getattr(self, key)
                where = f"{rule} and {rule}+ist" if rule == "semantic" else rule
                require(value is None, key, f"left out with --selection {self.selection}: it is for {where}", value)
            elif getattr(self, key) is None:
                setattr(self, key, default)
        if self.fixed_layers is not None:
            given = self.fixed_layers if isinstance(self.fixed_layers, (list, tuple)) else [self.fixed_layers]
            parts = [part for item in given for part in str(item).split(",") if part]
            whole = bool(parts) and all(part.isdecimal() for part in parts)
            require(whole, "fixed_layers", "layer numbers, from 0", " ".join(map(str, given)))
            self.fixed_layers = sorted({int(part) for part in parts})
        if self.min_trained_layers is not None:
            self.min_trained_layers = _parse_count("min_trained_layers", self.min_trained_layers)
        if self.lisa_interval is not None:
            require(self.lisa_interval >= 1, "lisa_interval", "1 or more", self.lisa_interval)
        if self.semantic_budget is not None:
            require(0 < self.semantic_budget < 1, "semantic_budget", "in (0, 1)", self.semantic_budget)
        if self.semantic_rows is not None:
            require(self.semantic_rows >= 1, "semantic_rows", "1 or more", self.semantic_rows)
        if self.id3_budget is not None:
            self.id3_budget = _parse_count("id3_budget", self.id3_budget)
        if self.id3_steps is not None:
            require(self.id3_steps >= 1, "id3_steps", "1 or more", self.id3_steps)
        if self.id3_exponent is not None:
            finite = 0 <= self.id3_exponent < float("inf")
            require(finite, "id3_exponent", "a finite number, 0 or more", self.id3_exponent)
        if self.id3_eps is not None:
            require(0 < self.id3_eps < float("inf"), "id3_eps", "a finite number above 0", self.id3_eps)
            underflows = f"large enough for its power {self.id3_exponent} to be 1e-30 or more (what divides a gradient)"
            require(self.id3_eps**self.id3_exponent >= 1e-30, "id3_eps", underflows, self.id3_eps)
        if self.calibrates:
            allowed = "decoder: semantic compares hidden states with the tokens that a decoder predicts"
            require(self.layer_stack == "decoder", "layer_stack", allowed, self.layer_stack)

    @property
    def calibrates(self) -> bool:
        """Whether the rule wants a pass over training rows before the first step."""
        return self.selection.startswith("semantic")

    @property
    def suppresses(self) -> bool:
        """Whether the rule learns from losses with suppressed responses."""
        return self.selection in SUPPRESSING

    def probe_rows(self, batch_size: int) -> int:
        """Rows behind a candidate's loss, for a global batch of `batch_size`."""
        full = 16 if self.score_rule == "released" else batch_size
        return self.probe_batch_size or (full if self.probe == "full" else max(1, full // CHEAP))

    def probe_tokens(self, batch_size: int, max_length: int) -> int | None:
        """Tokens of a probe row, the last ones; None is all of them."""
        if self.probe == "full" or self.probe_batch_size or batch_size >= CHEAP:
            return self.probe_max_length
        return self.probe_max_length or max(2, max_length * batch_size // CHEAP)

    def layer_count(self, key: str, n_layers: int) -> int:
        """The layers that the value of `key` stands for in a model that has `n_layers`.

        Raises:
            UsageError: they are more than the model has.
        """
        of = "the model's layers that carry an adapter"
        return _resolve_count(key, getattr(self, key), n_layers, self.score_rule == "released", of)

    def scalar_budget(self, candidates: int) -> int:
        """B for a model in which `candidates` scalars may train.

        Raises:
            UsageError: it is more than those.
        """
        return _resolve_count("id3_budget", self.id3_budget, candidates, False, "the scalars that may train")

    def counts(self, n_layers: int) -> LayerCounts:
        """{N_L, N_u, N_v} for a model with `n_layers` layers (paper, Table 8). The released rule floors fractions."""
        trained = n_layers if self.selection == "all" else self.layer_count("trained_layers", n_layers)
        return LayerCounts(n_layers, trained, self.layer_count("kept_layers", n_layers))
