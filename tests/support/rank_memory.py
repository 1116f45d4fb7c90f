"""The CPU memory of each rank while a model is loaded, a checkpoint saved, and one resumed from, in the model's sizes.

    python tests/support/rank_memory.py [--before CHECKOUT] [--output launch/results/rank_memory.md]

Four ranks on CPU (gloo), FSDP2, full fine-tuning of a Llama of 42 M parameters in float32. Memory is what the process
holds of its own (RssAnon), watched every two milliseconds: the peak within a call above what was held at its begin.
The device of these ranks is the CPU: shards are in the figures. Files of weights are mapped: their pages, which the
ranks of a node share, are not. `--before` measures another checkout beside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANKS = 4
PHASES = ("load", "save", "resume")


def held() -> int:
    """Bytes of this process's own."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The peak of `held` while entered, above what it was."""

    def __enter__(self) -> "Peak":
        self.base, self.peak, self._on = held(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.peak = max(self.peak, held() - self.base)
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self._on = False
        self._thread.join()


def one_rank(work: Path, arguments: list[str]) -> None:
    """train_ist.py, its loading, saves and resume watched; what it had goes to work/RANK.json."""
    import train_ist
    from ist.benchmark.fsdp_on_cpu import turn_on_fsdp

    turn_on_fsdp()
    seen: dict[str, int] = {}

    def watched(phase, call):
        def calls(*args, **options):
            with Peak() as peak:
                result = call(*args, **options)
            seen[phase] = max(peak.peak, seen.get(phase, 0))
            return result

        return calls

    train_ist.prepare = watched("load", train_ist.prepare)
    train_ist.Checkpoints.save = watched("save", train_ist.Checkpoints.save)
    train_ist.Checkpoints.resume = watched("resume", train_ist.Checkpoints.resume)
    code = train_ist.main(arguments)
    file = work / f"{os.environ['RANK']}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(earlier | seen))
    sys.exit(code)


def write_inputs(work: Path) -> int:
    """A model and rows; the model's bytes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ist.training.word_problems import arithmetic_rows
    from support import make_tiny

    rows = arithmetic_rows(40, seed=1, held_out=False)
    make_tiny(work / "tiny", rows)
    (work / "rows.json").write_text(json.dumps(rows))
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, tie_word_embeddings=False, **sizes))
    model.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(work / "tiny").save_pretrained(work / "model")
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(work: Path, checkout: Path, name: str) -> list[dict[str, int]]:
    """Each rank's {phase: bytes} of two steps with a save, and a resume."""
    environment = os.environ | {
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        # Blocks go back to the system when they are freed, or an earlier call's would hide this one's.
        **{"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    }
    out = work / name
    out.mkdir()
    values = {
        **{"model_name_or_path": work / "model", "train_file": work / "rows.json", "output_dir": out / "run"},
        **{"report_to": "none", "peft_method": "none", "selection": "all", "max_steps": 4, "save_steps": 2},
        **{"per_device_train_batch_size": 1, "max_length": 32, "warmup_steps": 0, "learning_rate": 1e-4},
    }
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "4"]
    command += ["--config_file", "accelerate_configs/fsdp2.yaml", str(ROOT / "tests/support/rank_memory.py")]
    subprocess.run([*command, "--rank", str(out), *flags], cwd=checkout, env=environment, check=True)
    # The first run's resume had nothing to read.
    flags += ["--output_dir", str(out / "again"), "--resume_from_checkpoint", str(out / "run/checkpoints/step_000002")]
    subprocess.run([*command, "--rank", str(out), *flags], cwd=checkout, env=environment, check=True)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


def of_70b() -> list[tuple[str, ...]]:
    """What eight ranks of a node hold on the CPU for Llama-3.1-70B, in GB: counted on tensors without storage."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
        weights = sum(parameter.nbytes for parameter in base.parameters())
        full = 4 * sum(parameter.numel() for parameter in base.parameters())
        adapted = get_peft_model(base, LoraConfig(r=32, target_modules=targets), low_cpu_mem_usage=True)
        lora = 4 * sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    rows = []
    for name, loaded, trained in (("LoRA r 32", weights, lora), ("full fine-tuning", full, full)):
        for what, before, now in (
            ("load", 8 * loaded, loaded),
            ("moments at a save", 8 * 2 * trained, 2 * trained),
        ):
            rows.append((f"{name}: {what}", f"{before / 1e9:.0f}", f"{now / 1e9:.0f}"))
    return rows


def main() -> None:
    if sys.argv[1] == "--rank":
        sys.path[:0] = [os.getcwd(), os.getcwd() + "/tests"]
        one_rank(Path(sys.argv[2]), sys.argv[3:])
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from ist.training.command_line import markdown_table
    from support.suites import heading

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to measure beside this one")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        size = write_inputs(work)
        seen = {"now": measure(work, ROOT, "now")}
        if args.before:
            seen = {"before": measure(work, args.before.absolute(), "before")} | seen
    rows = [
        (phase, when, *(f"{max(one[phase] for one in ranks) / size:.2f}" for ranks in (seen[when][:1], seen[when][1:])))
        for phase in PHASES
        for when in seen
    ]
    made_by = (
        f"Made by tests/support/rank_memory.py: {RANKS} gloo ranks, FSDP2, all {size / 1e6:.0f} MB of a model train."
    )
    table = markdown_table(("peak of own memory / the model's size", "", "rank 0", "most of the others"), rows)
    header = ("Llama-3.1-70B, a node of eight ranks: tensors on the CPU, GB", "before", "now")
    counted = markdown_table(header, of_70b())
    text = "\n".join([*heading("Memory of each rank", made_by), *table, "", *counted, ""])
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
