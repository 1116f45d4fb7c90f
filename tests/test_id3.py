"""ID3 beside a dense float64 reference and the authors' package; its optimizer beside AdamW; budgets, ranks, resume."""

import copy
import json
from pathlib import Path

import pytest
import rules
import torch
from conftest import read_lines, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from selective_optimizers.wrap import get_selective_optimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ist import ISTConfig, SparseTuner
from ist.adapters import ParallelConfig, SeriesConfig
from ist.selection import StepwiseUnmasking, id3
from ist.selection.packed_adamw import PackedAdamW
from ist.training import model as training_model
from ist.training.command_line import UsageError

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "series": SeriesConfig(bottleneck_size=4),
    "parallel": ParallelConfig(bottleneck_size=4),
    "none": None,
}


def tiny_model(adapter: str = "lora", dtype: torch.dtype = torch.float32) -> nn.Module:
    """In float64 weights are those of float32, so that two precisions start from the same point."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(2, vocab_size=100))
    if config := ADAPTERS[adapter]:
        model = get_peft_model(model, copy.deepcopy(config))
    return model.train().to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rule_on(
    parameters: dict[str, nn.Parameter], max_steps: int, lr: float = 1e-2, weight_decay: float = 0.1, **options
) -> StepwiseUnmasking:
    rule = StepwiseUnmasking(2, ISTConfig(selection="id3", **options))
    rule.attach(parameters, PackedAdamW(parameters.values(), lr=lr, weight_decay=weight_decay), max_steps)
    return rule


def masks_of(rule: StepwiseUnmasking) -> list[torch.Tensor]:
    """[numel] bool of each parameter, True where unmasked."""
    masks = [torch.zeros(parameter.numel(), dtype=torch.bool) for parameter in rule.parameters]
    for mask, parameter in zip(masks, rule.parameters, strict=True):
        mask[rule.optimizer.chosen(parameter).long()] = True
    return masks


class DenseId3:
    """The method on dense float64 tensors, by the book: one score for every scalar, one sort, moments for all."""

    def __init__(self, parameters, budget, steps, exponent=1.0, eps=1e-3, lr=1e-2, weight_decay=0.1):
        self.parameters, self.budget, self.steps = list(parameters), budget, steps
        self.exponent, self.eps, self.lr, self.weight_decay = exponent, eps, lr, weight_decay
        self.mask = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.bool)
        self.m, self.v, self.updates = (torch.zeros(len(self.mask), dtype=torch.float64) for _ in range(3))

    @torch.no_grad()
    def step(self, t: int) -> None:
        theta = torch.cat([p.flatten() for p in self.parameters]).double()
        grad = torch.cat([p.grad.flatten() for p in self.parameters]).double()
        score = grad.abs() / (theta.abs() + self.eps) ** self.exponent
        due = self.budget * min(t + 1, self.steps) // self.steps - int(self.mask.sum())
        score[self.mask] = -1
        self.mask[torch.sort(score, descending=True, stable=True).indices[:due]] = True
        self.updates += self.mask
        self.m = torch.where(self.mask, 0.9 * self.m + 0.1 * grad, 0)
        self.v = torch.where(self.mask, 0.999 * self.v + 0.001 * grad**2, 0)
        update = (self.m / (1 - 0.9**self.updates)) / ((self.v / (1 - 0.999**self.updates)).sqrt() + 1e-8)
        moved = theta * (1 - self.lr * self.weight_decay) - self.lr * update
        theta = torch.where(self.mask, moved, theta)
        for p, part in zip(self.parameters, theta.split([p.numel() for p in self.parameters])):
            p.copy_(part.view_as(p))


# ------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("lora", {"id3_budget": 0.25}),
        ("lora", {"id3_budget": 17}),  # B < T
        ("lora", {"id3_budget": 1234, "id3_steps": 37, "id3_exponent": 0.5, "id3_eps": 0.1}),  # B / T not whole
        ("lora", {"id3_budget": 0.9, "id3_steps": 1}),  # more than LoRA's A, all of whose gradients are zero
        ("none", {"id3_budget": 0.3, "id3_exponent": 0}),
        ("series", {"id3_budget": 0.2}),
        ("parallel", {"id3_budget": "all", "id3_exponent": 2}),
    ],
)
def test_masks_are_those_of_a_dense_float64_reference(adapter, options, dtype):
    ours, theirs = tiny_model(adapter, dtype), tiny_model(adapter, torch.float64)
    parameters, start = trainable(ours), [p.detach().clone() for p in trainable(ours).values()]
    rule = rule_on(parameters, 50, **options)
    keys = {"exponent": rule.config.id3_exponent, "eps": rule.config.id3_eps}
    reference = DenseId3(trainable(theirs).values(), rule.budget, options.get("id3_steps", 50), **keys)
    generator, unmasked = torch.Generator().manual_seed(1), []
    for t in range(50):
        ids = torch.randint(0, 100, (2, 12), generator=generator)
        for model in (ours, theirs):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        unmasked.append(rule.unmask(t))
        rule.optimizer.step()
        reference.step(t)
        masks = masks_of(rule)
        assert torch.equal(torch.cat(masks), reference.mask), t
        assert sum(mask.sum() for mask in masks) == rule.unmasked == unmasked[-1] <= rule.budget
        for p, mask, first, other in zip(parameters.values(), masks, start, reference.parameters, strict=True):
            assert torch.equal(p.flatten()[~mask], first.flatten()[~mask])
            torch.testing.assert_close(p.double(), other, rtol=0, atol=1e-10 if dtype == torch.float64 else 2e-3)
    instalments = [b - a for a, b in zip([0, *unmasked], unmasked)]
    assert max(instalments[: rule.steps]) - min(instalments[: rule.steps]) <= 1  # equal, the remainder spread
    assert not any(instalments[rule.steps :])
    assert unmasked[rule.steps - 1] == rule.budget
    if rule.budget < rule.candidates:
        assert any((p != q).any() for p, q in zip(parameters.values(), start))
    else:
        assert all(mask.all() for mask in masks)


def test_the_score_of_a_zero_initialised_b_is_finite_and_eps_weighs_it():
    """With B = 0 its scores are |g| / eps^exp, and all of A has gradient zero, until B has moved."""
    shares = {}
    for eps in (1e-3, 10.0):
        model = tiny_model()
        rule = rule_on(trainable(model), 2, id3_budget=0.4, id3_eps=eps)
        for t in range(2):
            model.zero_grad()
            model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
            rule.unmask(t)
            rule.optimizer.step()
            of_b = [("lora_B" in name, mask.sum().item()) for name, mask in zip(trainable(model), masks_of(rule))]
            shares[eps, t] = sum(n for is_b, n in of_b if is_b) / sum(n for _, n in of_b)
        assert all(p.isfinite().all() for p in model.parameters())
    assert shares[1e-3, 0] == shares[10.0, 0] == 1  # whatever eps: all else scores 0
    assert shares[1e-3, 1] > shares[10.0, 1]  # later, a small eps prefers what is near zero


def test_ties_go_by_parameter_and_position():
    parameters = {name: nn.Parameter(torch.ones(2, 3)) for name in "ab"}
    rule = rule_on(parameters, 3, id3_budget=9)
    parameters["b"].grad = torch.zeros(2, 3)
    parameters["b"].grad[1, 1] = 1
    rule.unmask(0)  # "a" has no gradient at all: as zero
    assert [mask.nonzero().flatten().tolist() for mask in masks_of(rule)] == [[0, 1], [4]]
    parameters["a"].grad.zero_()[1, 2] = 1
    parameters["b"].grad.zero_()[0, 0] = -0.0
    rule.unmask(1)
    assert [mask.nonzero().flatten().tolist() for mask in masks_of(rule)] == [[0, 1, 2, 3, 5], [4]]


def test_a_score_that_is_not_a_number_is_one_of_the_candidates():
    """The run stops for such a gradient at the next logged step; until then the count must hold on all ranks."""
    parameter = nn.Parameter(torch.tensor([1e30, 1.0, 1.0, 1.0]))
    rule = rule_on({"p": parameter}, 1, id3_budget=3, id3_exponent=2)
    parameter.grad = torch.tensor([float("inf"), 0.0, 1.0, float("nan")])  # inf / inf is a NaN with a sign
    assert rule.unmask(0) == 3
    assert masks_of(rule)[0].tolist() == [True, False, True, True]


def test_against_the_authors_package():
    """selective_optimizers 0.4, where it is exact: B a multiple of T, no equal scores, nothing moves."""

    def parameters():
        generator = torch.Generator().manual_seed(0)
        return {name: nn.Parameter(torch.randn(30, 20, generator=generator)) for name in "abc"}

    ours, theirs = parameters(), parameters()
    rule = rule_on(ours, 20, lr=0, id3_budget=500)
    kind = get_selective_optimizer(torch.optim.AdamW, "id3")
    published = kind(theirs.values(), lr=0, budget=500, max_steps=20, exp=1.0, eps=1e-3, verify=False)
    generator = torch.Generator().manual_seed(1)
    for t in range(20):
        for one, two in zip(ours.values(), theirs.values()):
            one.grad = torch.randn(30, 20, generator=generator)
            two.grad = one.grad.clone()
        rule.unmask(t)
        published.step()
        for mask, expected in zip(masks_of(rule), published.param_groups[0]["chosen_masks"], strict=True):
            assert torch.equal(mask, expected.flatten())
    assert rule.unmasked == published.get_budget_used() == 500


@pytest.mark.parametrize(("budget", "steps", "spent"), [(1000, 300, 1200), (999, 50, 1000), (30, 50, None)])
def test_where_the_authors_package_misses_its_budget(budget, steps, spent):
    """0.4 never advances its step counter, so that each instalment has the remainder's extra scalar; B < T stops it."""
    theirs, ours = (nn.Parameter(torch.randn(2000, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    rule = rule_on({"p": ours}, steps, id3_budget=budget)
    kind = get_selective_optimizer(torch.optim.AdamW, "id3")
    published = kind([theirs], lr=1e-3, budget=budget, max_steps=steps, exp=1.0, eps=1e-3, verify=False)
    generator = torch.Generator().manual_seed(1)
    for t in range(steps):
        ours.grad = torch.randn(2000, generator=generator)
        theirs.grad = ours.grad.clone()
        rule.unmask(t)
        rule.optimizer.step()
        if spent is None:
            with pytest.raises(AssertionError):
                published.step()
        else:
            published.step()
    assert rule.unmasked == budget
    assert spent is None or published.get_budget_used() == spent


# ---------------------------------------------------------------------------------------------- the optimizer


def test_all_scalars_chosen_is_adamw_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 5, generator=generator), torch.randn(11, generator=generator)]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    options = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    packed, dense = PackedAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for parameter in ours:
        packed.choose(parameter, torch.randperm(parameter.numel(), generator=generator))
    schedule = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 200) for o in (packed, dense)]
    for _ in range(200):
        for one, two in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        packed.step()
        dense.step()
        for one in schedule:
            one.step()
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs))


