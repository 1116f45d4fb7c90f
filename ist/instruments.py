"""Numbers that describe a run's draws and change nothing in it."""

from collections.abc import Sequence


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
