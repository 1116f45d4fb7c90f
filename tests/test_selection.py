"""The rules beside IST's: what each selects, on one process, DDP and FSDP2; LISA and semantic freezing beside their
descriptions."""

import json
import weakref
from collections import Counter
from pathlib import Path

import pytest
import rules
import torch
from conftest import make_tiny, read_lines, tiny_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ist import ImportanceSampler, ISTConfig, SparseTuner
from ist.config import ConfigError
from ist.layers import LayerMap, drop_input_grad_hooks
from ist.selection import FixedLayers, LisaSampler, SemanticFreezing, make_rule
from ist.selection.semantic import SemanticBases, choose_boundary, layer_gains, measure_deviations
from ist.training import model as training_model
from ist.training import objective
from ist.training.command_line import UsageError

# ------------------------------------------------------------------------------------------- on each topology


def result_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(file)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def selected(run: Path) -> list[list[int]]:
    return [line["trained_layers"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", rules.ARMS)
def test_one_process_ddp_and_fsdp2_select_and_train_the_same(work, topologies, name):
    for topology, seen in topologies.items():
        assert seen[name]["world_size"] == (1 if topology == "one" else 2)
        assert seen[name]["all_dtensors"] == (topology == "fsdp2")
        all_of_it = name in ("all, full", "lisa, full", "id3, full")
        answer = "yes; 3 tensors of no layer or of several always train" if all_of_it else "yes"
        assert seen[name]["rest"] == answer  # what rested, and the base, is bit-equal to what it was
    one = work / "one" / rules.slug(name)
    assert len(selected(one)) == 20
    for topology in ("ddp", "fsdp2"):
        run = work / topology / rules.slug(name)
        assert selected(run) == selected(one)
        losses, expected = (losses_of(r) for r in (run, one))
        assert losses == pytest.approx(expected, abs=1e-4)
        ours, theirs = result_of(run), result_of(one)
        assert ours.keys() == theirs.keys()
        difference = sum((ours[key] - theirs[key]).pow(2).sum() for key in theirs).sqrt()
        assert difference < 1e-3 * sum(theirs[key].pow(2).sum() for key in theirs).sqrt()
        updates = [read_lines(r / "importance.jsonl") for r in (run, one)]
        for ours, theirs in zip(*updates, strict=True):
            assert ours["candidates"] == theirs["candidates"]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
        assert len(updates[0]) == (4 if "ist" in name.replace(",", "+").split("+") else 0)
        for key, value in json.loads((one / "run.json").read_text()).get("semantic", {}).items():
            assert json.loads((run / "run.json").read_text())["semantic"][key] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("topology", ["one", "ddp", "fsdp2"])
def test_resume_is_exact(work, topologies, topology):
    for name in rules.ARMS if topology == "one" else rules.RESUMED_ON_TWO_RANKS:
        run = work / topology / rules.slug(name)
        resumed = Path(f"{run}-resumed")
        assert losses_of(resumed) == losses_of(run)[rules.HALF :]
        assert selected(resumed) == selected(run)[rules.HALF :]
        ours, theirs = result_of(resumed), result_of(run)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        for key in ("semantic", "trained_counts", "layer_counts"):
            assert json.loads((resumed / "run.json").read_text()).get(key) == json.loads(
                (run / "run.json").read_text()
            ).get(key)


def test_what_each_rule_selects(work, topologies):
    chosen = {name: selected(work / "one" / rules.slug(name)) for name in rules.ARMS}
    assert chosen["fixed"] == [[0, 2]] * 20
    assert chosen["first"] == [[0]] * 20
    assert chosen["last"] == [[2, 3]] * 20
    assert chosen["all, full"] == [[0, 1, 2, 3]] * 20
    assert len({tuple(layers) for layers in chosen["random"]}) > 1
    for name in ("semantic", "semantic+ist", "semantic, full"):
        record = json.loads((work / "one" / rules.slug(name) / "run.json").read_text())
        boundary = record["semantic"]["boundary"]
        assert record["trained_counts"][: boundary + 1] == [0] * (boundary + 1)
        above = list(range(boundary + 1, 4))
        if name == "semantic+ist":
            assert all(len(layers) == 1 and layers[0] in above for layers in chosen[name])
            updates = read_lines(work / "one" / name / "importance.jsonl")
            assert all(update["scores"][: boundary + 1] == [0.0] * (boundary + 1) for update in updates)
            assert max(map(abs, updates[-1]["scores"])) > 0.01
        else:
            assert chosen[name] == [above] * 20
        assert record["layer_counts"]["trained"] == len(chosen[name][0])


def test_the_model_that_is_left_is_stock_transformers(work, topologies):
    for topology in ("one", "fsdp2"):
        folder = work / topology / "lisa-full/model"
        model, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(work / "tiny")
        moved = {n for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True) if not p.equal(q)}
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < moved
        assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(work / "tiny"))
        assert not (work / topology / "lisa-full/adapter").exists()
        assert "base_model: " in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(work / "one/random-full/model")
    moved = {n for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True) if not p.equal(q)}
    assert moved
    assert all(".layers." in name for name in moved)


