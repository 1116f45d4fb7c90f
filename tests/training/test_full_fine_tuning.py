"""Base weights that train: plain full fine-tuning, and the model that is saved."""

import torch
from safetensors.torch import load_file
from support import make_tiny, read_lines, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

# ------------------------------------------------------------------------------------------- full layers


def test_all_layers_without_adapters_is_plain_full_fine_tuning(train, tiny, rows, tmp_path):
    from ist.training.data import GlobalBatches
    from ist.training.encoding import encode

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


def test_a_model_is_saved_with_the_chat_template_of_its_rows(train, tmp_path, tiny):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    options = {"prompt_template": "chat", "chat_template": tmp_path / "mine.jinja"}
    assert train(peft_method="none", selection="random", max_steps=1, **options) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert saved.chat_template == (tmp_path / "mine.jinja").read_text()
    assert AutoTokenizer.from_pretrained(tiny).chat_template != saved.chat_template
