"""Which PEFT methods train with IST: each method put to the same tests, as the table in ist/adapters/README.md.

    python tests/support/methods.py                     all methods; writes launch/results/methods.json and the table
    python tests/support/methods.py --methods LoRA DoRA      some of them; prints

A topology is one launch: all methods train in it one after the other, each by train_ist.py's own main. A cell is "yes",
or "no" or "n/a" with the reason.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from accelerate import PartialState
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ist.layers import LayerMap
from ist.suppression import evaluation_mode, suppress
from ist.training.command_line import UsageError, brief
from ist.tuner import SparseTuner
from support import make_tiny, read_lines, reset_accelerate, warm_python
from support.method_table import COLON, METHODS, TARGETS, as_table, publish

STEPS, HALF = 12, 6


def write_config(name: str, folder: Path) -> Path:
    values = {"target_modules": TARGETS} | METHODS[name]
    file = folder / "peft.json"
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return file


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Watch:
    """What happens inside a run of train_ist.py: the tuner, and what moved in the steps in which a layer rested."""

    def __init__(self) -> None:
        self.tuner: SparseTuner | None = None
        self.moved_at_rest: set[int] = set()
        self.zeroed_at_rest: set[int] = set()
        self.moved_in_training: set[int] = set()

    def _snapshot(self) -> list[list[torch.Tensor]]:
        return [[local(p).detach().clone() for p in layer] for layer in self.tuner.layers.parameters]

    def look(self, resting: set[int]) -> None:
        """Compare with the last look. Entries that AdaLoRA's budget set to zero are told apart."""
        now = self._snapshot()
        for i, (before, after) in enumerate(zip(self.last, now, strict=True)):
            for one, two in zip(before, after, strict=True):
                if torch.equal(one, two):
                    continue
                if i not in resting:
                    self.moved_in_training.add(i)
                elif ((one == two) | (two == 0)).all():
                    self.zeroed_at_rest.add(i)
                else:
                    self.moved_at_rest.add(i)
        self.last = now

    @contextlib.contextmanager
    def inside(self):
        init, begin_step = SparseTuner.__init__, SparseTuner.begin_step

        def watched_init(tuner, model, *args, **kwargs):
            init(tuner, model, *args, **kwargs)
            self.tuner = tuner
            self.world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            # Now: during a step, FSDP swaps in the gathered parameters, and leaves the root's there.
            self.all_dtensors = all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
            adapter = {id(p) for layer in tuner.layers.parameters for p in layer}
            adapter |= {id(model.get_parameter(name)) for name in tuner.layers.outside}
            self.base = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in adapter}
            self.hooks = hooks(model)
            self.last = self._snapshot()

        def watched_step(tuner, step):
            if step:
                self.look(set(range(tuner.layers.n_layers)) - set(tuner.trained))
            update = begin_step(tuner, step)
            assert hooks(tuner.model) == self.hooks, "hooks are left outside a probe"
            return update

        SparseTuner.__init__, SparseTuner.begin_step = watched_init, watched_step
        try:
            yield self
        finally:
            SparseTuner.__init__, SparseTuner.begin_step = init, begin_step


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """4-bit weights are bytes in the clothes of floats, some of them NaN."""
    return one.shape == two.shape and torch.equal(one.data.view(torch.uint8), two.data.view(torch.uint8))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def train(work: Path, name: str, run: Path, rows: int, **overrides) -> Watch:
    """Train a method by train_ist.py's main, silently; raises what it raises."""
    import train_ist

    run.parent.mkdir(parents=True, exist_ok=True)
    values = {
        **{"model_name_or_path": work / "tiny", "train_file": work / "train.json", "output_dir": run},
        **{"peft_config": write_config(name, run.parent), "report_to": "none", "max_steps": STEPS},
        **{"update_interval": 4, "trained_layers": 1, "score_lr": 1000, "learning_rate": 5e-3, "warmup_steps": 2},
        **{"logging_steps": 1, "per_device_train_batch_size": rows, **overrides},
    }
    reset_accelerate()
    with (
        Watch().inside() as watch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        code = train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))])
    assert code == 0, f"exit code {code}"
    return watch


