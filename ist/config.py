"""ISTConfig: every hyper-parameter of the method in one place, and the checks of each."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin

Count = int | float | Literal["all"]  # of layers, or of scalars: a number, a fraction in (0, 1), all


class ConfigError(ValueError):
    """A setting that cannot be used. Names of settings stand in backticks, with `=` before a value.

    Attributes:
        field: the setting that is to blame; None where it is no single one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def check(ok: bool, key: str, allowed: str, value: Any) -> None:
    """Raise a ConfigError naming `key`, what is `allowed` and the `value` that was given, unless `ok`."""
    if not ok:
        raise ConfigError(f"`{key}` must be {allowed}; got {value}.", key)


class LayerCounts(NamedTuple):
    """{N_L, N_u, N_v} of the paper's Table 8."""

    n_layers: int
    trained: int
    kept: int


def parse_count(key: str, value: Count | str) -> Count:
    """An int (a count), a float in (0, 1) (a fraction) or "all"; from a number or its text.

    Raises:
        ConfigError: it is none of them.
    """
    allowed = "a fraction in (0, 1), a count of 1 or more, or all"
    if value == "all":
        return "all"
    try:
        number = (float(value) if re.search(r"[.eE]", value) else int(value)) if isinstance(value, str) else value
    except ValueError:
        number = 0
    if isinstance(number, float) and number > 1 and number.is_integer():  # a sweep's 8.0
        number = int(number)
    if isinstance(number, float) and number == 1:
        raise ConfigError(f"`{key}=1.0` is ambiguous: write 1 for one layer, all for every layer.", key)
    fraction = isinstance(number, float) and 0 < number < 1
    count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
    check(fraction or count, key, allowed, value)
    return number


def resolve_count(key: str, value: Count, total: int, floor: bool, of: str) -> int:
    """How many of `total` a count stands for; a fraction is rounded half up, or down with `floor`, and 1 at least.

    Raises:
        ConfigError: more than `total`.
    """
    if value == "all":
        return total
    if isinstance(value, float):
        return max(1, int(value * total + (0 if floor else 0.5)))
    if value > total:
        allowed = f"a fraction in (0, 1), a count from 1 to {total} ({of}), or all"
        raise ConfigError(f"`{key}` must be {allowed}; got {value}. Lower `{key}`.", key)
    return value


# A cheap probe has the rows of a full one by this: 3 candidates each 10 steps are then some 2 % of the time.
CHEAP = 8


def _choices(annotation: Any) -> tuple[str, ...]:
    """Of Literal[...], with or without `| None`."""
    literal = next((part for part in get_args(annotation) if get_origin(part) is Literal), annotation)
    return get_args(literal)


