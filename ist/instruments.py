"""Numbers that describe a run's scores and draws, and change nothing in it; and what they say, in sentences."""

from collections.abc import Sequence
from statistics import correlation


def effective_layers(counts: Sequence[int]) -> float:
    """How many layers, each trained equally often, are as concentrated as these (the inverse Simpson index).

    1 / sum_i s_i^2 with the shares s_i = n_i / sum_k n_k: N_L where all layers were trained equally often, N_u where it
    was always the same N_u.

    Args:
        counts: [N_L] n_i, the steps in which layer i was trained.

    Returns:
        From 1 to N_L; 0 where no layer was trained yet.
    """
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / squares if squares else 0.0


def uniform_effective_layers(counts: Sequence[float], steps: float) -> float:
    """Effective layers in the mean where as many layers, drawn uniformly, are trained at each step.

    n_i ~ Binomial(t, p): E[sum n_i^2] = N_L (t p (1 - p) + t^2 p^2), over the square of sum n_i = t p N_L, which every
    draw of N_u layers gives. Its inverse is N_L t p / (1 - p + t p): N_u at the first step, N_L in the end.
    """
    share = min(1.0, sum(counts) / (steps * len(counts))) if steps else 0.0
    return len(counts) * steps * share / (1 - share + steps * share) if share else 0.0


RARE = 0.25  # a layer of this sigmoid(importance) or less is hardly drawn, and no more by its own merit


def rare_layers(probabilities: Sequence[float]) -> int:
    """How many layers have a sigmoid(importance) below 0.25; 0.5 is where they begin."""
    return sum(probability < RARE for probability in probabilities)


class Repeatability:
    """How alike, over layers, successive importance updates are in what they measured; around 0 where that is noise.

    The correlation (Pearson) of an update's measurements with those of the update before, and the mean over updates.
    Where measurements are exchangeable noise one correlation over n layers has the variance 1 / (n - 1), and those of
    successive pairs are uncorrelated: the mean over m pairs has a standard error of 1 / sqrt(m (n - 1)).
    """

    def __init__(self) -> None:
        self.last: list[float] = []
        self.sum, self.pairs = 0.0, 0

    def add(self, measured: Sequence[float]) -> dict[str, float | None]:
        """
        Args:
            measured: [n], one number for each layer that an update measures, always the same layers.

        Returns:
            successive_correlation (None without an update before, or where one of the two is constant),
            mean_correlation and its standard error so far.
        """
        found = None
        if len(self.last) == len(measured) and all(max(one) > min(one) for one in (self.last, measured)):
            found = correlation(self.last, measured)
            self.sum, self.pairs = self.sum + found, self.pairs + 1
        self.last = list(measured)
        known = self.pairs > 0 and len(measured) > 1
        return {
            "successive_correlation": found,
            "mean_correlation": self.sum / self.pairs if known else None,
            "mean_correlation_error": (self.pairs * (len(measured) - 1)) ** -0.5 if known else None,
        }

    def state_dict(self) -> dict:
        """JSON-ready and exact."""
        return {"last": self.last, "sum": self.sum, "pairs": self.pairs}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.sum, self.pairs = list(state["last"]), float(state["sum"]), int(state["pairs"])


def remarks(update: dict, updates: int, counts: Sequence[int], steps: int) -> list[str]:
    """What an importance update says of the scores after it, in sentences: first of all whether they look like chance.

    Args:
        update: the last line of importance.jsonl, the `updates`-th.
        counts: [N_L] steps in which each layer was trained, of `steps`.

    Returns:
        Nothing where neither correlation nor draws look like chance, and no layer is out of the game.
    """
    said, after = [], f"After {updates} importance update{'s' * (updates > 1)}"
    mean, error = update.get("mean_correlation"), update.get("mean_correlation_error")
    if mean is not None and error is not None and mean < 2 * error:
        said.append(
            f"{after} scores are not distinguishable from noise: what successive updates measured correlates by "
            f"{mean:.2f} over layers (noise: {-2 * error:.2f} to {2 * error:.2f})."
        )
    half, n_layers = update.get("split_half"), len(counts)
    if half is not None and n_layers > 1 and half < 2 / (n_layers - 1) ** 0.5:
        said.append(
            f"One half of the last update's rows says little of the other: effects correlate by {half:.2f} over "
            f"layers (noise: up to {2 / (n_layers - 1) ** 0.5:.2f}). Raise probe_batch_size."
        )
    if steps and looks_uniform(counts, steps):
        effective, uniform = effective_layers(counts), uniform_effective_layers(counts, steps)
        said.append(
            f"Layers were trained as evenly as uniform draws train them: {effective:.1f} effective layers of "
            f"{n_layers} (uniform draws: {uniform:.1f})."
        )
    if rare := rare_layers(update.get("probabilities") or ()):
        said.append(
            f"{rare} of {n_layers} layers {'has' if rare == 1 else 'have'} a probability below {RARE}: they are hardly "
            "drawn any more, for training or to be measured."
        )
    return said


def looks_uniform(counts: Sequence[int], steps: int) -> bool:
    """Whether counts are no more unequal than 95 % of those of uniform draws.

    sum_i (n_i - mean)^2 / (steps p (1 - p)) (N_L - 1) / N_L is about chi^2 of N_L - 1 degrees of freedom; its quantile
    by Wilson and Hilferty. False where each layer was trained at every step or at none: nothing was drawn.
    """
    n_layers, mean = len(counts), sum(counts) / max(1, len(counts))
    share = mean / steps
    if n_layers < 2 or set(counts) <= {0, steps}:
        return False
    free = n_layers - 1
    spread = sum((count - mean) ** 2 for count in counts) / (steps * share * (1 - share)) * free / n_layers
    return spread <= free * (1 - 2 / (9 * free) + 1.645 * (2 / (9 * free)) ** 0.5) ** 3
