"""How long the steps of different arms take, side by side: what `python -m ist.benchmark speed` and `scale` measure.

An arm is a run of train_ist.py itself, of a bare loop, or of transformers.Trainer, over the same rows, in a process of
its own. Arms take turns step by step, A B C A B C, so that what else the machine does falls on all of them alike; then
again with another seed, so that draws do.
"""

import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ist.config import CHEAP
from ist.distributed import CollectiveCounter
from ist.loss import token_loss_sum
from ist.report.statistics import spearman
from ist.suppression import evaluation_mode
from ist.training.arguments import ARGUMENTS, Arguments
from ist.training.command_line import UsageError, parse_arguments
from ist.training.data import GlobalBatches, collate, micro_batches, prepare_data
from ist.training.files import read_lines
from ist.training.model import load_model, plan_layers
from ist.training.observer import Observer
from ist.training.peft_config import make_peft_config
from ist.tuner import PROBES, SparseTuner

WINDOW = 10  # steps: one importance update at the default interval
ARMS: dict[str, dict] = {
    "bare loop": {},
    "transformers.Trainer": {},
    "all": {"selection": "all"},
    "random": {"selection": "random"},
    "lisa": {"selection": "lisa"},
    "ist": {"selection": "ist"},
    "ist, cheap probe": {"selection": "ist", "probe": "cheap"},
    "ist, gradient probe": {"selection": "ist", "probe": "gradient"},
    "last": {"selection": "last"},
    "id3": {"selection": "id3"},
    "semantic+ist, cheap probe": {"selection": "semantic+ist", "probe": "cheap"},
}


def train_ist() -> ModuleType:
    """train_ist.py, which stands beside the package and not in it.

    Raises:
        UsageError: it is not there: the package was installed by itself.
    """
    try:
        import train_ist
    except ImportError as error:
        raise UsageError("this needs train_ist.py: run it in a checkout of the repository, from its folder.") from error
    return train_ist


def as_argv(flags: dict[str, Any]) -> list[str]:
    """{"bf16": True, "fixed_layers": [1, 2]} as a command line."""

    def strings(value: Any) -> list[str]:
        return [text for item in value for text in strings(item)] if isinstance(value, list) else [str(value)]

    return [part for key, value in flags.items() for part in (f"--{key}", *strings(value))]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch(Observer):
    """Seconds in each part of a training step, from inside train_ist.py; each part waits for the device.

    Args:
        steps: those that count.
        parts: tell the parts of a step apart.
        lockstep: wait for the other arms before each step.
    """

    def __init__(self, steps: range, parts: bool, lockstep: "Lockstep | None" = None) -> None:
        self.steps, self.parts, self.lockstep = steps, parts, lockstep
        self.seconds: dict[str, float] = defaultdict(float)
        self.on = False

    def ready(self, tuner: SparseTuner, optimizer: torch.optim.Optimizer) -> None:
        self.tuner = tuner

    def before_step(self, step: int) -> None:
        if self.lockstep:
            self.lockstep.wait(step)
        self.on = self.parts and step in self.steps

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        synchronize()
        start, probes = time.perf_counter(), self.tuner.probe_seconds
        yield
        synchronize()
        probes = self.tuner.probe_seconds - probes
        if probes:
            self.seconds["probe"] += probes
        self.seconds[name] += time.perf_counter() - start - probes