@dataclass
class ISTConfig:
    """Hyper-parameters of Importance-aware Sparse Tuning; the defaults are the paper's (section 4 and Table 8).

    A layer count is a fraction in (0, 1) of the N_L layers that carry an adapter, rounded half up and at least 1; an
    int from 1 to N_L; or "all". 1.0 is refused as ambiguous.

    Other rules have keys of their own, in the rule's file: `ISTConfig(selection="lisa", lisa_interval=20)`
    is a `LisaConfig`.

    Raises:
        ConfigError: at construction, when a value is out of its range; by `counts`, when a count exceeds N_L.
    """

    _argument_group_name = "selection: which layers are trained"

    selection: str = field(
        default="ist",
        metadata={
            "help": "ist, random, all, lisa, fixed, first, last, semantic[+ist], id3. ist learns layer importance; "
            "random draws N_u layers at each step, lisa every lisa_interval steps; all is plain PEFT, or full "
            "fine-tuning; fixed, first and last always train the same; semantic trains the layers above a "
            "boundary that it finds before training, semantic+ist draws by importance among those; id3 unmasks "
            "single weights step by step, in all layers; middle and gradient_norm: N_u layers in the middle, or by the "
            "means of their gradient norms; placebo and oracle are controls for experiments."
        },
    )
    trained_layers: Count = field(
        default=0.25,
        metadata={
            "help": "N_u, layers trained at each step. A fraction in (0, 1) of the model's layers, a count, or all."
        },
    )
    kept_layers: Count = field(
        default=0.5,
        metadata={"help": "N_v, layers that keep their response in a candidate set. A fraction, a count, or all."},
    )
    candidates: int = field(default=3, metadata={"help": "N_c, candidate sets compared at each importance update."})
    update_interval: int = field(default=10, metadata={"help": "T_c, optimizer steps between importance updates."})
    suppression: float = field(
        default=0.25,
        metadata={
            "help": "beta, factor on the response of layers outside the set. That is, of their adapters, while the loss"
            " of a candidate set is measured."
        },
    )
    score_lr: float | None = field(
        default=None,
        metadata={
            "help": "mu, step size of the scores. Default: 10 (100 suits short runs such as math); 0.2 with "
            "reward_scale sd."
        },
    )
    score_rule: Literal["paper", "released", "expected"] = field(
        default="paper",
        metadata={
            "help": "paper, released or expected. paper is the paper's equations 6 to 10; released is the authors' "
            "code; expected moves the scores by the mean of equations 9 and 10 over all candidate sets, from one "
            "forward and backward by the layers' gates, and draws no sets."
        },
    )
    score_decay: float | None = field(
        default=None,
        metadata={"help": "What is left of a score at the next update. Default: 1, the paper's; 0.95 with expected."},
    )
    reward_scale: Literal["none", "sd"] | None = field(
        default=None,
        metadata={
            "help": "none or sd: rewards divided by their standard deviation. mu is then independent of the task's "
            "loss. Default: none, the paper's; sd with expected."
        },
    )
    shrink: bool | None = field(
        default=None,
        metadata={
            "help": "Shrink effects by their standard error (James-Stein). Where nothing is to be seen layers stay "
            "near uniform. With score_rule expected, and true there by default."
        },
    )
    uniform_candidates: bool = field(
        default=False,
        metadata={"help": "Candidate sets are drawn uniformly. Layers that train still go by the scores."},
    )
    draw: Literal["independent", "stratified"] = field(
        default="independent",
        metadata={"help": "independent or stratified: one of each of N_u bands of depth. By score in its band."},
    )
    draw_interval: int = field(
        default=1, metadata={"help": "Steps that drawn layers stay for. For ist, random, placebo and oracle."}
    )
    anneal_to_fixed: float | None = field(
        default=None,
        metadata={"help": "After this share of the steps the best N_u layers stay. Default: never."},
    )
    probe: Literal["full", "cheap", "gradient"] = field(
        default="full",
        metadata={
            "help": "full, cheap or gradient: how candidate losses are measured. full is the paper's; cheap takes an "
            "eighth of the rows, and all candidates in one forward; gradient (experimental, not the paper's) "
            "estimates the candidates' losses from one backward on as many."
        },
    )
    probe_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Training rows per candidate loss. Default: the global batch (16 with score_rule released; an "
            "eighth with probe cheap or gradient)."
        },
    )
    probe_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a probe row, the last ones. Default: all (cheap, gradient: an eighth of max_length for "
            "each row of a global batch of fewer than 8)."
        },
    )
    layer_stack: Literal["decoder", "encoder", "both"] = field(
        default="decoder",
        metadata={"help": "decoder, encoder or both, where a model has two. The layers are chosen from these."},
    )
    seed: int = field(default=42, metadata={"help": "Of adapter initialisation, data order, draws and dropout."})

    def __new__(cls, *args: Any, **keys: Any) -> "ISTConfig":
        if cls is ISTConfig:
            from ist.selection import config_class  # here: the rules are built on this module

            cls = config_class(args[0] if args else keys.get("selection", "ist"), keys)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        from ist.selection import RULES

        allowed = {"selection": tuple(RULES)}
        for key in ("selection", "score_rule", "probe", "layer_stack", "draw", "reward_scale"):
            choices, given = allowed.get(key) or _choices(ISTConfig.__annotations__[key]), getattr(self, key)
            left_out = key == "reward_scale" and given is None
            check(left_out or given in choices, key, "one of " + ", ".join(choices), given)
        self.trained_layers = parse_count("trained_layers", self.trained_layers)
        self.kept_layers = parse_count("kept_layers", self.kept_layers)
        check(self.candidates >= 2, "candidates", "2 or more (one set is its own mean: reward 0)", self.candidates)
        check(self.update_interval >= 1, "update_interval", "1 or more", self.update_interval)
        check(0 <= self.suppression <= 1, "suppression", "in [0, 1]", self.suppression)
        self._resolve_score_keys()
        check(self.draw_interval >= 1, "draw_interval", "1 or more", self.draw_interval)
        if self.anneal_to_fixed is not None:
            check(0 < self.anneal_to_fixed < 1, "anneal_to_fixed", "in (0, 1)", self.anneal_to_fixed)
        if self.probe_batch_size is not None:
            check(self.probe_batch_size >= 1, "probe_batch_size", "1 or more", self.probe_batch_size)
        if self.probe_max_length is not None:
            check(self.probe_max_length >= 2, "probe_max_length", "2 or more tokens", self.probe_max_length)
        check(0 <= self.seed < 2**32, "seed", "an integer from 0 to 2^32 - 1", self.seed)

    def _resolve_score_keys(self) -> None:
        """Defaults by score_rule, those of `paper` being the paper's."""
        expected = self.score_rule == "expected"
        self.reward_scale = ("sd" if expected else "none") if self.reward_scale is None else self.reward_scale
        self.shrink = expected if self.shrink is None else self.shrink
        decay = (0.95 if expected else 1.0) if self.score_decay is None else self.score_decay
        rate = (0.2 if self.reward_scale == "sd" else 10.0) if self.score_lr is None else self.score_lr
        check(0 <= rate < float("inf"), "score_lr", "a finite number, 0 or more", rate)
        check(0 < decay <= 1, "score_decay", "above 0, and 1 at most", decay)
        self.score_lr, self.score_decay = rate, decay
        check(expected or not self.shrink, "shrink", "left out without `score_rule=expected`, which has errors", True)
        if expected:
            allowed = "full or cheap with `score_rule=expected`, which measures by the gates anyway"
            check(self.probe != "gradient", "probe", allowed, self.probe)
            allowed = "2 or more with `shrink=true`: one row has no standard error"
            check(not self.shrink or self.probe_batch_size != 1, "probe_batch_size", allowed, self.probe_batch_size)

    @property
    def calibrates(self) -> bool:
        """Whether the rule wants a pass over training rows before the first step."""
        return False

    @property
    def suppresses(self) -> bool:
        """Whether the rule learns from losses with suppressed responses."""
        return self.selection in ("ist", "semantic+ist", "placebo")

    def without_rule_keys(self, selection: str, **keys: Any) -> "ISTConfig":
        """The same numbers of the method for another rule."""
        return ISTConfig(**{f.name: getattr(self, f.name) for f in fields(ISTConfig)} | {"selection": selection} | keys)

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
            ConfigError: they are more than the model has.
        """
        of = "the model's layers that carry an adapter"
        return resolve_count(key, getattr(self, key), n_layers, self.score_rule == "released", of)

    def counts(self, n_layers: int) -> LayerCounts:
        """{N_L, N_u, N_v} for a model with `n_layers` layers (paper, Table 8).

        The released rule floors fractions: of N_v the number of the others, those it draws, so that 15 of 29 are kept.
        """
        trained = n_layers if self.selection == "all" else self.layer_count("trained_layers", n_layers)
        kept = self.layer_count("kept_layers", n_layers)
        if self.score_rule == "released" and isinstance(self.kept_layers, float):
            kept = n_layers - int((1 - self.kept_layers) * n_layers + 1e-9)  # 0.3 * 10 is 3 here
        return LayerCounts(n_layers, trained, kept)
