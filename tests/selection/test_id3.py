"""ID3 beside a dense float64 reference and the authors' package; its optimizer beside AdamW; budgets, ranks, resume."""

import pytest
import torch
from selective_optimizers.wrap import get_selective_optimizer
from support.unmasking import DenseId3, masks_of, rule_on, tiny_model, trainable
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ist.selection import id3
from ist.selection.packed_adamw import PackedAdamW

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


def test_state_bytes_against_adamw():
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


def test_ranks_that_would_unmask_otherwise_are_stopped(monkeypatch):
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