class Lockstep:
    """Inside an arm's process: before a step, wait until the others have done theirs, and say when it is done.

    Args:
        stride: steps that a turn has. On a GPU a window, as to wait for the device at each step would hold it up.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed must not get between

    def wait(self, step: int) -> None:
        if step % self.stride == 0:
            synchronize()
            print("ready", file=self.out, flush=True)
            if not sys.stdin.readline():
                raise SystemExit("the benchmark is gone")

    def finish(self, result: dict[str, float]) -> None:
        print(json.dumps(result), file=self.out, flush=True)


class ArmProcess:
    """An arm as seen from the benchmark: a process that does `stride` steps at each `go`."""

    def __init__(self, arm: str, flags: dict[str, Any], stride: int, parts: bool) -> None:
        asked = {key: value if isinstance(value, list) else str(value) for key, value in flags.items()}
        command = [sys.executable, "-m", "ist.benchmark", "arm", "--name", arm, "--flags", json.dumps(asked)]
        command += ["--stride", str(stride), *["--parts"] * parts]
        self.arm = arm
        path = [str(Path(__file__).parent.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, text=True, **pipes
        )
        self._read()  # loaded, and about to begin

    def _read(self) -> str:
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the arm {self.arm} ended with {self.process.wait()}; why is above")
        return line

    def go(self) -> float:
        """Do one turn; its seconds."""
        start = time.perf_counter()
        print(file=self.process.stdin, flush=True)
        self._read()
        return time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        """Seconds per step of the parts that the arm tells apart, and its peak memory on a GPU."""
        print(file=self.process.stdin, flush=True)
        return json.loads(self._read())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _reset() -> None:
    """Accelerate keeps its state in singletons: a second run in one process starts from none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_ours(flags: dict, parts: bool, lockstep: Lockstep | None = None) -> dict[str, float]:
    """Seconds per step of train_ist.py after the first window: `total`, and with `parts` of each part of a step."""
    _reset()
    steps = int(flags["max_steps"])
    # The last step is no turn: after it, a run saves.
    watch = Stopwatch(range(WINDOW, steps - 1 if lockstep else steps), parts, lockstep)
    with tempfile.TemporaryDirectory() as folder:
        values = flags | {"output_dir": f"{folder}/run", "logging_steps": WINDOW, "report_to": "none"}
        with _silent():
            code = train_ist().main(as_argv(values), watch)
        if code:
            raise RuntimeError(f"train_ist.py ended with {code} in arm {flags}")
        lines = [line for line in read_lines(Path(folder) / "run/metrics.jsonl") if "loss" in line][1:]
        # On a CPU a process's peak is that of all arms before.
        peak = {"peak_memory_bytes": lines[-1]["peak_memory_bytes"]} if torch.cuda.is_available() else {}
    total = statistics.mean(line["step_seconds"] for line in lines)
    return {"total": total, **peak} | {part: value / len(watch.steps) for part, value in watch.seconds.items()}


