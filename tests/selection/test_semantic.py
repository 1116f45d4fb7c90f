"""Semantic-aware freezing: its pass over training rows, the boundary, and importance above it."""

import json
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import make_tiny, tiny_config
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ist import ImportanceSampler, ISTConfig, SparseTuner
from ist.config import ConfigError
from ist.layers import LayerMap, drop_input_grad_hooks
from ist.selection import SemanticFreezing, make_rule
from ist.selection.semantic import SemanticBases, choose_boundary, layer_gains, measure_deviations
from ist.training import objective
from ist.training.command_line import UsageError

# ------------------------------------------------------------------------------------------ semantic-aware freezing


def random_llama(n_layers=6, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(n_layers, **options))


def some_batches(n=3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, 400, (4, 11), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


@pytest.mark.parametrize("rank", [32, 5])
def test_semantic_bases_are_rows_of_the_pseudo_inverse(rank):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(20_000, rank, generator=generator) @ torch.randn(rank, 32, generator=generator)
    tokens = torch.tensor([[0, 7], [19_999, 7]])
    one_hot = torch.nn.functional.one_hot(tokens, len(head)).double()
    expected = one_hot @ torch.linalg.pinv(head.double().T, rtol=1e-5)
    torch.testing.assert_close(SemanticBases(head)(tokens).double(), expected, atol=1e-5, rtol=1e-4)


def test_deviations_against_a_plain_computation():
    model = random_llama()
    peft = get_peft_model(random_llama(), LoraConfig(target_modules=["q_proj"]))
    spaces = []  # the input of the first layer and the output of each, by transformers' own means
    inverse = torch.linalg.pinv(model.lm_head.weight.double().T)
    for batch in some_batches():
        states = model(batch["input_ids"], output_hidden_states=True).hidden_states[:-1]  # the last one is normed
        last = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
        model(batch["input_ids"])
        handle.remove()
        kept = batch["labels"][:, 1:] != -100
        wanted = inverse[batch["labels"][:, 1:][kept]]
        distance = [
            1 - torch.cosine_similarity(state[:, :-1][kept].double(), wanted, dim=-1) for state in (*states, *last)
        ]
        spaces.append(torch.stack(distance))
    expected = torch.cat(spaces, dim=1).mean(dim=1)
    for one in (model, peft):  # an adapter that does nothing yet changes nothing
        deviations = measure_deviations(
            one, LayerMap(peft).blocks if one is peft else model.model.layers, some_batches()
        )
        torch.testing.assert_close(deviations, expected.detach(), atol=1e-6, rtol=0)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in LayerMap(peft).blocks)
    assert layer_gains(deviations) == pytest.approx((expected[:-1] / expected[1:]).log().tolist(), abs=1e-5)


