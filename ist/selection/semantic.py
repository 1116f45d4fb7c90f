"""Semantic-aware layer freezing (Gu et al., Findings of ACL 2025, arXiv 2406.11753), alone and below IST.

One pass without gradients over calibration rows measures how near each layer's output is to the tokens to predict.
The layer that brings it nearest, and all below it, are frozen for good; the ones above are trained.

The paper's: latent spaces 0 .. L between layers; the semantic basis of a token, its row one-hot times the
pseudo-inverse of the LM head; a space's deviation from the basis of the ground-truth token; the gain of a layer as its
reduction of the deviation by a scaling law; freezing the layer of largest gain and all below it; that cost and benefit
of the boundary are weighed.

Ours, as the paper's formulas were not to be had in text: the deviation as mean cosine distance over all predicted
tokens; the gain as the drop of the deviation's logarithm (a power law in depth makes equal ratios equal gains); the
floor `min_trained_layers`; the weighing: with `semantic_budget`, among boundaries whose backward goes through at most
that share of the layers, the one with most gain per layer of backward; and the composition with IST.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ist import distributed
from ist.config import ConfigError, LayerCounts
from ist.layers import LayerMap
from ist.loss import IGNORE
from ist.sampler import ImportanceSampler
from ist.selection.keys import SemanticConfig


class SemanticBases:
    """Semantic bases of tokens: rows of the pseudo-inverse of the LM head.

    With logits = h W^T for a head W [V, d], the basis of token t is onehot(t) (W^T)^+ = W_t (W^T W)^+, so that no
    [V, d] pseudo-inverse is ever made.

    Args:
        head: W, [V, d]; sharded (DTensor) as well: every rank must make one then.
    """

    def __init__(self, head: Tensor) -> None:
        self.head = distributed.full_tensor(head.detach())
        width = self.head.shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.head.device)
        for rows in self.head.split(8192):  # a float64 copy of the whole head would be several times its size
            gram += rows.double().T @ rows.double()
        self._inverse = torch.linalg.pinv(gram, hermitian=True)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[...] tokens -> [..., d] bases, float32."""
        return (self.head[tokens].double() @ self._inverse).float()


def _hidden(output: Tensor | Sequence) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def require_comparable(head: Any, hidden_size: int) -> None:
    """Hidden states can be compared with the head's rows.

    Raises:
        ConfigError: there is no head, or it is not as wide as the hidden states.
    """
    width = head.weight.shape[1] if hasattr(head, "weight") else None
    if width != hidden_size:
        raise ConfigError(
            f"`selection=semantic` compares hidden states (of size {hidden_size}) with rows of the LM head "
            f"({f'of size {width}' if width else 'there is none'}): not with this model. Choose another rule."
        )


