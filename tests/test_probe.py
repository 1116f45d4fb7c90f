"""Cheaper probes beside the paper's: stacked candidates, and the derivative by each layer's response."""

from contextlib import ExitStack

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support import ROOT, peft_class, read_lines, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ist import probe
from ist.adapters import SeriesConfig
from ist.config import ISTConfig
from ist.layers import LayerMap
from ist.loss import row_loss_sums, token_loss_sum
from ist.suppression import RowsMixed, evaluation_mode, suppress
from ist.training.data import collate, micro_batches
from ist.tuner import PROBES

SMOLLM2 = ROOT / "models/SmolLM2-135M-Instruct"
CANDIDATES = [[0, 2], [1, 2, 4], [3, 4]]
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.3, init_lora_weights=False),
    "series": lambda: SeriesConfig(bottleneck_size=8, target_modules=["up_proj"]),
    "lily": lambda: peft_class("LilyConfig")(r=4, num_B=2, stride_A=1, target_modules=["q_proj", "down_proj"]),
}


def adapted(name: str, n_layers: int = 5):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(tiny_config(n_layers)), CONFIGS[name]()).train()
    for parameter in model.parameters():
        if parameter.requires_grad:  # every response is felt
            torch.nn.init.normal_(parameter, std=0.2)
    return model, LayerMap(model)


def some_batches(n=3):
    generator = torch.Generator().manual_seed(1)
    for width in range(7, 7 + n):
        ids = torch.randint(3, 400, (3, width), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0  # a short row
        labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=generator) < 0.2), -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def exact(model, layers, candidates, beta):
    def loss(model, batch):
        return token_loss_sum(model, batch), (batch["labels"][:, 1:] != -100).sum()

    with evaluation_mode(model):
        return probe.one_by_one(model, layers, candidates, beta, some_batches, loss)


@pytest.mark.parametrize("name", CONFIGS)
def test_stacked_candidates_have_the_losses_of_one_by_one(name):
    model, layers = adapted(name)
    expected = exact(model, layers, CANDIDATES, 0.25)
    assert (expected[:, 0] - expected[0, 0])[1:].abs().min() > 0.01  # the candidates differ
    with evaluation_mode(model):
        sums = probe.stacked(model, layers, CANDIDATES, 0.25, some_batches)
    torch.testing.assert_close(sums, expected, rtol=2e-6, atol=0)


def test_stacked_is_one_forward_a_batch():
    model, layers = adapted("lora")
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(len(out)))
    with evaluation_mode(model):
        probe.stacked(model, layers, CANDIDATES, 0.25, some_batches)
    assert seen == [9, 9, 9]


@pytest.mark.parametrize("at", [1.0, 0.625])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "series", "lily"])
def test_derivatives_by_the_responses_against_differences(name, checkpointing, at):
    model, layers = adapted(name)
    model, h = model.double(), 0.02  # no smaller: Llama's norms are float32 in any model
    probed = [0, 1, 2, 4]  # layer 3 keeps its response
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}

    def loss(i: int, g: float) -> torch.Tensor:
        with ExitStack() as hooks:
            for layer in probed:
                hooks.enter_context(suppress(layers.modules[layer], g if layer == i else at))
            losses = [row_loss_sums(model, batch) for batch in some_batches()]
        # Rows of lily cannot have a gate each: those of a batch are one.
        return torch.stack([of_batch.sum() for of_batch in losses]) if name == "lily" else torch.cat(losses)

    with evaluation_mode(model):
        losses, derivatives, tokens = probe.gate_derivatives(model, layers, probed, at, some_batches())
        torch.testing.assert_close(losses, loss(0, at).double(), rtol=1e-6, atol=0)
        steps = {-2: 1, -1: -8, 1: 8, 2: -1}  # of fourth order
        differences = [sum(w * loss(i, at + n * h) for n, w in steps.items()) / (12 * h) for i in probed]
    by_layer = torch.stack(differences, dim=1).double()
    torch.testing.assert_close(derivatives, by_layer, rtol=2e-3, atol=2e-3)
    assert derivatives.abs().max(dim=0).values.min() > 0.01
    counted = torch.cat([(batch["labels"][:, 1:] != -100).sum(dim=1) for batch in some_batches()])
    torch.testing.assert_close(tokens, (counted.view(3, 3).sum(dim=1) if name == "lily" else counted).double())
    assert all(p.grad is None and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n][0]) for n, p in model.named_parameters())


def test_the_estimate_is_exact_to_first_order():
    model, layers = adapted("lora")
    model = model.double()
    errors = []
    for distance in (1e-2, 1e-3):
        expected = exact(model, layers, CANDIDATES, 1 - distance)
        with evaluation_mode(model):
            sums = probe.estimated(model, layers, CANDIDATES, 1 - distance, some_batches)
        assert torch.equal(sums[:, 1], expected[:, 1])
        errors.append((sums - expected)[:, 0].abs().max().item())
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 50  # quadratic: a tenth of the step, a hundredth of the error