class Writer(nn.Module):
    """A residual layer that adds noise, and what it was given to write."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.noise = nn.Linear(width, width, bias=False)
        self.written: torch.Tensor | float = 0.0

    def forward(self, stream):
        return stream + 0.3 * self.noise(stream) + self.written


class Planted(nn.Module):
    """A residual stack in which layer m writes the basis of the token that follows into the stream."""

    def __init__(self, n_layers: int, m: int, generator: torch.Generator, width: int = 16, tokens: int = 50) -> None:
        super().__init__()
        self.head = nn.Linear(width, tokens, bias=False)
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(Writer(width) for _ in range(n_layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.following = torch.randperm(tokens, generator=generator)
        self.m = m
        self.bases = torch.linalg.pinv(self.head.weight.detach().T)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        basis = self.bases[self.following[input_ids]]
        self.layers[self.m].written = 20 * basis / basis.norm(dim=-1, keepdim=True)
        stream = self.embedding(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream)

    def batches(self, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(0, len(self.following), (2, 4, 9), generator=generator)
        return [{"input_ids": x, "labels": torch.cat([x[:, :1], self.following[x[:, :-1]]], dim=1)} for x in ids]


@pytest.mark.parametrize("adapted", [True, False])
def test_the_boundary_is_the_planted_layer_in_ten_of_ten_seeds(adapted):
    planted, found = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        m = int(torch.randint(0, 7, (), generator=generator))
        toy = Planted(8, m, generator)
        batches = toy.batches(generator)
        model = get_peft_model(toy, LoraConfig(target_modules=["noise"])) if adapted else toy
        config = ISTConfig(selection="semantic", min_trained_layers=1)
        tuner = SparseTuner(model, config, probe_batches=lambda _, batches=batches: batches)
        tuner.begin_step(0)
        planted.append(m)
        found.append(tuner.rule.boundary)
        assert tuner.trained == list(range(m + 1, 8))
    assert found == planted
    assert len(set(planted)) > 3


def rule_that_saw(deviations: list[float], **options) -> SemanticFreezing:
    rule = make_rule(len(deviations) - 1, ISTConfig(**options))
    rule.see(deviations)
    return rule


def test_layers_without_adapters_have_gains_of_their_own():
    generator = torch.Generator().manual_seed(0)
    toy = Planted(8, 3, generator)
    model = get_peft_model(toy, LoraConfig(target_modules=r"layers\.[01567]\.noise"))
    batches = toy.batches(generator)
    tuner = SparseTuner(model, ISTConfig(selection="semantic"), probe_batches=lambda _: batches)
    tuner.begin_step(0)
    assert tuner.rule.boundary == 3
    assert tuner.trained == [2, 3, 4]  # of the adapted ones: 5, 6 and 7
    again = make_rule(5, ISTConfig(selection="semantic"))
    again.load_state_dict(json.loads(json.dumps(tuner.rule.state_dict())))
    assert again.summary() == tuner.rule.summary()
    assert again.trained(7) == [2, 3, 4]
    model = get_peft_model(Planted(8, 3, generator), LoraConfig(target_modules=r"layers\.2\.noise"))
    tuner = SparseTuner(model, ISTConfig(selection="semantic"), probe_batches=lambda _: batches)
    tuner.begin_step(0)
    assert tuner.trained == [0]


def test_the_pass_is_without_dropout_and_leaves_no_hooks(monkeypatch):
    def boundary_and_deviations(dropout):
        torch.manual_seed(3)
        model = get_peft_model(
            random_llama(attention_dropout=dropout), LoraConfig(target_modules=["q_proj"], lora_dropout=dropout)
        )
        config = ISTConfig(selection="semantic")
        tuner = SparseTuner(model.train(), config, probe_batches=lambda _: some_batches())
        tuner.prepare()
        return tuner.rule.summary()

    assert boundary_and_deviations(0.0) == boundary_and_deviations(0.5)
    model = random_llama()
    with pytest.raises(ZeroDivisionError):
        measure_deviations(model, model.model.layers, (1 / 0 for _ in range(1)))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="calibration rows"):
        measure_deviations(model, model.model.layers, some_batches())
    batch = {**some_batches(1)[0]}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ConfigError, match="no token is to be predicted"):
        measure_deviations(random_llama(), model.model.layers, [batch])


def test_what_cannot_be_compared_is_refused(train, tmp_path, rows):
    folder = make_tiny(tmp_path / "opt", rows)
    options = {"vocab_size": 400, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2}
    OPTForCausalLM(OPTConfig(num_attention_heads=4, **options)).save_pretrained(folder)
    with pytest.raises(UsageError, match=r"hidden states \(of size 32\) with rows of the LM head \(of size 16\)"):
        train(selection="semantic", model_name_or_path=folder)
    with pytest.raises(ConfigError, match="suppresses adapters, and the model has none"):
        SparseTuner(random_llama(), ISTConfig())


def test_as_many_calibration_rows_as_asked_for(train, monkeypatch):
    seen = []
    rows_of = objective.probe_rows
    monkeypatch.setattr(objective, "probe_rows", lambda *args: seen.append((args[3], rows_of(*args))) or seen[-1][1])
    assert train(selection="semantic", semantic_rows=7, max_steps=2) == 0
    ((step, rows),) = seen
    assert step == "calibration"
    assert len(set(rows)) == 7


def test_floor_and_budget_move_the_boundary():
    deviations = [0.9, 0.8, 0.75, 0.7, 0.3, 0.28, 0.25, 0.24, 0.1]  # most gain in the top layer, then in layer 3

    def boundary(**options):
        return rule_that_saw(deviations, selection="semantic", **options).boundary

    assert boundary(min_trained_layers=1) == 3  # the top layer would leave none
    assert boundary() == 3
    assert boundary(min_trained_layers=5) == 0  # of layers 0 to 2
    above = [3, 2, 1, 0]
    assert choose_boundary([1, 5, 1, 9], above, floor=1, most=None) == 1
    assert choose_boundary([1, 5, 4, 9], above, floor=1, most=3) == 2  # 5 for 2 layers of backward, 4 for one
    assert choose_boundary([1, 5, 2, 9], above, floor=1, most=3) == 1
    assert choose_boundary([1, 5, 2, 9], above, floor=1, most=1) == 2
    assert choose_boundary([1, 5, 2, 9], [1, 1, 0, 0], floor=1, most=None) == 1
    assert choose_boundary([1, 5], [0, 0], floor=1, most=None) == -1
    assert boundary(semantic_budget=0.3) == 5
    assert make_rule(100, ISTConfig(selection="semantic", semantic_budget=0.29))._most == 29  # 28.999999999999996
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        make_rule(8, ISTConfig(selection="semantic", semantic_budget=0.3, min_trained_layers=3))


@pytest.mark.parametrize("rule_name", ["paper", "released"])
def test_semantic_with_ist_is_ist_on_the_layers_above(rule_name):
    options = {"score_rule": rule_name, "score_lr": 50, "trained_layers": 2, "update_interval": 5}
    rule = rule_that_saw([0.9, 0.85, 0.3, *[0.25] * 9], selection="semantic+ist", **options)
    assert rule.boundary == 1
    inner = ImportanceSampler(9, ISTConfig(**options))
    for step in range(40):
        assert rule.due(step) == inner.due(step)
        if rule.due(step):
            candidates = rule.candidates(step)
            assert candidates == [[0, 1, *(i + 2 for i in kept)] for kept in inner.candidates(step)]
            losses = [2.0 + sum(kept) / 40 for kept in candidates]
            assert rule.update(candidates, losses) == inner.update(inner.candidates(step), losses)
        assert rule.trained(step) == [i + 2 for i in inner.trained(step)]
    assert rule.importance.tolist() == [0.0, 0.0, *inner.importance.tolist()]
    assert inner.importance.abs().max() > 0.1
    again = make_rule(11, ISTConfig(selection="semantic+ist", **options))
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.boundary == 1
    assert [again.trained(step) for step in range(40, 60)] == [rule.trained(step) for step in range(40, 60)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapted", [True, False])
def test_nothing_below_the_boundary_is_kept_for_the_backward(adapted, checkpointing):
    model = random_llama(pad_token_id=0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers." in name)
    drop_input_grad_hooks(model)
    model.train()
    tuner = SparseTuner(model, ISTConfig(selection="semantic"))
    tuner.rule.see([0.9, 0.85, 0.8, 0.3, 0.29, 0.28, 0.27])
    boundary = tuner.rule.boundary
    assert boundary == 2
    tuner.begin_step(0)

    kept, outputs, runs, inside = weakref.WeakSet(), {}, Counter(), ["below"]

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.where = tensor, inside[0]
            kept.add(self)

    for i, block in enumerate(tuner.layers.blocks):

        def enter(module, args, i=i):
            runs[i] += 1

        def leave(module, args, output, i=i):
            inside[0] = "below" if i < boundary else "above"
            outputs.setdefault(i, weakref.ref(output))

        block.self_attn.register_forward_pre_hook(enter)  # in what checkpointing runs again
        block.register_forward_hook(leave)
    ids = torch.randint(1, 400, (2, 9))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
    saved = {where: sum(one.tensor.nbytes for one in kept if one.where == where) for where in ("below", "above")}
    assert saved["below"] == 0
    assert saved["above"] > 0
    alive = [i for i in outputs if outputs[i]() is not None]
    assert min(alive) >= boundary
    if checkpointing:
        assert alive[:3] == [boundary, 3, 4]  # what the layers above are run again from
    loss.backward()
    assert [runs[i] for i in range(6)] == [1] * (boundary + 1) + [1 + checkpointing] * (5 - boundary)
    trained = {id(p) for p in tuner.trained_parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