class Mixed(nn.Module):
    """The reference for a gate: one module adapted and one, of another copy, with adapters off, mixed in float64."""

    def __init__(self, adapted: nn.Module, plain: nn.Module, gate: float) -> None:
        super().__init__()
        self.adapted, self.plain, self.gate = adapted, plain, gate

    def forward(self, *args, **kwargs):
        plain, adapted = self.plain(*args, **kwargs), self.adapted(*args, **kwargs)
        return (plain.double() + self.gate * (adapted.double() - plain.double())).to(adapted.dtype)


@torch.no_grad()
def suppression(model: PeftModel, layers: LayerMap) -> str:
    """g = 1: the plain output, bit for bit; g = 0: disable_adapter's; 0.25 and one g per row: within 1e-6."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):  # trained whole, of no layer: no gate concerns it
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
    ids = torch.randint(3, 400, (3, 17), generator=torch.Generator().manual_seed(2))
    ids[:, 5] = COLON  # where aLoRA begins
    with evaluation_mode(model):
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        # Away from where training left it, as far as shows: what a method makes of one number differs by thousands.
        torch.manual_seed(1)
        noises = [(p, p.clone(), torch.randn_like(p)) for layer in layers.parameters for p in layer]
        for size in (0.05, 0.02, 0.005, 0.001):
            for parameter, start, noise in noises:
                parameter.copy_(start + size * noise)
            adapted = model(input_ids=ids).logits
            if (adapted - base).abs().max() < 0.5 * base.abs().max():
                break
        tolerance = 1e-6 * max(1, adapted.abs().max())
        assert (adapted - base).abs().max() > 1000 * tolerance, "the adapter does nothing, so nothing was tested"

        def gated(layer_numbers: list[int], gate: float | torch.Tensor, ids=ids) -> torch.Tensor:
            with suppress(layers.tuners_outside(set(range(layers.n_layers)) - set(layer_numbers)), gate):
                return model(input_ids=ids).logits

        every, some = list(range(layers.n_layers)), [1, 3]
        if not torch.equal(gated(every, 1.0), adapted):
            return "no: g = 1 is not the plain output"
        if (difference := (gated(every, 0.0) - base).abs().max()) > tolerance:
            return f"no: g = 0 is {difference:.0e} off"
        mixed = gated(some, 0.25)
        reference, plain = copy.deepcopy(model), copy.deepcopy(model)
        plain.base_model.disable_adapter_layers()
        for name, module in list(reference.named_modules()):
            if isinstance(module, BaseTunerLayer) and any(f".layers.{i}." in f"{name}." for i in some):
                parent, _, child = name.rpartition(".")
                setattr(reference.get_submodule(parent), child, Mixed(module, plain.get_submodule(name), 0.25))
        assert (mixed - adapted).abs().max() > 10 * tolerance, "g = 0.25 changes nothing, so nothing was tested"
        if (difference := (mixed - reference(input_ids=ids).logits).abs().max()) > tolerance:
            return f"no: g = 0.25 is {difference:.0e} off"
        gates = torch.tensor([1.0, 0.25, 0.0])
        apart = torch.cat([gated(some, gate.item(), ids[i : i + 1]) for i, gate in enumerate(gates)])
        if (difference := (gated(some, gates) - apart).abs().max()) > tolerance:
            return f"no: one g per row is {difference:.0e} off"
        if not torch.equal(model(input_ids=ids).logits, adapted):
            return "no: the model has changed"
    return "yes"


def rest(watch: Watch) -> str:
    model, trained = watch.tuner.model, [i for i, count in enumerate(watch.tuner.trained_counts) if count]
    watch.look(set(range(watch.tuner.layers.n_layers)) - set(watch.tuner.trained))
    if watch.moved_at_rest:
        return "no: a resting layer moved"
    if watch.moved_in_training != set(trained):
        return "no: a trained layer did not move"
    changed = [n for n, p in model.named_parameters() if n in watch.base and not same_bits(p, watch.base[n])]
    if changed:
        return f"no: {changed[0]} moved"
    if watch.zeroed_at_rest:
        return "yes; the budget also prunes singular values of resting layers"
    if outside := len(watch.tuner.layers.outside):
        return f"yes; {outside} tensor{'s' if outside > 1 else ''} of no layer or of several always train"
    return "yes"


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def resume(work: Path, name: str, run: Path) -> str:
    train(work, name, run.parent / "resumed", 4, resume_from_checkpoint=run / f"checkpoints/step_{HALF:06d}")
    steps = [line["step"] for line in read_lines(run.parent / "resumed/metrics.jsonl")]
    assert steps == list(range(HALF + 1, STEPS + 1)), "it did not go on from the checkpoint"
    whole, resumed = adapter_of(run), adapter_of(run.parent / "resumed")
    same = whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    return "yes" if same else "no: another adapter"


@torch.no_grad()
def reload(work: Path, watch: Watch, run: Path, dequantised: bool = False) -> str:
    ids = torch.randint(3, 400, (3, 17), generator=torch.Generator().manual_seed(2))
    ids[:, 5] = COLON  # where aLoRA begins
    with evaluation_mode(watch.tuner.model):
        trained = watch.tuner.model(input_ids=ids).logits
    with contextlib.redirect_stderr(io.StringIO()):
        base = AutoModelForCausalLM.from_pretrained(work / "tiny")
        if dequantised:
            nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
            packed = AutoModelForCausalLM.from_pretrained(work / "tiny", quantization_config=nf4, device_map="cpu")
            for path, module in packed.named_modules():
                if isinstance(module, Linear4bit):
                    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                    base.get_submodule(path).weight.copy_(weight)
        before = base(input_ids=ids).logits
        again = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
    if (again - before).abs().max() < 1e-4:
        return "no: the saved adapter does nothing"
    difference = (again - trained).abs().max()
    tolerance = (1e-4 if dequantised else 1e-6) * max(1, trained.abs().max())
    return "yes" if difference <= tolerance else f"no: logits are {difference:.0e} off"


def quantised(work: Path, name: str, folder: Path) -> str:
    """A 4-bit base: the trained adapter acts as it does on the same base, dequantised by bitsandbytes."""
    watch = train(work, name, folder / "4bit", 4, load_in_4bit=True)
    if (answer := rest(watch)) != "yes" and not answer.startswith("yes"):
        return answer
    if not any("4bit" in type(module).__name__ for module in watch.tuner.model.modules()):
        return "no: the base is not in 4 bits"
    answer = reload(work, watch, folder / "4bit", dequantised=True)
    if answer != "yes":
        return answer
    answer = suppression(watch.tuner.model, watch.tuner.layers)
    return answer if answer == "yes" else f"no: trains, but suppression: {answer.removeprefix('no: ')}"


def two_ranks(work: Path, name: str, topology: str) -> str:
    """The same run as on one process: draws equal, losses and adapter within rounding."""
    run, reference = work / topology / slug(name) / "run", work / "one" / slug(name) / "run"
    watch = train(work, name, run, 2)
    assert watch.world_size == 2, "not two ranks"
    assert watch.all_dtensors == (topology == "fsdp2"), "not the topology asked for"
    if watch.moved_at_rest:
        return "no: a resting layer moved"
    if os.environ["RANK"] != "0":  # rank 0 has the files
        return ""
    for one, two in zip(read_lines(run / "metrics.jsonl"), read_lines(reference / "metrics.jsonl"), strict=True):
        if one["trained_layers"] != two["trained_layers"]:
            return f"no: other layers from step {one['step']}"
        if abs(one["loss"] - two["loss"]) > 1e-4:
            return f"no: loss {abs(one['loss'] - two['loss']):.0e} off at step {one['step']}"
    ours, theirs = adapter_of(run), adapter_of(reference)
    difference = sum((ours[key].double() - theirs[key].double()).pow(2).sum() for key in theirs).sqrt()
    norm = sum(value.double().pow(2).sum() for value in theirs.values()).sqrt()
    return "yes" if difference < 1e-3 * norm else f"no: the adapter is {difference / norm:.0e} off"


def slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def cell(function: Callable[..., str], *args) -> str:
    """The answer of a test, or the error as a reason."""
    try:
        return function(*args)
    except UsageError:
        raise
    except Exception as error:
        return f"no: {type(error).__name__}: {brief(error)[:120]}"


def reason_of(error: UsageError) -> str:
    """The line without the key and the method's name."""
    return re.sub(r"^.*peft\.json: (\w+ is not served: )?", "", str(error))


