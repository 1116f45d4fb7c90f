"""Greedy ablation of layers: PEFT's own means as reference, ranks, resumed runs, bad input."""

import copy
import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy import stats
from support import ROOT, make_tiny, read_lines, reset_accelerate, tiny_config, warm_python
from support.analysis import noise
from support.documents import published
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ist.analyze import command as analyze
from ist.analyze.ablation import AblationLoss, ablate_greedily
from ist.analyze.command import main
from ist.analyze.results import agreement, agreement_table, compare_importance, greedy_order
from ist.training.arguments import SelectionArguments
from ist.training.command_line import UsageError, parse_arguments
from ist.training.continuing import adapter_digest
from ist.training.encoding import make_prompt

N_LAYERS, PLANTED = 4, 1
FILES = ("ablations.jsonl", "analysis.json", "arguments.json", "layers.png", "lines.jsonl")


def windows_of(folder) -> list[list[int]]:
    """The text as the command cuts it at --max_tokens 150 --max_length 40."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    ids = tokenizer((folder / "text.txt").read_text(), add_special_tokens=False)["input_ids"][:150]
    return [ids[i : i + 40] for i in range(0, 150, 40)]


@pytest.mark.parametrize("name", ["layers-arithmetic", "layers-wikitext-2"])
def test_the_published_tables_are_those_of_their_files(name):
    assert published(name) == agreement_table(json.loads((ROOT / f"launch/results/{name}.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A tiny model, and an adapter of which layer 1 has learned something and the others are noise."""
    folder = tmp_path_factory.mktemp("analysis")
    make_tiny(folder / "tiny", rows)
    (folder / "text.txt").write_text(" ".join(row["instruction"] for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))
    noise(model, 0.03)
    learning = [parameter for name, parameter in model.named_parameters() if f".{PLANTED}." in name and "lora" in name]
    optimizer = torch.optim.Adam(learning, lr=0.03)
    ids = torch.tensor(windows_of(folder)[:3])
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "run/adapter")
    return folder


def flags_of(folder, output_dir, *more, text=True) -> list[str]:
    flags = ["--model_name_or_path", str(folder / "tiny"), "--adapter", str(folder / "run/adapter")]
    flags += ["--text_file", str(folder / "text.txt"), "--max_tokens", "150", "--max_length", "40"] if text else []
    return [*flags, "--batch_size", "3", "--output_dir", str(output_dir), *map(str, more)]


def run(*flags) -> None:
    reset_accelerate()
    assert main(flags_of(*flags)) == 0


@pytest.fixture(scope="module")
def whole(folder):
    """A finished analysis."""
    run(folder, folder / "whole")
    return folder / "whole"


def contents(output_dir) -> dict[str, bytes]:
    assert sorted(path.name for path in output_dir.iterdir()) == list(FILES)
    return {name: (output_dir / name).read_bytes() for name in FILES}


def result(output_dir) -> dict:
    return json.loads((output_dir / "analysis.json").read_text())


@torch.no_grad()
def windows_loss(model, windows: list[list[int]]) -> float:
    total = tokens = 0
    for window in windows:
        ids = torch.tensor([window])
        total += model(input_ids=ids, labels=ids).loss.item() * (len(window) - 1)
        tokens += len(window) - 1
    return total / tokens


def by_brute_force(folder, choose) -> tuple[list[int], list[float], list[float]]:
    """(order, losses, rises without a single layer), with B = 0 in copies of the model, and whole forwards."""
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    model, windows = PeftModel.from_pretrained(base, folder / "run/adapter").eval(), windows_of(folder)

    def loss_without(removed: list[int]) -> float:
        poorer = copy.deepcopy(model)
        for name, parameter in poorer.named_parameters():
            if "lora_B" in name and any(f".layers.{i}." in name for i in removed):
                parameter.data.zero_()
        return windows_loss(poorer, windows)

    order, losses, full = [], [], loss_without([])
    for _ in range(N_LAYERS):
        found = {i: loss_without([*order, i]) for i in range(N_LAYERS) if i not in order}
        order.append(choose(found, key=found.get))
        losses.append(found[order[-1]])
    return order, losses, [loss_without([i]) - full for i in range(N_LAYERS)]