@torch.no_grad()
def measure_deviations(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Mean cosine distance of each latent space from the bases of the tokens that were to be predicted.

    Args:
        model: called as model(**batch without labels); its head as `get_output_embeddings` gives it.
        blocks: [L] layers; the spaces are the input of the first and the output of each.
        batches: this rank's share of the calibration rows: input_ids, labels, ... [B, T]. Where the model is sharded,
            as many batches on each rank.

    Returns:
        [L + 1] float64, over the rows of all ranks, on the CPU; each from 0 (they point where the bases do) to 2.

    Raises:
        ConfigError: hidden states and head cannot be compared, or no token is to be predicted in the rows.
        FloatingPointError: a hidden state is not finite.
    """
    bases = SemanticBases(model.get_output_embeddings().weight)
    total = torch.zeros(len(blocks) + 2, dtype=torch.float64, device=bases.head.device)
    wanted: Tensor  # [predicted tokens, d] of the present batch
    predicting: Tensor  # [B, T] whether the position predicts a token that counts

    def observe(space: int, hidden: Tensor) -> None:
        if hidden.shape[:-1] != predicting.shape:
            raise ConfigError(
                f"`selection=semantic` needs one hidden state per token; this model's are {list(hidden.shape)}. Choose "
                "another rule."
            )
        distance = 1 - cosine_similarity(hidden[predicting].float(), wanted, dim=-1)
        total[space] += distance.sum(dtype=torch.float64)

    def observe_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        observe(0, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(observe_input, with_kwargs=True).remove)
        for space, block in enumerate(blocks, 1):
            hook = block.register_forward_hook(lambda _, args, output, space=space: observe(space, _hidden(output)))
            hooks.callback(hook.remove)
        for batch in batches:
            targets = torch.full_like(batch["labels"], IGNORE)
            targets[:, :-1] = batch["labels"][:, 1:]
            predicting = targets != IGNORE
            wanted = bases(targets[predicting])
            total[-1] += predicting.sum()
            model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    *sums, tokens = distributed.reduce_sum(total).cpu()
    if not tokens:
        raise ConfigError("`semantic_rows`: no token is to be predicted in these rows. Take more.")
    deviations = torch.stack(sums) / tokens
    if not deviations.isfinite().all():
        raise FloatingPointError(f"a hidden state of the calibration rows is not finite: {deviations.tolist()}")
    return deviations


def layer_gains(deviations: Sequence[float]) -> list[float]:
    """[L + 1] deviations -> [L] gains: the drop of the deviation's logarithm from a layer's input to its output."""
    logarithm = torch.tensor(deviations, dtype=torch.float64).clamp_min(1e-12).log()
    return (logarithm[:-1] - logarithm[1:]).tolist()


def choose_boundary(gains: Sequence[float], above: Sequence[int], floor: int, most: int | None) -> int:
    """The highest frozen layer: of largest gain; where cost is limited, of largest gain per layer of backward.

    Args:
        gains: [L].
        above: [L] the layers above each that can be trained, which the backward then goes through.
        floor: layers to leave above it, at least 1.
        most: layers that the backward may go through, `floor` or more; None is no limit.

    Returns:
        0 to L - 1; -1, nothing is frozen, where no layer has `floor` others above it.
    """
    allowed = [i for i, count in enumerate(above) if floor <= count <= (count if most is None else most)]
    return max(allowed, key=lambda i: gains[i] if most is None else gains[i] / above[i], default=-1)


class SemanticFreezing:
    """`semantic` trains all layers above the boundary, `semantic+ist` draws N_u of them by importance.

    Gains are of all layers of the model; those that carry an adapter above the boundary are trained. Importance is
    learned as if there were only these: fractions are of them, and the ones below keep their response, whatever it is.
    Scores below stay 0.

    Args:
        n_layers: N_L.
        config: `min_trained_layers`, `semantic_budget`, and IST's for `semantic+ist`.

    Attributes:
        deviations: [L + 1] as `see` got them; None before.
        boundary: the highest frozen layer of the model, from 0; -1 where none is; None before.
        frozen: how many of the N_L layers are at or below it.

    Raises:
        ConfigError: the floor or the budget leave no boundary.
    """

    plans = True

    def __init__(self, n_layers: int, config: SemanticConfig) -> None:
        self.config = config
        self.total_steps: int | None = None  # as ImportanceSampler's
        self.deviations: list[float] | None = None
        self.positions: list[int] | None = None
        self.boundary: int | None = None
        self.frozen = 0
        self._above: ImportanceSampler | None = None
        with_ist = config.selection == "semantic+ist"
        kept = config.layer_count("kept_layers", n_layers) if with_ist else n_layers
        self.counts = LayerCounts(n_layers, n_layers, kept)
        self._floor = config.layer_count("min_trained_layers", n_layers)
        floor = f"`min_trained_layers={config.min_trained_layers}`"
        for key in ("trained_layers", "kept_layers") if with_ist else ():
            count = getattr(config, key)  # a fraction, and all, are of the layers above, however many they will be
            config.layer_count(key, n_layers)
            if isinstance(count, int) and count > self._floor:
                self._floor, floor = count, f"`{key}={count}`"
        if self._floor >= n_layers > 1:
            raise ConfigError(f"{floor} leaves no layer to freeze: {n_layers} can be trained. Choose fewer.")
        self._most = None if config.semantic_budget is None else int(config.semantic_budget * n_layers + 1e-9)
        if self._most is not None and self._most < self._floor:
            raise ConfigError(
                f"`semantic_budget={config.semantic_budget}` leaves nothing to train: the backward may go through "
                f"{self._most} of {n_layers} layers, {floor} wants {self._floor}. Raise it."
            )

    @property
    def calibrated(self) -> bool:
        return self.boundary is not None

    @property
    def _learner(self) -> ImportanceSampler:
        """The sampler of the layers above the boundary."""
        if self._above is None:
            raise RuntimeError("a semantic rule chooses layers after its pass over training rows: calibrate it first")
        return self._above

    def calibrate(self, model: nn.Module, layers: LayerMap, batches: Iterable[dict[str, Tensor]]) -> None:
        self.see(measure_deviations(model, layers.all_blocks, batches).tolist(), layers.positions)

    def see(self, deviations: Sequence[float], positions: Sequence[int] | None = None) -> None:
        """Set the boundary.

        Args:
            deviations: [L + 1] of `measure_deviations`.
            positions: [N_L] of the layers that can be trained among the model's L; default: they are all.
        """
        n_layers = self.counts.n_layers
        self.deviations = [float(value) for value in deviations]
        self.positions = list(range(n_layers) if positions is None else positions)
        gains = layer_gains(self.deviations)
        above = [sum(position > i for position in self.positions) for i in range(len(gains))]
        self.boundary = choose_boundary(gains, above, self._floor, self._most)
        self.frozen = sum(position <= self.boundary for position in self.positions)
        if self.config.selection == "semantic+ist":
            config = self.config.without_rule_keys("ist")
        else:
            config = self.config.without_rule_keys("all", kept_layers="all")
        self._above = ImportanceSampler(n_layers - self.frozen, config)
        self._above.total_steps = self.total_steps
        self.counts = LayerCounts(n_layers, self._above.counts.trained, self._above.counts.kept)

    def summary(self) -> dict:
        gains = layer_gains(self.deviations or [])
        return {"boundary": self.boundary, "frozen": self.frozen, "deviations": self.deviations, "gains": gains}

    @property
    def importance(self) -> Tensor:
        """[N_L] as ImportanceSampler's; 0 below the boundary."""
        return torch.cat([torch.zeros(self.frozen, dtype=torch.float64), self._learner.importance])

    def due(self, step: int) -> bool:
        return self._learner.due(step)

    def trained(self, step: int) -> list[int]:
        return self._raised(self._learner.trained(step))

    def candidates(self, step: int) -> list[list[int]]:
        frozen = list(range(self.frozen))
        return [frozen + self._raised(kept) for kept in self._learner.candidates(step)]

    def update(self, candidates: Sequence[Sequence[int]], losses: Sequence[float]) -> list[float]:
        return self._learner.update(
            [[i - self.frozen for i in kept if i >= self.frozen] for kept in candidates], losses
        )

    @property
    def probed(self) -> list[int]:
        return self._raised(self._learner.probed)

    @property
    def mean_gate(self) -> float:
        return self._learner.mean_gate

    def learn(self, effects: Tensor, standard_errors: Tensor | None) -> dict | None:
        return self._learner.learn(effects, standard_errors)

    def state_dict(self) -> dict:
        seen = {"deviations": self.deviations, "positions": self.positions}
        return seen | (self._above.state_dict() if self._above else {})

    def load_state_dict(self, state: dict) -> None:
        if state["deviations"] is not None:
            self.see(state["deviations"], state["positions"])
            self._learner.load_state_dict(state)

    def _raised(self, layers: Iterable[int]) -> list[int]:
        return [self.frozen + i for i in layers]