def refusable(function: Callable[..., str], *args) -> str:
    """The same where the method may be refused, with a line that says so."""
    try:
        return cell(function, *args)
    except UsageError as error:
        return f"no: refused: {reason_of(error)}"


def one_process(work: Path, name: str) -> dict[str, str]:
    run = work / "one" / slug(name) / "run"
    watches: list[Watch] = []

    def trained() -> str:
        watches.append(train(work, name, run, 4, save_steps=HALF))
        return rest(watches[0])

    try:
        cells = {"rest": cell(trained)}
    except UsageError as error:
        return {"refused": reason_of(error)}
    if watches:
        cells["resume"] = cell(resume, work, name, run)
        cells["reload"] = cell(reload, work, watches[0], run)
        cells["suppression"] = cell(suppression, watches[0].tuner.model, watches[0].tuner.layers)
        cells["4-bit"] = refusable(quantised, work, name, run.parent)
    return cells


def worker(topology: str, work: Path, names: list[str]) -> None:
    """All methods in this process, which is one rank of a launch; the answers go to {topology}.json."""
    answers: dict[str, dict[str, str]] = {}
    PartialState.destroy_process_group = lambda *_: None  # main ends with it; the next method goes on with the group
    if topology == "fsdp2":
        from ist.benchmark.fsdp_on_cpu import turn_on_fsdp

        turn_on_fsdp()
    for name in names:
        start = time.perf_counter()
        if topology == "one":
            answers[name] = one_process(work, name)
        else:
            answers[name] = {topology: refusable(two_ranks, work, name, topology)}
        if os.environ.get("RANK", "0") == "0":
            print(f"{name} ({topology}, {time.perf_counter() - start:.0f} s): {answers[name]}", flush=True)
            (work / f"{topology}.json").write_text(json.dumps(answers))