@pytest.mark.parametrize(("direction", "choose"), [("least", min), ("most", max)])
def test_the_order_is_that_of_weights_set_to_zero(folder, whole, direction, choose):
    analysis = result(whole)
    order, losses, alone = by_brute_force(folder, choose)
    assert analysis["directions"][direction]["order"] == order
    assert analysis["directions"][direction]["losses"] == pytest.approx(losses, rel=1e-5)
    assert analysis["directions"][direction]["perplexities"] == pytest.approx([math.exp(x) for x in losses], rel=1e-4)
    assert analysis["single_ablation"] == pytest.approx(alone, abs=1e-5)
    assert len({round(loss, 5) for loss in losses}) == N_LAYERS  # no ties, which would leave the order open
    assert greedy_order(analysis, direction) == (order if direction == "least" else order[::-1])


def test_the_ends_are_the_adapter_and_the_base_model(folder, whole):
    analysis, windows = result(whole), windows_of(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    assert analysis["losses"]["base model"] == pytest.approx(windows_loss(base, windows), rel=1e-6)
    adapted = PeftModel.from_pretrained(base, folder / "run/adapter").eval()
    assert analysis["losses"]["adapter"] == pytest.approx(windows_loss(adapted, windows), rel=1e-6)
    for direction in ("least", "most"):  # bit for bit: a gate of 0 is exact
        assert analysis["directions"][direction]["losses"][-1] == analysis["losses"]["base model"]
    assert analysis["losses"]["base model"] > analysis["losses"]["adapter"] + 0.2
    assert analysis["tokens"] == 150 - 4


def test_what_one_layer_has_learned_is_found(whole):
    analysis = result(whole)
    assert analysis["directions"]["least"]["order"][-1] == analysis["directions"]["most"]["order"][0] == PLANTED
    assert max(analysis["single_ablation"]) == analysis["single_ablation"][PLANTED]


def test_of_layers_missed_alike_the_lowest_goes_first():
    def losses_without(removed):
        return {i: 1.0 for i in range(3) if i not in removed}

    for direction in ("least", "most"):
        assert ablate_greedily(direction, 3, losses_without)["order"] == [0, 1, 2]


def count_evaluations(monkeypatch) -> list:
    calls, original = [], AblationLoss.__call__

    def counted(self, removed, layer):
        calls.append(frozenset([*removed, layer]))
        return original(self, removed, layer)

    monkeypatch.setattr(AblationLoss, "__call__", counted)
    return calls


def test_every_evaluation_is_a_line_and_made_once(folder, whole, tmp_path, monkeypatch):
    calls = count_evaluations(monkeypatch)
    run(folder, tmp_path / "again")
    assert contents(tmp_path / "again")["ablations.jsonl"] == contents(whole)["ablations.jsonl"]
    lines = read_lines(whole / "ablations.jsonl")
    assert [line["direction"] for line in lines] == ["least"] * 10 + ["most"] * 10  # n (n + 1) / 2 each
    assert len(calls) == len(set(calls)) == len({frozenset([*line["removed"], line["layer"]]) for line in lines}) < 17
    for line in lines:
        assert line["stage"] == len(line["removed"]) + 1
        order = result(whole)["directions"][line["direction"]]["order"]
        assert line["removed"] == order[: line["stage"] - 1]


@pytest.mark.parametrize("cut", [0, 3, 6.5, 13])
def test_a_stopped_analysis_goes_on(folder, whole, tmp_path, monkeypatch, cut):
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("analysis.json", "layers.png"):
        (tmp_path / "cut" / name).unlink()
    lines = (whole / "ablations.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/ablations.jsonl").write_text(
        "".join(lines[: int(cut)]) + (lines[int(cut)][:30] if cut % 1 else "")
    )
    if not cut:
        (tmp_path / "cut/lines.jsonl").write_text((whole / "lines.jsonl").read_text()[:-20])
    calls = count_evaluations(monkeypatch)
    run(folder, tmp_path / "cut")
    expected, found = contents(whole), contents(tmp_path / "cut")
    found["analysis.json"] = found["analysis.json"].replace(str(tmp_path / "cut").encode(), str(whole).encode())
    assert found == expected
    sets = [frozenset([*line["removed"], line["layer"]]) for line in map(json.loads, lines)]
    assert set(calls) == set(sets) - set(sets[: int(cut)])


def test_a_finished_analysis_measures_nothing_and_another_one_is_refused(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "load_scorer", lambda *_: pytest.fail("a model was loaded"))
    before = contents(whole)
    run(folder, whole)
    assert contents(whole) == before
    run(folder, whole, "--directions", "most")
    assert list(result(whole)["directions"]) == ["most"]
    run(folder, whole)
    assert contents(whole) == before
    with pytest.raises(UsageError, match=r"holds results of another max_tokens\. Choose another folder"):
        main([*flags_of(folder, whole), "--max_tokens", "100"])
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/text.txt").write_text("something else " * 50)
    flags = [
        flag.replace(str(folder / "text.txt"), str(tmp_path / "copy/text.txt")) for flag in flags_of(folder, whole)
    ]
    with pytest.raises(UsageError, match=r"holds results of another text_file, data_digest\. Choose another folder"):
        main(flags)


def test_weights_replaced_in_place_are_other_weights(folder, tmp_path, capsys):
    def replace(file) -> None:
        stat, tensors = file.stat(), load_file(file)
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    for name in ("base/tiny", "twin"):
        shutil.copytree(folder / "tiny", tmp_path / name)
    flags = ("--model_name_or_path", tmp_path / "base/tiny", "--lines", f"twin={tmp_path / 'twin'}")
    run(folder, tmp_path / "out", *flags)
    before = result(tmp_path / "out")["losses"]["twin"]
    replace(tmp_path / "twin/model.safetensors")  # of a line: measured again
    run(folder, tmp_path / "out", *flags)
    assert result(tmp_path / "out")["losses"]["twin"] != before
    assert "twin: not what was measured before under this name; its loss is measured again." in capsys.readouterr().out
    replace(tmp_path / "base/tiny/model.safetensors")
    with pytest.raises(UsageError, match=r"results of another model_digest \(the files of --model_name_or_path\)"):
        run(folder, tmp_path / "out", *flags)


def test_two_ranks_end_with_the_files_of_one_process(folder, whole, tmp_path):
    command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/ddp.yaml", "-m", "ist.analyze"]
    ranks = {"PYTHON_EXEC": warm_python(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **ranks}
    done = subprocess.run([*command, *flags_of(folder, tmp_path / "two")], cwd=ROOT, check=False, env=environment,
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = contents(tmp_path / "two")
    found["analysis.json"] = found["analysis.json"].replace(str(tmp_path / "two").encode(), str(whole).encode())
    assert found == contents(whole)
    assert done.stdout.count("base model: loss") == 1  # rank 0 alone speaks


def test_rows_have_the_loss_of_their_answers_by_the_prompt_of_the_run(folder, rows, tmp_path):
    shutil.copytree(folder / "run/adapter", tmp_path / "run/adapter")
    (tmp_path / "run/run.json").write_text(json.dumps({"configuration": {"prompt_template": "llm_adapters"}}))
    flags = ["--rows_file", folder / "rows.json", "--max_tokens", 500, "--adapter", tmp_path / "run/adapter"]
    reset_accelerate()
    assert main([*flags_of(folder, tmp_path / "out", *flags, text=False), "--directions", "least"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    taken = total = predicted = 0
    for row in rows:
        prompt = make_prompt(row, "llm_adapters", tokenizer)
        encoded = tokenizer(prompt + row["output"], return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        taken += len(ids)
        if taken > 500:
            break
        labels = torch.tensor([ids])
        labels[0, : sum(end <= len(prompt) for _, end in encoded["offset_mapping"])] = -100
        count = (labels != -100).sum().item()
        with torch.no_grad():
            total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * count
        predicted += count
    assert result(tmp_path / "out")["losses"]["base model"] == pytest.approx(total / predicted, rel=1e-5)
    assert result(tmp_path / "out")["tokens"] == predicted


def test_lines_and_the_picture(folder, whole, tmp_path, monkeypatch):
    torch.manual_seed(5)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(tmp_path / "model")
    shutil.copytree(whole, tmp_path / "out")
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    lines = (f"full fine-tuning={tmp_path / 'model'}", f"twin={folder / 'run/adapter'}")
    run(folder, tmp_path / "out", "--lines", *lines)
    analysis = result(tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert list(analysis["losses"]) == ["base model", "full fine-tuning", "twin", "adapter"]
    assert analysis["losses"]["full fine-tuning"] == pytest.approx(windows_loss(other, windows_of(folder)), rel=1e-6)
    assert analysis["losses"]["twin"] == analysis["losses"]["adapter"] != analysis["losses"]["base model"]
    assert analysis["directions"] == result(whole)["directions"]
    (axis,) = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    for direction in ("least", "most"):
        curve = [analysis["losses"]["adapter"], *analysis["directions"][direction]["losses"]]
        assert drawn[f"{direction} important first"] == curve
    for name, loss in analysis["losses"].items():
        assert drawn[f"{name}: {loss:.3f}"] == [loss, loss]
    torch.nn.init.zeros_(other.lm_head.weight)  # trained anew in the same folder: measured again
    other.save_pretrained(tmp_path / "model")
    run(folder, tmp_path / "out", "--lines", *lines)
    assert result(tmp_path / "out")["losses"]["full fine-tuning"] == pytest.approx(math.log(other.config.vocab_size))


def test_the_digest_of_an_adapter_is_of_its_configuration_and_weights(folder, tmp_path):
    shutil.copytree(folder / "run/adapter", tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    before, values = adapter_digest(str(tmp_path / "adapter")), json.loads(config.read_text())
    config.write_text(json.dumps(values | {"target_modules": values["target_modules"][::-1]}))  # PEFT writes a set
    assert adapter_digest(str(tmp_path / "adapter")) == before
    config.write_text(json.dumps(values | {"lora_alpha": 9}))
    assert adapter_digest(str(tmp_path / "adapter")) != before


def test_the_printed_flags_train_the_ends_of_the_order(folder, whole, capsys):
    capsys.readouterr()
    run(folder, whole)
    printed = [line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if "--selection" in line]
    assert len(printed) == 4
    chosen = [parse_arguments([SelectionArguments], flags.split(), "")[0].config.fixed_layers for _, flags in printed]
    orders = [result(whole)["directions"][direction]["order"] for direction in ("least", "most")]
    assert chosen == [[orders[0][-1]], [orders[0][0]], [orders[1][0]], [orders[1][-1]]]  # a quarter of four layers


def test_importance_is_compared_with_the_orders(folder, whole, tmp_path):
    analysis = {
        "directions": {"least": {"order": [2, 0, 3, 1]}, "most": {"order": [3, 1, 0, 2]}},
        "single_ablation": [0.2, 0.1, 0.0, 0.3],
    }
    found = compare_importance(analysis, [1.0, 3.0, 0.0, 2.0])
    assert found["least"] == {"rho": pytest.approx(1), "interval": pytest.approx([1, 1])}
    assert found["most"]["rho"] == pytest.approx(0.8)
    assert found["single_ablation"]["rho"] == pytest.approx(0.4)
    assert compare_importance(analysis, [-1.0, -3.0, 0.0, -2.0])["least"]["rho"] == pytest.approx(-1)
    # Ten values with rho 29/165 (ranks of IQ and hours of television, a textbook example), its interval by hand.
    iq, hours = (86, 97, 99, 100, 101, 103, 106, 110, 112, 113), (2, 20, 28, 27, 50, 29, 7, 17, 6, 12)
    rho = -29 / 165
    z = 0.5 * math.log((1 + rho) / (1 - rho))
    ends = [math.tanh(z + sign * 1.96 * math.sqrt(1.06 / 7)) for sign in (-1, 1)]
    assert agreement(iq, hours) == {"rho": pytest.approx(rho), "interval": pytest.approx(ends, abs=1e-4)}
    assert agreement([1, 1, 1, 1], [1, 2, 3, 4]) == {"rho": None, "interval": None}
    assert agreement([1, 2, 3], [3, 2, 1])["interval"] is None

    shutil.copytree(whole, tmp_path / "out")
    updates = ({"step": 4, "scores": [9, 9, 9, 1]}, {"step": 8, "scores": [0.5, 3, -1, 0]})
    (tmp_path / "importance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in updates))
    (tmp_path / "out/analysis.json").write_text(json.dumps(result(whole) | {"date": "2026-01-02"}))
    run(folder, tmp_path / "out", "--importance", tmp_path)  # a run's folder, or the file
    analysis = result(tmp_path / "out")
    assert analysis["importance"] == {str(tmp_path): compare_importance(analysis, [0.5, 3, -1, 0])}
    (tmp_path / "other.jsonl").write_text('{"step": 8, "scores": [1, 0, 2, 4]}\n')
    run(folder, tmp_path / "out", "--importance", tmp_path, tmp_path / "other.jsonl")
    analysis = result(tmp_path / "out")
    assert analysis["importance"]["the mean of 2 runs"] == compare_importance(analysis, [0.75, 1.5, 0.5, 2])
    assert [found["rho"] for found in analysis["between_runs"]] == [pytest.approx(-0.8)]
    least, most = (analysis["directions"][direction]["order"] for direction in ("least", "most"))
    first = [least.index(i) for i in range(4)], [3 - most.index(i) for i in range(4)]
    assert analysis["between_orders"]["rho"] == pytest.approx(stats.spearmanr(*first).statistic)

    # Into a README, as it stands in the published file; the picture next to that.
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- found -->\nold\n<!-- /found -->\nb\n")
    scores = ("--importance", tmp_path / "importance.jsonl", tmp_path / "other.jsonl")
    run(folder, tmp_path / "out", "--publish", tmp_path / "results/found.json")  # without scores
    run(folder, tmp_path / "out", *scores, "--publish", tmp_path / "results/found.json", "--readme", readme)
    published = json.loads((tmp_path / "results/found.json").read_text())
    assert published["between_runs"] == analysis["between_runs"]
    assert {published["date"], analysis["date"]} == {"2026-01-02"}  # of the measurement, not of its printing
    table = readme.read_text().removeprefix("a\n<!-- found -->\n").removesuffix("\n<!-- /found -->\nb\n")
    assert table == agreement_table(published)
    assert f"\n| {tmp_path.name} | " in table  # a run by its folder
    rho = analysis["importance"]["the mean of 2 runs"]["most"]["rho"]
    assert f"| {rho:+.2f} (" in table.split("the mean of 2 runs")[1].splitlines()[0]
    assert (tmp_path / "results/found.png").read_bytes() == (tmp_path / "out/layers.png").read_bytes()
    (tmp_path / "importance.jsonl").write_text('{"step": 4, "scores": [1, 2, 3]}\n')
    with pytest.raises(UsageError, match="has 3 scores, the adapter 4 layers"):
        run(folder, tmp_path / "out", "--importance", tmp_path / "importance.jsonl")


def test_bad_input_is_one_clear_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "load_scorer", lambda *_: pytest.fail("a model was loaded"))
    base = LlamaForCausalLM(tiny_config())
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        tmp_path / "prompt"
    )
    base.save_pretrained(tmp_path / "bare")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": ""}]')
    (tmp_path / "importance.jsonl").write_text('{"step": 1, "scores": [0, 0, 0, 0]}\n')
    model, text = ["--model_name_or_path", folder / "tiny"], ["--text_file", folder / "text.txt"]
    common, adapter = [*model, "--output_dir", tmp_path / "out"], ["--adapter", folder / "run/adapter"]
    for flags, message in (
        ((*adapter,), "give --text_file TXT or --rows_file JSON, and not both"),
        ((*adapter, *text, "--rows_file", folder / "rows.json"), "and not both"),
        ((*text,), "required: --adapter"),
        ((*adapter, *text, "--max_tokens", 1), "--max_tokens must be 2 or more; got 1"),
        ((*adapter, *text, "--batch_size", 0), "--batch_size must be 1 or more; got 0"),
        ((*adapter, *text, "--directions", "up"), "--directions must be least, most or both; got up"),
        ((*adapter, "--text_file", tmp_path / "no.txt"), "cannot be read"),
        ((*adapter, "--text_file", tmp_path / "empty.txt"), "is empty"),
        ((*adapter, "--text_file", tmp_path / "one.txt"), "single token"),
        ((*adapter, "--rows_file", tmp_path / "rows.json"), "row 0 has no answer"),
        ((*text, "--adapter", tmp_path), r"no adapter_config\.json"),
        (
            (*text, "--adapter", tmp_path / "prompt", "--any_base", "true"),
            "PROMPT_TUNING has no response of each layer",
        ),
        ((*adapter, *text, "--lines", "nowhere"), "--lines must be NAME=DIR"),
        ((*adapter, *text, "--lines", f"adapter={folder / 'tiny'}"), "--lines must be NAME=DIR"),
        ((*adapter, *text, "--lines", f"a={tmp_path}"), r"neither adapter_config\.json nor config\.json"),
        ((*adapter, *text, "--lines", f"a={tmp_path / 'bare'}"), "bare has no tokenizer"),
        ((*adapter, *text, "--importance", tmp_path / "no"), "has no importance scores"),
        ((*adapter, *text, "--importance", tmp_path), "all scores are equal"),
        ((*adapter, *text, "--output_dir", tmp_path / "one.txt"), "cannot be written"),
        ((*adapter, *text, "--readme", ROOT / "launch/experiments/README.md"), "--readme needs --publish"),
        (
            (*adapter, *text, "--readme", ROOT / "launch/experiments/README.md", "--publish", "layers-arithmetic.json"),
            "--readme takes the table of --importance, which is not given",
        ),
        (
            (*adapter, *text, "--readme", ROOT / "launch/experiments/README.md", "--publish", "none.json"),
            "no place <!-- none -->",
        ),
        ((*adapter, *text, "--readme", tmp_path / "one.txt", "--publish", "a.json"), "no place <!-- a -->"),
    ):
        reset_accelerate()
        with pytest.raises(UsageError, match=message) as error:
            main(list(map(str, [*common, *flags])))
        assert "\n" not in str(error.value)
    config = json.loads((folder / "tiny/config.json").read_text()) | {"max_position_embeddings": 16}
    shutil.copytree(folder / "tiny", tmp_path / "short/tiny")
    (tmp_path / "short/tiny/config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="--max_length leaves rows of 40 tokens, the model has 16 positions"):
        main(flags_of(folder, tmp_path / "out", "--model_name_or_path", tmp_path / "short/tiny"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"launch with accelerate_configs/ddp\.yaml"):
        main(flags_of(folder, tmp_path / "out"))