# ------------------------------------------------------------------------------------------------- the simple rules


def test_lisa_beside_its_description():
    """Pan et al., Algorithm 1: every K iterations draw gamma of N_L layers uniformly; they stay for K iterations."""
    n_layers, drawn, interval, draws = 12, 3, 7, 4000
    rule = LisaSampler(n_layers, ISTConfig(selection="lisa", trained_layers=drawn, lisa_interval=interval))
    pairs, counts = Counter(), Counter()
    for draw in range(draws):
        period = [rule.trained(draw * interval + i) for i in range(interval)]
        assert all(layers == period[0] for layers in period)
        assert len(set(period[0])) == drawn
        counts.update(period[0])
        pairs.update((a, b) for a in period[0] for b in period[0] if a < b)
    share = drawn / n_layers
    assert all(abs(counts[i] - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5 for i in range(n_layers))
    share *= (drawn - 1) / (n_layers - 1)  # without replacement: pairs too
    assert len(pairs) == n_layers * (n_layers - 1) / 2
    assert all(abs(count - draws * share) < 5 * (draws * share) ** 0.5 for count in pairs.values())
    assert LisaSampler(12, ISTConfig(selection="lisa")).config.lisa_interval == 20
    other = LisaSampler(n_layers, ISTConfig(selection="lisa", trained_layers=drawn, lisa_interval=interval, seed=1))
    assert [other.trained(7 * i) for i in range(9)] != [rule.trained(7 * i) for i in range(9)]


def test_lisa_on_full_layers_trains_embeddings_and_head_at_every_step(train, tiny, tmp_path, monkeypatch):
    moved = []
    begin_step = SparseTuner.begin_step

    def watched(tuner, step):
        now = {name: p.detach().clone() for name, p in tuner.model.named_parameters()}
        if step:
            moved.append({name for name in now if not now[name].equal(tuner.before[name])})
        tuner.before = now
        return begin_step(tuner, step)

    monkeypatch.setattr(SparseTuner, "begin_step", watched)
    options = {"selection": "lisa", "peft_method": "none", "trained_layers": 2, "lisa_interval": 3}
    assert train(**options, weight_decay=0.1, warmup_steps=0) == 0
    always = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for line, names in zip(read_lines(tmp_path / "run/metrics.jsonl"), moved, strict=False):
        layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert layers == set(line["trained_layers"])
        assert always <= names
    assert len(moved) == 19


def test_fixed_first_and_last():
    def layers(n_layers, **options):
        return FixedLayers(n_layers, ISTConfig(**options)).trained(3)

    assert layers(12, selection="first") == [0, 1, 2]
    assert layers(12, selection="last") == [9, 10, 11]
    assert layers(12, selection="fixed", fixed_layers=["7", "0,3"]) == [0, 3, 7]
    assert layers(12, selection="fixed", fixed_layers=[1]) == [1]
    assert layers(12, selection="fixed", fixed_layers="10") == layers(12, selection="fixed", fixed_layers=10) == [10]
    with pytest.raises(ConfigError, match="layer numbers"):
        ISTConfig(selection="fixed", fixed_layers="²")
    assert layers(12, selection="fixed") == [2, 6, 10]
    assert layers(30, selection="fixed", trained_layers=8) == [1, 5, 9, 13, 16, 20, 24, 28]
    rule = make_rule(12, ISTConfig(selection="fixed", fixed_layers=[1, 2], trained_layers=5))
    assert rule.counts.trained == 2
    assert not rule.due(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "random", "lisa_interval": 3}, "--lisa_interval must be left out with --selection random"),
        ({"selection": "lisa", "fixed_layers": "1"}, "--fixed_layers must be left out with --selection lisa"),
        ({"selection": "ist", "semantic_budget": 0.5}, "--semantic_budget must be left out with --selection ist"),
        ({"selection": "fixed", "fixed_layers": "0,9"}, r"--fixed_layers must be layers from 0 to 3 .*got 9"),
        ({"selection": "fixed", "fixed_layers": "x"}, "--fixed_layers must be layer numbers, from 0; got x"),
        ({"selection": "lisa", "lisa_interval": 0}, "--lisa_interval must be 1 or more; got 0"),
        ({"selection": "semantic", "semantic_budget": 0.2}, "--semantic_budget 0.2 leaves nothing to train"),
        ({"selection": "semantic", "semantic_budget": 1.5}, r"--semantic_budget must be in \(0, 1\); got 1.5"),
        ({"selection": "semantic", "min_trained_layers": 0}, "--min_trained_layers must be a fraction"),
        ({"selection": "semantic", "min_trained_layers": 4}, "--min_trained_layers 4 leaves no layer to freeze"),
        ({"selection": "semantic", "min_trained_layers": 5}, "--min_trained_layers must be .* from 1 to 4"),
        ({"selection": "semantic+ist", "kept_layers": 4}, "--kept_layers 4 leaves no layer to freeze"),
        ({"selection": "semantic+ist", "trained_layers": 4}, "--trained_layers 4 leaves no layer to freeze"),
        ({"selection": "semantic+ist", "trained_layers": 9}, "--trained_layers must be .* from 1 to 4"),
        ({"selection": "semantic", "semantic_rows": 0}, "--semantic_rows must be 1 or more; got 0"),
        ({"selection": "semantic", "layer_stack": "both"}, "--layer_stack must be decoder"),
        ({"selection": "ist", "peft_method": "none"}, "--selection ist suppresses the response of adapters, and"),
        ({"selection": "all", "peft_method": "none", "load_in_4bit": True}, "--peft_method none trains the base"),
        ({"selection": "all", "peft_method": "none", "dtype": "bfloat16"}, "--bf16 true .* or --dtype float32"),
        ({"selection": "first", "trained_layers": 9}, "--trained_layers must be .* from 1 to 4"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(train, tmp_path, monkeypatch, options, message):

    monkeypatch.setattr(training_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message) as error:
        train(**options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


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


def test_deviations_beside_a_plain_computation():
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


# ------------------------------------------------------------------------------------------- full layers


def test_all_layers_without_adapters_is_plain_full_fine_tuning(train, tiny, rows, tmp_path):
    from ist.training.data import GlobalBatches, encode

    assert train(selection="all", peft_method="none") == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 2 if t < 2 else max(0.0, (20 - t) / 18))
    encoded = [encode(row, "alpaca", tokenizer, 256, False)["input_ids"] for row in rows]
    stream, losses = GlobalBatches(len(rows), 4, 42), []
    for step in range(20):
        batch = [encoded[i] for i in stream.rows(step)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=int) for row in batch], batch_first=True)
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = (
            nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            / (labels != -100).sum()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == losses
    trained = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(trained[name], p) for name, p in model.named_parameters())