def launch(topology: str, work: Path, names: list[str], timeout: int) -> dict[str, dict[str, str]]:
    """Run the worker on a topology: the configurations that ship, on CPU."""
    command = [warm_python(), __file__]
    if topology != "one":
        command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(ROOT / f"accelerate_configs/{topology}.yaml"), __file__]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHON_EXEC"] = warm_python()  # torchrun's, for the ranks
    command += ["--worker", topology, "--work", str(work), "--methods", *names]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=os.environ | environment, cwd=ROOT, timeout=timeout, check=False)
    file = work / f"{topology}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def run_all(names: list[str], timeout: int = 3600) -> dict[str, dict[str, str]]:
    """{method: {cell: answer}}, from one launch for each topology."""
    from ist.training.word_problems import arithmetic_rows

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = arithmetic_rows(60, seed=1, held_out=False)
        make_tiny(work / "tiny", rows)
        (work / "train.json").write_text(json.dumps(rows))
        answers = launch("one", work, names, timeout)
        able = [name for name in names if (work / "one" / slug(name) / "run/adapter").exists()]
        for topology, title in (("ddp", "DDP x2"), ("fsdp2", "FSDP2 x2")):
            found = launch(topology, work, able, timeout)
            for name in able:
                answers[name][title] = found.get(name, {}).get(topology, "no: the launch ended before")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--worker", choices=["one", "ddp", "fsdp2"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.work, options.methods)
        return
    start = time.time()
    answers = run_all(options.methods)
    print(as_table(answers))
    if options.methods != list(METHODS):
        return
    readme = ROOT / "ist/adapters/README.md"
    seconds = round(time.time() - start)
    publish("methods", as_table(answers), readme, seconds=seconds, configurations=METHODS, answers=answers)


if __name__ == "__main__":
    main()
