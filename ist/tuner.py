"""SparseTuner: the two loops of the paper's Algorithm 1, for any training loop."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ist import distributed, probe
from ist.config import ConfigError, ISTConfig
from ist.instruments import Repeatability, effective_layers, rare_layers
from ist.layers import LayerMap
from ist.loss import Loss, token_loss
from ist.selection import CalibratedRule, GradientNorm, make_rule
from ist.selection.shards import joint_norms
from ist.suppression import evaluation_mode

ProbeBatches = Callable[[int | str], Iterable[dict[str, Tensor]]]
PROBES = {"full": probe.one_by_one, "cheap": probe.stacked, "gradient": probe.estimated}


class SparseTuner:
    """Freezes all layers but those that a rule chooses at each step, and measures the losses that the rule learns from.

    Build it last, when the optimizer (over *all* adapter parameters) exists and the model is prepared:

        tuner = SparseTuner(model, ISTConfig(), probe_batches)
        for step in range(max_steps):
            update = tuner.begin_step(step)   # before the first forward of the step; an update's record, or None
            ...                               # forward, backward, clip tuner.trained_parameters(), optimizer.step()
            optimizer.zero_grad(set_to_none=True)   # None, not zero: a resting layer must not move

    Args:
        model: a PEFT model, unwrapped (`accelerator.unwrap_model`) but already sharded where it is to be; or, for
            rules that suppress nothing, any model whose layers' own weights train.
        config: the rule and its hyper-parameters.
        probe_batches: step -> this rank's share of the probe rows of that step, the same rows at every call;
            "calibration" -> of `config.semantic_rows` training rows; as batches on the model's device, as many on each
            rank. Called by ist, semantic and semantic+ist.
        loss: (model, batch) -> (sum of token losses, number of predicted tokens).

    Raises:
        ConfigError: the rule's keys do not fit the model's layers, or it suppresses responses and there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ISTConfig,
        probe_batches: ProbeBatches | None = None,
        loss: Loss = token_loss,
    ) -> None:
        self.model = model
        self.config = config
        self.probe_batches = probe_batches
        self.loss = loss
        self.layers = LayerMap(model, config.layer_stack)
        self.rule = make_rule(self.layers.n_layers, config)
        if config.suppresses and not any(self.layers.modules):
            raise ConfigError(
                f"`selection={config.selection}` suppresses adapters, and the model has none.", "selection"
            )
        self.trained: list[int] = list(range(self.layers.n_layers))
        self.trained_counts = [0] * self.layers.n_layers
        self.repeatability = Repeatability()
        self.probe_seconds = 0.0
        self._outside = {id(model.get_parameter(name)) for name in self.layers.outside}
        in_layers = {id(parameter) for layer in self.layers.parameters for parameter in layer}
        self._all = [p for p in model.parameters() if id(p) in in_layers or id(p) in self._outside]
        self._plan: dict[int, list[int]] = {}

    def prepare(self) -> dict | None:
        """Make the pass before training that a rule asks for (semantic), unless its answer is known.

        `begin_step` makes it too, where it was not made.

        Returns:
            The rule's summary (deviations, boundary); None for the other rules.

        Raises:
            FloatingPointError: a hidden state is not finite.
        """
        if not isinstance(self.rule, CalibratedRule):
            return None
        if not self.rule.calibrated:
            probe_batches = self._require_batches()
            with evaluation_mode(self.model):
                self.rule.calibrate(self.model, self.layers, probe_batches("calibration"))
        return self.rule.summary()

    def begin_step(self, step: int) -> dict | None:
        """An update if one is due, then the selection of `step` (counted from 0), set on the model.

        Returns:
            The update's line of importance.jsonl, or None when none was due.

        Raises:
            RuntimeError: ranks disagree on what the rule has learned or on the layers to train.
            FloatingPointError: a candidate loss is not finite.
        """
        update = None
        if step not in self._plan:
            self.prepare()
            update = self.update_importance(step) if self.rule.due(step) else None
            # Scores stay put until the next update, so that all selections up to it are known, and compared, now; a
            # thousand at most, as the run may end long before. A rule that learns at every step has one.
            interval = self.config.update_interval
            end = min((step // interval + 1) * interval, step + (1000 if self.rule.plans else 1))
            self._plan = {s: self.rule.trained(s) for s in range(step, end)}
            self._require_agreement(step)
        self._activate(self._plan[step])
        return update

    def update_importance(self, step: int) -> dict:
        """The importance loop: one loss per candidate set, everything outside the set suppressed (Eq. 8-10)."""
        start = time.perf_counter()
        batches = partial(self._require_batches(), step)
        measure = self._learn_effects if self.config.score_rule == "expected" else self._compare_candidates
        measured = measure(step, batches)
        seconds = time.perf_counter() - start
        self.probe_seconds += seconds
        importance = self.rule.importance
        probabilities = torch.sigmoid(importance).tolist()
        return {
            "step": step,
            "scores": importance.tolist(),
            "probabilities": probabilities,
            **measured,
            **self.repeatability.add(self._measured_by_layer(measured)),
            "rare_layers": rare_layers(probabilities),
            "probe_seconds": seconds,
            "effective_layers": effective_layers(self.trained_counts),  # of the `step` steps before this update
        }

    def _compare_candidates(self, step: int, batches: probe.Batches) -> dict:
        """Losses of candidate sets, all outside a set suppressed, and what the rule learns of them (Eq. 8-10)."""
        candidates = self.rule.candidates(step)
        measure = PROBES[self.config.probe]
        if self.config.probe == "gradient":
            measure = partial(probe.estimated, probed=self.rule.probed)
        with evaluation_mode(self.model):
            sums = measure(self.model, self.layers, candidates, self.config.suppression, batches, self.loss)
        loss_sum, tokens = distributed.reduce_sum(sums).unbind(dim=1)
        losses = (loss_sum / tokens).tolist()
        return {"candidates": candidates, "losses": losses, "rewards": self.rule.update(candidates, losses)}

    def _learn_effects(self, step: int, batches: probe.Batches) -> dict:
        """The effect of each layer at the mean gate, and what the rule learns of it: Eq. 9-10 in the mean."""
        probed, gate = self.rule.probed, self.rule.mean_gate
        with evaluation_mode(self.model):
            found = probe.gate_derivatives(self.model, self.layers, probed, gate, batches(), self.loss)
        sums = distributed.reduce_sum(probe.effect_sums(found))
        if not sums.isfinite().all():
            raise FloatingPointError(f"the loss of the importance update before step {step} is not finite")
        seen = probe.effects(sums.cpu(), self.config.suppression)
        learned = self.rule.learn(seen.effects, seen.standard_errors)
        return {
            "candidates": [],
            "losses": [seen.loss],
            "rewards": [],
            "effects": self._by_layer(seen.effects),
            "standard_errors": self._by_layer(seen.standard_errors),
            "split_half": seen.split_half,
            **(learned or {}),
        }

    def _measured_by_layer(self, measured: dict) -> list[float]:
        """For each probed layer what an update moves its score by, but for a factor that all have."""
        if "effects" in measured:  # in the order in which the rule has learned them
            effects = [measured["effects"][i] for i in self.rule.probed]
            return [effects[i] for i in measured.get("permutation", range(len(effects)))]
        sets = list(zip(measured["rewards"], measured["candidates"], strict=True))
        return [sum(reward for reward, kept in sets if i in kept) for i in self.rule.probed]

    def _by_layer(self, values: Tensor | None) -> list[float] | None:
        """[N_L] of values of the probed layers; 0 for the others."""
        if values is None:
            return None
        whole = [0.0] * self.layers.n_layers
        for i, value in zip(self.rule.probed, values.tolist(), strict=True):
            whole[i] = value
        return whole

    def observe_gradients(self) -> None:
        """Tell a rule that learns from gradients those of the trained layers; after the backward of a step."""
        if isinstance(self.rule, GradientNorm):
            gradients = [[p.grad for p in self.layers.parameters[i] if p.grad is not None] for i in self.trained]
            self.rule.observe(self.trained, joint_norms(gradients))

    def trained_buckets(self) -> list[list[nn.Parameter]]:
        """Trained parameters by layer in the order of the backward: the top layer first, those outside layers last."""
        outside = [parameter for parameter in self._all if id(parameter) in self._outside]
        return [*(self.layers.parameters[i] for i in reversed(self.trained)), outside]

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that train at the present step, in the model's order: clip these."""
        trained = {id(parameter) for i in self.trained for parameter in self.layers.parameters[i]}
        return [parameter for parameter in self._all if id(parameter) in trained or id(parameter) in self._outside]

    def release(self) -> None:
        """Let every layer train again, as it was before the tuner was built."""
        for parameters in self.layers.parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer by itself: the graph of the whole model changes with the draw."""
        for block in self.layers.blocks:
            # Dynamic: rows differ in length, and each new length would be another graph.
            block.compile(backend=backend, dynamic=True)

    def state_dict(self) -> dict:
        """The rule's state and the counts of trained steps, JSON-ready; draws depend on (seed, step) alone."""
        state = {**self.rule.state_dict(), "trained_counts": self.trained_counts}
        return state | ({"repeatability": self.repeatability.state_dict()} if self.repeatability.last else {})

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            ValueError: it is of a model with another number of layers.
        """
        self.rule.load_state_dict(state)
        counts = list(state["trained_counts"])
        if len(counts) != len(self.trained_counts) or any(type(count) is not int for count in counts):
            raise ValueError(f"trained_counts must be {len(self.trained_counts)} integers; got {counts}")
        self.trained_counts = counts
        if "repeatability" in state:  # checkpoints of earlier versions lack it
            self.repeatability.load_state_dict(state["repeatability"])
        self._plan = {}

    def _require_batches(self) -> ProbeBatches:
        if self.probe_batches is None:
            raise ValueError(f"selection {self.config.selection} needs probe_batches: see SparseTuner's docstring")
        return self.probe_batches

    def _activate(self, trained: list[int]) -> None:
        for i, parameters in enumerate(self.layers.parameters):
            for parameter in parameters:
                parameter.requires_grad_(i in trained)
        for i in trained:
            self.trained_counts[i] += 1
        self.trained = trained

    def _require_agreement(self, step: int) -> None:
        decision = json.dumps([step, self.rule.state_dict(), list(self._plan.values())])
        distributed.require_agreement(f"the layers of step {step}", hashlib.sha256(decision.encode()).hexdigest()[:16])