def run_bare(args: Arguments, model: PeftModel, rows: Dataset, pad: int, lockstep: Lockstep) -> None:
    """Plain PEFT as one would write it down: forward, backward, clip, AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0)
    stream = GlobalBatches(len(rows), args.per_device_train_batch_size, args.seed)
    device = model.device
    for step in range(args.max_steps):
        lockstep.wait(step)
        (batch,) = micro_batches(rows, stream.rows(step), args.per_device_train_batch_size, 0, 1, pad)
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        labels = nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)  # logits[:, :-1] would be a copy
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(**batch, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_trainer(args: Arguments, model: PeftModel, rows: Dataset, pad: int, lockstep: Lockstep) -> None:
    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            lockstep.wait(state.global_step)

    _reset()
    with tempfile.TemporaryDirectory() as folder, _silent():
        training = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.per_device_train_batch_size,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            bf16=args.bf16,
            seed=args.seed,
            report_to=[],
            save_strategy="no",
            logging_steps=WINDOW,
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )

        def pad_rows(batch: list[dict]) -> dict[str, torch.Tensor]:
            return collate([row["input_ids"] for row in batch], [row["labels"] for row in batch], pad)

        Trainer(model=model, args=training, train_dataset=rows, data_collator=pad_rows, callbacks=[TakeTurns()]).train()


def arguments_of(flags: dict) -> Arguments:
    """The arguments of a run of train_ist.py, resolved as it does."""
    argv = as_argv(flags)
    *groups, _ = parse_arguments(ARGUMENTS, argv, "")
    return Arguments.joined(groups)


def run_arm(arm: str, flags: dict[str, str], stride: int, parts: bool) -> None:
    """Inside an arm's process: all its steps, in turn with the others."""
    lockstep = Lockstep(stride)
    if arm not in ("bare loop", "transformers.Trainer"):
        lockstep.finish(run_ours(flags, parts, lockstep))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = arguments_of(flags)
    with _silent():
        Accelerator()
        args = plan_layers(args, sharded=False).args
        data = prepare_data(args)
        model = load_model(args, make_peft_config(args), device).to(device)
    run = run_bare if arm == "bare loop" else run_trainer
    run(args, model, data.rows, data.pad_token_id, lockstep)
    lockstep.finish({"peak_memory_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {})


def take_turns(arms: dict[str, dict], steps: int, parts: bool, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """{arm: {total: seconds per step after the first window, turns: those of each turn of `stride` steps, parts}}.

    Args:
        arms: {name: keys of train_ist.py}.
    """
    stride = WINDOW if torch.cuda.is_available() else 1
    with contextlib.ExitStack() as stack:
        processes = {}
        for arm, flags in arms.items():
            # The last step is not counted: after it, a run saves.
            processes[arm] = ArmProcess(arm, flags | {"max_steps": steps + 1}, stride, parts)
            stack.callback(processes[arm].close)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for step in range(0, steps, stride):
            if step % WINDOW == 0:
                say(f"step {step}/{steps} of {len(arms)} arms")
            for arm, process in processes.items():
                seconds[arm].append(process.go())
        counted = {arm: values[WINDOW // stride :] for arm, values in seconds.items()}
        return {
            arm: process.finish()
            | {"total": sum(counted[arm]) / (steps - WINDOW), "turns": counted[arm], "stride": stride}
            for arm, process in processes.items()
        }


def measure_speed(
    flags: dict, arms: Sequence[str], rounds: int, together: int, say: Callable[[str], None]
) -> dict[str, list[dict]]:
    """{arm: [seconds per step and of its parts, one for each round]}; `bare` is the seconds of the bare loop beside it.

    Args:
        together: arms in memory at a time, the bare loop apart, which is beside each such group; 0 is all.
    """
    bare = [arm for arm in arms if arm == "bare loop"]
    others = [arm for arm in arms if arm not in bare]
    together = together or max(1, len(others))
    groups = [[*bare, *others[i : i + together]] for i in range(0, len(others), together)] or [bare]
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for group in groups:
            settings, steps = {arm: flags | {"seed": turn} | ARMS[arm] for arm in group}, int(flags["max_steps"])
            measured = take_turns(settings, steps, not torch.cuda.is_available(), say)
            if torch.cuda.is_available():  # which telling the parts apart holds up
                for arm, parts in take_turns(settings, steps, True, say).items():
                    measured[arm] = parts | measured[arm]
            for arm, result in measured.items():
                result |= {"bare": measured["bare loop"]["turns"]} if bare else {}
                results[arm].append(result)
                say(f"round {turn + 1}/{rounds}  {arm}: {100 * result['total']:.1f} s per 100 steps")
    return results


def count_flops(flags: dict) -> dict[str, float]:
    """FLOPs of the matrix products of one forward, and of its backward with all layers trained; counted, not timed."""
    args = arguments_of(flags)
    _reset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _silent():
        Accelerator()
        args = plan_layers(args, sharded=False).args
        data = prepare_data(args)
        model = load_model(args, make_peft_config(args), device).to(device)
    indices = GlobalBatches(len(data.rows), args.per_device_train_batch_size, 0).rows(0)
    (batch,) = micro_batches(data.rows, indices, args.per_device_train_batch_size, 0, 1, data.pad_token_id)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    with FlopCounterMode(display=False) as forward:
        loss = token_loss_sum(model, batch)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return {
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
        "tokens": batch["labels"].numel(),
    }


def matmul_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of square matrix products of that size, the best of several on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize()
        begin = time.perf_counter()
        one @ two
        synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def make_geometry(folder: Path, n_layers: int, tokenizer: Path, **shape) -> Path:
    """A random Llama of a given shape, with the tokenizer of another folder."""
    from transformers import AutoTokenizer

    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    config = LlamaConfig(num_hidden_layers=n_layers, vocab_size=vocabulary, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    with _silent():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} … {max(values):.3g})"


def ratio_of(runs: Sequence[dict], draws: int = 2000) -> tuple[float, list[float]]:
    """(seconds of an arm / those of the bare loop beside it, its 95 % interval by bootstrap of the turns).

    Turns at the first step of a window, when importance is updated, are drawn for one another only.
    """
    generator, sums = np.random.default_rng(0), np.zeros((draws, 2))
    first, other = [], []
    for run in runs:
        for i, pair in enumerate(zip(run["turns"], run["bare"], strict=True)):
            (other if i * run["stride"] % WINDOW else first).append(pair)
    for pairs in (np.array(kind) for kind in (first, other) if kind):
        sums += pairs[generator.integers(len(pairs), size=(draws, len(pairs)))].sum(1)
    own, bare = np.array(first + other).sum(0)
    return float(own / bare), np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5]).tolist()


def window_means(run: dict) -> list[float]:
    """Seconds per step of each window."""
    turns = WINDOW // run["stride"]
    return [sum(run["turns"][i : i + turns]) / WINDOW for i in range(0, len(run["turns"]), turns)]


def speed_table(results: dict[str, list[dict]], tokens: int) -> list[list[str]]:
    """Rows of the speed table: seconds per 100 steps by part, and the ratio to the bare loop beside it.

    Args:
        tokens: of a step.
    """
    rows = []
    for arm, runs in results.items():
        cells = []
        for part in ("forward", "backward", "optimizer", "probe", "bookkeeping", "total"):
            values = [100 * run[part] for run in runs if part in run]
            cells.append(f"{statistics.median(values):.3g}" if values else "")
        cells[-1] = spread([100 * mean for run in runs for mean in window_means(run)])
        ratio = ""
        if "bare" in runs[0]:
            ratio, (low, high) = ratio_of(runs)
            ratio = f"{ratio:.3f}" + (f" ({low:.3f} … {high:.3f})" if arm != "bare loop" else "")
        rate = f"{tokens / statistics.median(run['total'] for run in runs):.0f}"
        rows.append([arm, *cells, rate, ratio])
    return rows


class ProbeComparison(Observer):
    """At each update, the losses of every kind of probe on the candidates that are about to be compared.

    Attributes:
        updates: [{step, rewards: {probe: [N_L] sums of a layer's rewards}, seconds: {probe: seconds}}].
    """

    def __init__(self, rows: int, bf16: bool, say: Callable[[str], None]) -> None:
        self.rows, self.bf16, self.say, self.updates = rows, bf16, say, []

    def ready(self, tuner: SparseTuner, optimizer: torch.optim.Optimizer) -> None:
        self.tuner = tuner

    def first_rows(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """What a cheap probe takes: of the rows of a full one the first eighth."""
        batch = next(iter(self.tuner.probe_batches(step)))
        yield {key: value[: max(1, self.rows // CHEAP)] for key, value in batch.items()}

    def before_step(self, step: int) -> None:
        tuner = self.tuner
        if not tuner.rule.due(step):
            return
        candidates, device = tuner.rule.candidates(step), next(tuner.model.parameters()).device
        kept = torch.tensor([[float(i in c) for i in range(tuner.layers.n_layers)] for c in candidates])
        record: dict[str, Any] = {"step": step, "rewards": {}, "seconds": {}}
        for name, probe in PROBES.items():
            batches = partial(tuner.probe_batches if name == "full" else self.first_rows, step)
            start = time.perf_counter()
            with evaluation_mode(tuner.model), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                sums = probe(tuner.model, tuner.layers, candidates, tuner.config.suppression, batches, tuner.loss)
            likelihood = torch.exp(-sums[:, 0] / sums[:, 1]).cpu()
            record["seconds"][name] = time.perf_counter() - start
            record["rewards"][name] = ((likelihood - likelihood.mean()).float() @ kept).tolist()
        self.updates.append(record)
        self.say(f"update at step {step}: {json.dumps(record['seconds'])}")


def probe_agreement(flags: dict, say: Callable[[str], None]) -> list[dict]:
    """At each update of a run of ist with the full probe: per-layer rewards of each probe, on identical candidates."""
    comparison = ProbeComparison(int(flags["per_device_train_batch_size"]), bool(flags.get("bf16")), say)
    with tempfile.TemporaryDirectory() as folder:
        _reset()
        values = flags | {"output_dir": f"{folder}/run", "report_to": "none", "selection": "ist"}
        code = train_ist().main(as_argv(values), comparison)
    if code:
        raise RuntimeError(f"train_ist.py ended with {code}")
    return comparison.updates


def rank_correlation(seen: list[dict], probe: str, draws: int = 2000) -> tuple[float, list[float]]:
    """(Spearman's rho of a probe's per-layer rewards with the full probe's, its 95 % interval by bootstrap of updates).

    Rho of each update, then the mean over updates.
    """
    rhos = [spearman(one["rewards"][probe], one["rewards"]["full"]) for one in seen]
    generator = np.random.default_rng(0)
    means = [np.mean(generator.choice(rhos, size=len(rhos))) for _ in range(draws)]
    return float(np.mean(rhos)), np.percentile(means, [2.5, 97.5]).tolist()


class Traffic(Observer):
    """What travels at each step, and how much of the adapter trains in it."""

    def __init__(self, counter: CollectiveCounter) -> None:
        self.steps = counter.steps

    def ready(self, tuner: SparseTuner, optimizer: torch.optim.Optimizer) -> None:
        self.tuner = tuner

    def before_step(self, step: int) -> None:
        self.finish_step()
        self.steps.append({})

    def finish_step(self) -> None:
        if self.steps:
            trained, layers = self.tuner.trained_parameters(), self.tuner.layers
            everything = [parameter for layer in layers.parameters for parameter in layer]
            for name, count, parameters in (
                ("trained layers", len(self.tuner.trained), trained),
                ("all layers", layers.n_layers, everything),
            ):
                self.steps[-1][name] = [count, sum(p.numel() * p.element_size() for p in parameters)]


def communicate(flags: dict) -> None:
    """On each rank of a launch: train, and rank 0 prints {collective: [calls, bytes] per step} as one line of JSON."""
    with CollectiveCounter() as counter:
        traffic = Traffic(counter)
        with contextlib.redirect_stdout(sys.stderr):
            code = train_ist().main(as_argv(flags), traffic)
        traffic.finish_step()
    if code:
        raise RuntimeError(f"train_ist.py ended with {code}")
    if os.environ.get("RANK", "0") == "0":
        print("traffic: " + json.dumps(counter.steps))


def measure_communication(flags: dict, topology: str, ranks: int) -> tuple[list[dict], float]:
    """(what travels at each step of train_ist.py on `ranks` processes, seconds per step), from a launch of its own."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(root / f"accelerate_configs/{topology}.yaml"), "--num_processes", str(ranks)]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if torch.cuda.device_count() < ranks:  # processes on the CPU; FSDP is on there by our own means only
        command += [str(Path(__file__).parent / "fsdp_on_cpu.py")]
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    else:
        command += ["-m"]
    with tempfile.TemporaryDirectory() as folder:
        values = flags | {"output_dir": f"{folder}/run", "report_to": "none"}
        command += ["ist.benchmark", "rank", "--flags", json.dumps({key: str(value) for key, value in values.items()})]
        done = subprocess.run(command, env=os.environ | environment, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the launch ended with {done.returncode}: {done.stderr[-2000:]}")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("traffic: "))
        seconds = [line["step_seconds"] for line in read_lines(Path(folder) / "run/metrics.jsonl")][-1]
    return json.loads(line.removeprefix("traffic: ")), seconds


def communication_row(name: str, steps: list[dict]) -> list[str]:
    """A row of the table: calls and bytes of each collective per step, and gradients' share of the adapter's bytes."""
    gradients = [
        sum(step.get(c, [0, 0])[1] for c in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single"))
        for step in steps
    ]
    ratio = [one / step["all layers"][1] for one, step in zip(gradients, steps)]
    trained = [step["trained layers"][0] / step["all layers"][0] for step in steps]
    names = sorted({key for step in steps for key in step} - {"trained layers", "all layers"})
    counted = (
        f"{c}: {statistics.mean(step.get(c, [0, 0])[0] for step in steps):.1f} calls, "
        f"{statistics.mean(step.get(c, [0, 0])[1] for step in steps) / 1e3:.1f} kB"
        for c in names
    )
    return [name, "; ".join(counted), f"{statistics.mean(ratio):.4f}", f"{statistics.mean(trained):.4f}"]


SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def measure_scale(flags: dict, tokenizer: Path, layers: Sequence[int], say: Callable[[str], None]) -> list[list[str]]:
    """Rows of the scale table: what a step costs, and the share of the method's own bookkeeping, as things grow.

    Bookkeeping is what the method adds to a loop, probes apart: draws, switching, records. One run each, one process.
    """
    rows = []

    def row(name: str, **settings) -> None:
        result = run_ours(flags | settings, parts=True)
        own = result["bookkeeping"] / result["total"]
        rows.append(
            [name, f"{1e3 * result['total']:.0f}", f"{1e3 * result['probe']:.1f}", f"{1e3 * result['bookkeeping']:.2f}"]
        )
        rows[-1].append(f"{100 * own:.2f} %")
        say(" | ".join(rows[-1]))

    with tempfile.TemporaryDirectory() as folder:
        for n_layers in layers:
            model = make_geometry(Path(folder) / str(n_layers), n_layers, tokenizer, **SHAPE)
            row(f"{n_layers} layers", model_name_or_path=model)
        smallest = {"model_name_or_path": Path(folder) / str(layers[0])}
        for candidates in (2, 6):
            row(f"{layers[0]} layers, {candidates} candidates", candidates=candidates, **smallest)
        for interval in (2, 5):
            row(f"{layers[0]} layers, an update every {interval} steps", update_interval=interval, **smallest)
    return rows