def test_an_exception_leaves_nothing_frozen():
    model, layers = adapted("lora")
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        probe.gate_derivatives(model, layers, range(5), 1.0, (1 / 0 for _ in range(1)))
    assert [p.requires_grad for p in model.parameters()] == trains
    assert not any(m._forward_hooks or m._forward_pre_hooks for modules in layers.modules for m in modules)


def test_a_model_that_flattens_rows_and_positions():
    """OPT's fc1 and fc2 see [B x T, H]."""
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 5}
    base = OPTForCausalLM(OPTConfig(num_attention_heads=4, dropout=0.0, **shape))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["fc1", "q_proj"], init_lora_weights=False)).train()
    layers = LayerMap(model)
    expected = exact(model, layers, CANDIDATES, 0.25)
    with evaluation_mode(model):
        torch.testing.assert_close(
            probe.stacked(model, layers, CANDIDATES, 0.25, some_batches), expected, rtol=2e-6, atol=0
        )
        near = exact(model, layers, CANDIDATES, 0.99)
        with evaluation_mode(model):
            estimate = probe.estimated(model, layers, CANDIDATES, 0.99, some_batches)
    torch.testing.assert_close(estimate, near, rtol=1e-4, atol=0)


def test_rows_that_a_method_mixes_are_measured_one_by_one(monkeypatch):
    model, layers = adapted("lora")
    expected = exact(model, layers, CANDIDATES, 0.25)

    def mixed(*args):
        raise RowsMixed

    monkeypatch.setattr(probe, "_stacked_losses", mixed)
    with evaluation_mode(model):
        torch.testing.assert_close(probe.stacked(model, layers, CANDIDATES, 0.25, some_batches), expected)


def test_the_last_tokens_end_with_a_predicted_one():
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, -100]}])
    (batch,) = micro_batches(rows, [0], 1, 0, 1, 0, last_tokens=2)
    assert batch["input_ids"].tolist() == [[6, 7]]
    assert batch["labels"].tolist() == [[6, 7]]


def test_rows_and_tokens_of_a_cheap_probe():
    assert ISTConfig().probe_rows(16) == 16
    assert ISTConfig(probe="cheap").probe_rows(16) == 2
    assert ISTConfig(probe="cheap").probe_rows(3) == 1
    assert ISTConfig(probe="gradient", probe_batch_size=5).probe_rows(16) == 5
    assert ISTConfig(probe="cheap").probe_tokens(16, 256) is None
    assert ISTConfig(probe="cheap").probe_tokens(2, 256) == 64
    assert ISTConfig(probe="cheap", probe_batch_size=2).probe_tokens(2, 256) is None
    assert ISTConfig(probe_max_length=7).probe_tokens(2, 256) == 7


def test_a_cheap_probe_takes_the_ends_of_its_rows(train, tmp_path, monkeypatch):
    widths = []
    stacked = probe.stacked

    def watched(model, layers, candidates, beta, make_batches, loss):
        batches = list(make_batches())
        widths.extend(batch["input_ids"].shape for batch in batches)
        assert all((batch["labels"][:, -1] != -100).all() for batch in batches)
        return stacked(model, layers, candidates, beta, make_batches, loss)

    monkeypatch.setitem(PROBES, "cheap", watched)
    assert train(probe="cheap", max_length=64, max_steps=9) == 0
    assert widths == [(1, 32), (1, 32)]  # of 4 rows one, and of that the last 64 * 4 / 8
    assert len(read_lines(tmp_path / "run/importance.jsonl")) == 2


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2 is not there: launch/setup.sh --model")
def test_derivatives_of_smollm2_at_the_mean_gate_against_differences():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float64)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).double().train()
    layers, probed, at, h = LayerMap(model), [0, 13, 29], 0.625, 0.02
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = ["Ada has 3 pens and buys 4. How many are there? 3 + 4 = 7.", "Half of 18 is 9."]
    rows = [tokenizer(text)["input_ids"] for text in texts]

    def loss(i: int, g: float) -> torch.Tensor:
        with ExitStack() as hooks:
            for layer in range(30):
                hooks.enter_context(suppress(layers.modules[layer], g if layer == i else at))
            return row_loss_sums(model, collate(rows, rows, 0)).double()

    with evaluation_mode(model), torch.no_grad():
        weights = {-2: 1, -1: -8, 1: 8, 2: -1}  # of fourth order
        differences = [sum(w * loss(i, at + n * h) for n, w in weights.items()) / (12 * h) for i in probed]
    with evaluation_mode(model):
        found = probe.gate_derivatives(model, layers, range(30), at, [collate(rows, rows, 0)])
    torch.testing.assert_close(found.by_gate[:, probed], torch.stack(differences, dim=1), rtol=5e-3, atol=2e-3)
    assert found.by_gate[:, probed].abs().max(dim=0).values.min() > 0.05
