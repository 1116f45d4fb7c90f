"""A golden record: what runs leave, bit for bit, to prove that a refactoring changes nothing.

    python tests/support/golden.py record OUT [--repo CHECKOUT] [--old RECORD] [--topologies one ddp fsdp2]
    python tests/support/golden.py compare RECORD RECORD

`record` trains tiny models by the CHECKOUT's train_ist.py and keeps encoded rows, metrics, importance, run.json,
tracker calls, weights and checkpoints (as digests), printed lines, the callback's runs, `--help`, and what bad command
lines print.
With `--old` it also goes on from the checkpoints of an older record, and fails unless they lead to the same end.
Make one before and one after, on one machine: processors round differently. Nothing here uses a module of ist/ but
through what users call, so that rooms may move.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLOCKS = {
    *("step_seconds", "tokens_per_second", "peak_memory_bytes", "probe_seconds", "start", "end", "versions", "commit"),
    *("hardware", "slurm_job", "files", "wandb_run_id", "train/step_seconds", "train/tokens_per_second"),
    *("train/peak_memory_bytes", "probe/seconds", "probe/time_share"),
}
BASE = {
    **{"report_to": "none", "max_steps": 20, "warmup_steps": 2, "update_interval": 4, "logging_steps": 2},
    **{"lora_r": 4, "lora_alpha": 8, "learning_rate": 5e-3, "score_lr": 100, "save_steps": 10, "validation_size": 8},
    **{"eval_steps": 10, "trained_layers": 1, "lora_dropout": 0},
}
ADALORA = {"peft_type": "ADALORA", "target_modules": ["q_proj", "v_proj", "up_proj"], "init_r": 6, "target_r": 2}
ADALORA |= {"tinit": 4, "tfinal": 5, "deltaT": 5}
ARMS: dict[str, dict[str, Any]] = {
    "ist": {},
    "ist, cheap probe, bf16, dropout": {"probe": "cheap", "bf16": True, "lora_dropout": 0.1},
    "gradient probe": {"probe": "gradient"},
    "released": {"score_rule": "released"},
    "semantic+ist": {"selection": "semantic+ist"},
    "lisa": {"selection": "lisa", "lisa_interval": 4},
    "id3": {"selection": "id3", "id3_budget": 0.3},
    "AdaLoRA": {"peft_config": "adalora.json", "lora_r": None, "lora_alpha": None, "lora_dropout": None},
    "series": {"peft_method": "series", "bottleneck_size": 8},
    "packing": {"packing": True},
    "4-bit": {"load_in_4bit": True},
    "gradient_checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "load_best_model_at_end": {
        **{"load_best_model_at_end": True, "learning_rate": 1, "lr_scheduler_type": "constant", "eval_steps": 2},
        "save_total_limit": 1,
    },
    "peft_method none": {"peft_method": "none", "selection": "lisa", "lisa_interval": 4},
    "optimizer_state offload": {"optimizer_state": "offload", "selection": "random"},
    "optimizer_state drop": {"optimizer_state": "drop", "selection": "random"},
}


def write_inputs(work: Path) -> None:
    """A tiny Llama with a tokenizer of its own, and word problems."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [
        {"instruction": f"Ada has {a} pens and buys {b}. How many?", "output": f"{a} + {b} = {a + b}. So {a + b}."}
        for a in range(3, 90, 5)
        for b in (7, 31 * a % 50, 600 + a)
    ]
    work.mkdir(parents=True)
    (work / "rows.json").write_text(json.dumps(rows))
    (work / "adalora.json").write_text(json.dumps(ADALORA))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    bpe.train_from_iterator([row["instruction"] + row["output"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(work / "tiny")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=4, vocab_size=400, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(work / "tiny")


# --------------------------------------------------------------------------------------------------------- what is kept


def cleaned(value: Any, work: Path) -> Any:
    """Without clocks and machines; folders by their place under `work`."""
    if isinstance(value, dict):
        return {key: cleaned(item, work) for key, item in value.items() if key not in CLOCKS}
    if isinstance(value, (list, tuple)):
        return [cleaned(item, work) for item in value]
    if isinstance(value, str):
        return re.sub(r"[\d.]+ s/step", "s/step", value.replace(str(work), "WORK"))
    return value if isinstance(value, (int, float, bool)) or value is None else str(value)


def digests(file: Path) -> dict[str, list]:
    """{tensor: [dtype, shape, sha256 of its bytes]} of a safetensors file."""
    import torch
    from safetensors.torch import load_file

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    return {name: [str(t.dtype), list(t.shape), digest(t)] for name, t in sorted(load_file(file).items())}


def contents(run: Path, work: Path) -> dict[str, Any]:
    """{file of a run's folder: what is in it}."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(file.relative_to(run))
        if file.suffix == ".safetensors":
            found[name] = digests(file)
        elif file.suffix == ".jsonl":
            found[name] = cleaned([json.loads(line) for line in file.read_text().splitlines()], work)
        elif file.suffix == ".json" and "tokenizer" not in file.name:
            value = json.loads(file.read_text())
            if file.name == "adapter_config.json":  # module names are a set to PEFT
                value = {key: sorted(v, key=str) if isinstance(v, list) else v for key, v in value.items()}
            found[name] = cleaned(value, work)
        elif file.suffix == ".md":
            found[name] = cleaned(file.read_text(), work)
    return found


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """A line for each place where two records differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        lines = []
        for key in sorted(one.keys() | two.keys()):
            if key in one and key in two:
                lines += differences(one[key], two[key], f"{path}/{key}")
            else:
                lines.append(f"{path}/{key} is only in the {'first' if key in one else 'second'}")
        return lines
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [line for i, pair in enumerate(zip(one, two)) for line in differences(*pair, f"{path}[{i}]")]
    return [] if one == two else [f"{path}: {str(one)[:200]} | {str(two)[:200]}"]


# ----------------------------------------------------------------------------------------------------- what is recorded


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def turn_on_fsdp() -> None:
    """Accelerate leaves FSDP off on CPU, in silence."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            plugin = FullyShardedDataParallelPlugin()
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def run_script(argv: list[str], work: Path) -> dict[str, Any]:
    """train_ist.py as `python train_ist.py` runs it: its exit code and what it prints."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["train_ist.py", *argv]
    reset_accelerate()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path("train_ist.py", run_name="__main__")
        code: Any = None
    except SystemExit as end:
        code = end.code
    except Exception as error:
        code = repr(error)[:300]
    finally:
        sys.argv = before
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    return cleaned({"code": code, "printed": out.getvalue(), "errors": errors}, work)


def flags(values: dict[str, Any]) -> list[str]:
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]


@contextlib.contextmanager
def watched(calls: list[Any], sharded: list[bool], work: Path) -> Iterator[None]:
    """Tracker calls, and whether each prepared model is sharded; the process group outlives a run."""
    from accelerate import Accelerator, PartialState
    from torch.distributed.tensor import DTensor

    try:
        from ist.training.trackers import Trackers
    except ImportError:  # of an older checkout
        Trackers = Accelerator
    log, prepare, destroy = Trackers.log, Accelerator.prepare, PartialState.destroy_process_group

    def logged(self, values, step=None, **options):
        calls.append([step, cleaned(dict(values), work)])
        return log(self, values, step=step, **options)

    def prepared(self, model, *others):
        result = prepare(self, model, *others)
        sharded.append(all(isinstance(p, DTensor) for p in result[0].parameters()))
        return result

    Trackers.log, Accelerator.prepare = logged, prepared
    PartialState.destroy_process_group = lambda *_: None
    yield
    Trackers.log, Accelerator.prepare, PartialState.destroy_process_group = log, prepare, destroy


def train_arms(topology: str, work: Path, old: Path | None) -> None:
    """All arms on this rank; rank 0 writes WORK/topology.json."""
    if topology == "fsdp2":
        turn_on_fsdp()
    calls: list[Any] = []
    sharded: list[bool] = []
    with watched(calls, sharded, work):
        record = train_all(topology, work, old, calls)
    if topology == "fsdp2" and not (sharded and all(sharded)):
        raise SystemExit("FSDP was not on")
    if os.environ.get("RANK", "0") == "0":
        (work / f"{topology}.json").write_text(json.dumps(record))


def train_all(topology: str, work: Path, old: Path | None, calls: list[Any]) -> dict[str, Any]:
    """{arm and kind: exit code, printed lines, files, tracker calls}."""
    record: dict[str, Any] = {}
    for name, arm in ARMS.items():
        slug = name.replace(", ", "-").replace(" ", "-")
        where = work / topology / slug
        checkpoints = {"run": None, "resumed": where / "checkpoints/step_000010"}
        if old:
            checkpoints["resumed from old"] = old / topology / slug / "checkpoints/step_000010"
        for kind, checkpoint in checkpoints.items():
            if checkpoint and not checkpoint.exists():
                continue
            output_dir = where if kind == "run" else Path(f"{where}-{kind.replace(' ', '-')}")
            inputs = old if kind == "resumed from old" else work  # whose names are part of a configuration
            values = BASE | {"model_name_or_path": inputs / "tiny", "train_file": inputs / "rows.json"} | arm
            values |= {"output_dir": output_dir, "per_device_train_batch_size": 4 if topology == "one" else 2}
            if "peft_config" in arm:
                values["peft_config"] = inputs / arm["peft_config"]
            if checkpoint:
                values["resume_from_checkpoint"] = checkpoint
            calls.clear()
            result = run_script(flags(values), work)
            if os.environ.get("RANK", "0") == "0":
                entry = result | {"files": contents(output_dir, work), "tracked": list(calls)}
                if kind != "resumed from old":
                    record[f"{name}: {kind}"] = entry
                else:  # what the older checkpoint leads to, as the record's own
                    own = record[f"{name}: resumed"]["files"]
                    after = [key for key in own if key.endswith((".safetensors", ".jsonl"))]
                    if lost := [key for key in after if entry["files"].get(key) != own[key]]:
                        raise SystemExit(f"{topology}, {name}: from the older checkpoint come other {lost}")
                print(f"{topology}  {name}: {kind}  {result['code']}", file=sys.stderr, flush=True)
    return record


def launch(topology: str, work: Path, old: Path | None) -> dict[str, Any]:
    command = [sys.executable]
    if topology != "one":
        command += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", f"accelerate_configs/{topology}.yaml"]
    command += [str(Path(__file__).absolute()), "arms", str(work), "--topologies", topology]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    subprocess.run([*command, *(["--old", str(old)] if old else [])], env=os.environ | environment, check=True)
    return json.loads((work / f"{topology}.json").read_text())


def others(work: Path) -> dict[str, Any]:
    """`--help`, what bad command lines print, the callback, and encoded rows."""
    import golden_cases

    good = BASE | {"model_name_or_path": work / "tiny", "train_file": work / "rows.json", "output_dir": work / "bad"}
    bad = golden_cases.bad_command_lines(work)
    return {
        "help": run_script(["--help"], work),
        "bad": {name: run_script(flags(good | values), work) for name, values in bad.items()},
        "callback": cleaned(golden_cases.callback_runs(work), work),
        "encoded rows": golden_cases.encoded_rows(work),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("record", "compare", "arms"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--repo", type=Path, default=Path(__file__).absolute().parents[2])
    parser.add_argument("--old", type=Path)
    parser.add_argument("--topologies", nargs="+", default=["one", "ddp", "fsdp2"])
    args = parser.parse_args()
    if args.command == "compare":
        lines = differences(*(json.loads((path / "record.json").read_text()) for path in args.paths))
        print("\n".join(lines) or "the records are equal")
        return bool(lines)
    sys.path[:0] = [os.getcwd()] if args.command == "arms" else [str(args.repo)]
    if args.command == "arms":
        train_arms(args.topologies[0], args.paths[0], args.old)
        return 0
    out, old = args.paths[0].absolute(), args.old and args.old.absolute() / "work"
    os.chdir(args.repo)
    write_inputs(out / "work")
    record: dict[str, Any] = {topology: launch(topology, out / "work", old) for topology in args.topologies}
    record |= others(out / "work")
    (out / "record.json").write_text(json.dumps(record, indent=1, sort_keys=True))
    print(f"{len(ARMS)} arms on {', '.join(args.topologies)}; {len(record['bad'])} bad command lines: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