def test_a_bfloat16_model_with_tied_head_is_saved_as_it_was_validated(train, tmp_path, rows):
    folder = make_tiny(tmp_path / "tied", rows)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).bfloat16().save_pretrained(folder)
    options = {
        "model_name_or_path": folder,
        "peft_method": "none",
        "bf16": True,
        "validation_size": 8,
        "save_steps": 10,
    }
    for selection in ("random", "lisa"):
        assert train(selection=selection, output_dir=tmp_path / selection, **options) == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / selection / "model")
        assert model.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight
        base = AutoModelForCausalLM.from_pretrained(folder).float()
        assert torch.equal(base.lm_head.weight, model.lm_head.weight) == (selection == "random")
        checkpoint = load_file(tmp_path / selection / "checkpoints/step_000020/adapter.safetensors")
        for name, tensor in checkpoint.items():
            assert torch.equal(model.get_parameter(name), tensor), name
        resumed = tmp_path / f"{selection}-resumed"
        cut = tmp_path / selection / "checkpoints/step_000010"
        assert train(selection=selection, output_dir=resumed, resume_from_checkpoint=cut, **options) == 0
        again, whole = (
            load_file(resumed / "model/model.safetensors"),
            load_file(tmp_path / selection / "model/model.safetensors"),
        )
        assert all(torch.equal(again[name], whole[name]) for name in whole)