def test_a_scalar_chosen_later_begins_as_in_a_new_adamw():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(3))) for _ in range(2))
    packed = PackedAdamW([ours], lr=1e-2, weight_decay=0.1)
    dense = {}
    order = torch.randperm(40, generator=generator)
    for t in range(60):
        gradient = torch.randn(40, generator=generator)
        if t % 15 == 0:
            cohort = order[t // 15 * 8 : t // 15 * 8 + 8]
            packed.choose(ours, cohort)
            parameter = nn.Parameter(theirs.detach()[cohort].clone())
            dense[t] = (cohort, parameter, torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1))
        ours.grad = gradient
        packed.step()
        for cohort, parameter, optimizer in dense.values():
            parameter.grad = gradient[cohort]
            optimizer.step()
            assert torch.equal(ours[cohort], parameter)
    assert torch.equal(ours[order[32:]], theirs[order[32:]])


def test_state_bytes_beside_adamw():
    parameters = trainable(tiny_model())
    n_scalars = sum(p.numel() for p in parameters.values())
    dense = torch.optim.AdamW(parameters.values())
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    dense.step()
    moments = sum(s[key].nbytes for s in dense.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert moments == 8 * n_scalars
    for budget in (0.05, 0.25):
        rule = rule_on(parameters, 10, id3_budget=budget)
        for t in range(10):
            for p in parameters.values():
                p.grad = torch.randn_like(p)
            rule.unmask(t)
            rule.optimizer.step()
            held = {tensor.data_ptr(): tensor for state in rule.optimizer.state.values() for tensor in state.values()}
            assert sum(t.untyped_storage().nbytes() for t in held.values()) == 16 * rule.unmasked
        assert rule.optimizer.state_bytes() == 16 * rule.budget < 2.01 * budget * moments


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def test_no_temporary_is_larger_than_the_largest_tensor():
    parameters = {str(i): nn.Parameter(torch.randn(400, 1000)) for i in range(6)}
    rule = rule_on(parameters, 10, id3_budget=0.1)
    with Largest() as largest:
        for t in range(3):
            for p in parameters.values():
                p.grad = torch.randn_like(p)
            rule.unmask(t)
            rule.optimizer.step()
    assert largest.nbytes == 400 * 1000 * 4


def test_ranks_that_would_unmask_otherwise_are_told_apart(monkeypatch):
    digests = []
    monkeypatch.setattr(id3, "require_agreement", lambda what, digest: digests.append((what, digest)))
    for other in (5, 5, 6):  # on the third rank two gradients have changed places: the same scores, elsewhere
        parameter = nn.Parameter(torch.ones(100))
        rule = rule_on({"p": parameter}, 2, id3_budget=20)
        for t in range(2):
            parameter.grad = torch.arange(100.0)
            parameter.grad[[other, 95]] = parameter.grad[[95, other]]
            rule.unmask(t)
    assert [what for what, _ in digests] == ["the scalars of step 0", "the scalars of step 1"] * 3
    assert digests[:2] == digests[2:4]
    assert digests[0] != digests[1]
    assert digests[4] != digests[0]


# ------------------------------------------------------------------------------------------------ in train_ist.py


@pytest.mark.parametrize("peft_method", ["lora", "series", "parallel", "none"])
def test_masked_scalars_stay_and_the_norm_is_of_what_moves(train, tiny, tmp_path, monkeypatch, peft_method):
    attach, unmask = StepwiseUnmasking.attach, StepwiseUnmasking.unmask
    seen = {"norm": [], "step": []}

    def attached(rule, parameters, *args):
        seen.update(rule=rule, start={name: p.detach().clone() for name, p in parameters.items()}, names=parameters)
        attach(rule, parameters, *args)

    def unmasked(rule, step):
        gradients = [p.grad.flatten().clone() for p in rule.parameters]
        number = unmask(rule, step)
        kept = [g[mask].double().square().sum() for g, mask in zip(gradients, masks_of(rule), strict=True)]
        seen["norm"].append(sum(kept).sqrt().item())
        assert sum(p.grad.count_nonzero() for p in rule.parameters) <= number
        return number

    monkeypatch.setattr(StepwiseUnmasking, "attach", attached)
    monkeypatch.setattr(StepwiseUnmasking, "unmask", unmasked)
    options = {"peft_method": peft_method, "weight_decay": 0.1, "id3_budget": 777, "bottleneck_size": 4}
    assert train(selection="id3", lora_dropout=0.1, save_steps=20, **options) == 0
    rule = seen["rule"]
    for (name, start), mask in zip(seen["start"].items(), masks_of(rule), strict=True):
        now = seen["names"][name].flatten()
        assert torch.equal(now[~mask], start.flatten()[~mask])
        assert (now[mask] != start.flatten()[mask]).float().mean() > 0.99 or not mask.any()
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["unmasked_scalars"] for line in lines] == [777 * t // 20 for t in range(1, 21)]
    assert [line["grad_norm"] for line in lines] == pytest.approx(seen["norm"], rel=1e-5)
    assert all(line["trained_layers"] == [0, 1, 2, 3] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    summary = json.loads((tmp_path / "run/run.json").read_text())["id3"]
    assert summary["unmasked"] == summary["budget"] == 777
    in_layers = sum(summary["unmasked_by_layer"])  # without adapters, embeddings and head are candidates too
    assert 0 < in_layers < 777 if peft_method == "none" else in_layers == 777
    file = load_file(tmp_path / "run/checkpoints/step_000020/optimizer.safetensors")
    assert sum(len(tensor) for key, tensor in file.items() if key.endswith("|indices")) == 777
    if peft_method == "none":
        assert (tmp_path / "run/model").exists()
        return
    base = AutoModelForCausalLM.from_pretrained(tiny)
    saved = dict(PeftModel.from_pretrained(base, tmp_path / "run/adapter").named_parameters())
    assert all(torch.equal(saved[name], seen["names"][name]) for name in seen["names"])


def test_all_unmasked_at_once_is_plain_lora_bit_for_bit(train, tmp_path):
    options = {"lora_dropout": 0.1, "weight_decay": 0.1}
    assert train(selection="all", output_dir=tmp_path / "plain", **options) == 0
    assert train(selection="id3", id3_budget="all", id3_steps=1, output_dir=tmp_path / "id3", **options) == 0
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("plain", "id3"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def unmasked_at(run: Path, step: int) -> dict[str, dict[int, int]]:
    """{parameter: {position: step at which it was unmasked}} from the checkpoint after `step` steps."""
    file = load_file(run / f"checkpoints/step_{step:06d}/optimizer.safetensors")
    names = [key.removesuffix("|indices") for key in file if key.endswith("|indices")]
    return {n: dict(zip(file[f"{n}|indices"].tolist(), (step - file[f"{n}|step"]).tolist())) for n in names}


def share_of_same(one: dict[str, dict], two: dict[str, dict]) -> float:
    """The share of scalars that both unmask, at the same step."""
    there = {(name, scalar, step) for name, scalars in one.items() for scalar, step in scalars.items()}
    here = {(name, scalar, step) for name, scalars in two.items() for scalar, step in scalars.items()}
    assert len(there) == len(here) > 0
    return len(there & here) / len(there)


@pytest.mark.parametrize("name", [name for name in rules.ARMS if name.startswith("id3")])
def test_one_process_ddp_and_fsdp2_unmask_the_same(work, topologies, name):
    one = work / "one" / rules.slug(name)
    expected = unmasked_at(one, 20)
    summary = json.loads((one / "run.json").read_text())["id3"]
    assert sum(map(len, expected.values())) == summary["budget"] == summary["unmasked"]
    steps = sorted(step for parameter in expected.values() for step in parameter.values())
    due = [summary["budget"] * min(t, summary["steps"]) // summary["steps"] for t in range(21)]
    assert steps == [t for t in range(20) for _ in range(due[t + 1] - due[t])]
    for topology in ("ddp", "fsdp2"):
        run = work / topology / rules.slug(name)
        for step in (10, 20):
            # Gradients of two topologies differ by rounding, by the processor too: a scalar or two may swap at the cut.
            assert share_of_same(unmasked_at(run, step), unmasked_at(one, step)) >= 0.999
        there = json.loads((run / "run.json").read_text())["id3"]
        assert {**there, "unmasked_by_layer": None} == {**summary, "unmasked_by_layer": None}
        assert there["unmasked_by_layer"] == pytest.approx(summary["unmasked_by_layer"], rel=1e-3)
        for line, other in zip(read_lines(run / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
            if "loss" in line:
                assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    if name == "id3, ties":  # all of B, whose gradients are not zero; then A's from the front, at equal scores of 0
        a = [(n, parameter) for n, parameter in expected.items() if "lora_A" in n]
        assert all(sorted(parameter) == list(range(len(parameter))) for _, parameter in a)
        assert {step for _, parameter in a for step in parameter.values()} == {1}


@pytest.mark.parametrize("name", ["id3", "id3, full"])
def test_a_sharded_checkpoint_in_mid_schedule_resumes_on_one_process(work, topologies, tmp_path, name):
    one, sharded = work / "one" / rules.slug(name), work / "fsdp2" / rules.slug(name)
    rules.train(work, name, tmp_path / "run", 4, resume_from_checkpoint=sharded / "checkpoints/step_000010")
    assert unmasked_at(tmp_path / "run", 20) == unmasked_at(one, 20)
    losses, expected = (
        [line["loss"] for line in read_lines(r / "metrics.jsonl") if "loss" in line] for r in (tmp_path / "run", one)
    )
    assert losses == pytest.approx(expected[10:], abs=1e-4)


def test_resume_is_exact_and_needs_the_moments(train, tmp_path):
    options = {"selection": "id3", "id3_budget": 0.3, "id3_steps": 15, "save_steps": 7, "weight_decay": 0.1}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    checkpoint = tmp_path / "whole/checkpoints/step_000007"
    whole = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    for lost in (None, "exp_avg", "step"):
        if lost:
            file = load_file(checkpoint / "optimizer.safetensors")
            changed = {key: torch.ones_like(t) if key.endswith(f"|{lost}") else t for key, t in file.items()}
            save_file(changed, checkpoint / "optimizer.safetensors")
        run = tmp_path / f"without-{lost}"
        assert train(output_dir=run, resume_from_checkpoint=checkpoint, **options) == 0
        assert [line["unmasked_scalars"] for line in read_lines(run / "metrics.jsonl")] == [
            line["unmasked_scalars"] for line in read_lines(tmp_path / "whole/metrics.jsonl")[7:]
        ]
        again = load_file(run / "adapter/adapter_model.safetensors")
        assert all(torch.equal(whole[key], again[key]) for key in whole) == (lost is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id3_budget": 0}, r"--id3_budget must be a fraction in \(0, 1\), a count of 1 or more, or all; got 0"),
        ({"id3_budget": 1.0}, "--id3_budget 1.0 is ambiguous"),
        (
            {"id3_budget": 5633},
            r"--id3_budget must be .* from 1 to 5632 \(the scalars that may train\), or all; got 5633",
        ),
        ({"id3_steps": 21}, "--id3_steps 21 is more than the run's 20 steps"),
        ({"id3_steps": 0}, "--id3_steps must be 1 or more; got 0"),
        ({"id3_exponent": -1}, "--id3_exponent must be a finite number, 0 or more; got -1"),
        ({"id3_eps": 0}, "--id3_eps must be a finite number above 0; got 0"),
        ({"id3_eps": 1e-8, "id3_exponent": 4}, "--id3_eps must be large enough for its power 4.0 .*; got 1e-08"),
        ({"selection": "all", "id3_budget": 0.5}, "--id3_budget must be left out with --selection all"),
        ({"optim": "adamw_8bit"}, "--optim adamw_8bit keeps moments of masked"),
        ({"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit keeps moments of masked"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(train, tmp_path, monkeypatch, options, message):

    monkeypatch.setattr(training_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message) as error:
        train(**{"selection": "id3", **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_adalora_is_refused(train, tmp_path):
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "ADALORA", "init_r": 6, "target_r": 3}))
    only = dict.fromkeys(("lora_r", "lora_alpha"))
    with pytest.raises(UsageError, match="ADALORA is not served: its budget prunes what id3 keeps masked"):
        train(selection="id3", peft_config=tmp_path / "peft.json", **only)


def test_without_its_optimizer_it_trains_nothing():
    tuner = SparseTuner(tiny_model(), ISTConfig(selection="id3"))
    with pytest.raises(RuntimeError, match="attach the rule to a PackedAdamW"):
        tuner.begin_step(0)
    optimizer = PackedAdamW([nn.Parameter(torch.ones(3))])
    state = {"state": {0: {"step": torch.ones(1)}}, "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match="load_whole_state"):
        optimizer.load_state_dict(state)
