"""What may happen to the folder of a stopped run: each kind of damage draws its file, byte, key or value at random.

`CHECKPOINT` has those of one checkpoint's folder, `RUN` those of the run's own files. Each returns what it did. Edits
under digests made anew ("resealed") are those that a reader can tell from the content: a number that is changed to
another valid one cannot be told from a right one, and is none of them.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import read_lines, reseal

Draw = random.Random
STATE, ADAPTER, OPTIMIZER = "checkpoint.json", "adapter.safetensors", "optimizer.safetensors"
RECORDS = ("metrics.jsonl", "importance.jsonl")
OTHER_TYPES = ("x", [], {}, None, 1.5, True, -1, [[]])
DEEP = "[" * 200_000 + "]" * 200_000


def flip(file: Path, draw: Draw, start: int = 0, end: int | None = None) -> str:
    content = bytearray(file.read_bytes())
    place, bit = draw.randrange(start, end or len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} of {file.name}"


def header_end(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def cut(file: Path, draw: Draw) -> str:
    length = draw.randrange(1, file.stat().st_size)
    os.truncate(file, length)
    return f"{file.name} cut to {length} bytes"


def zero_block(file: Path, draw: Draw) -> str:
    """As after a power cut: the file has its size, but a block was never written."""
    content = file.read_bytes()
    start = draw.randrange(len(content) // 2)
    length = draw.randrange(256, 4096)
    file.write_bytes(content[:start] + bytes(len(content[start : start + length])) + content[start + length :])
    return f"{length} zeros from byte {start} of {file.name} on"


def append(file: Path, draw: Draw) -> str:
    extra = draw.randbytes(draw.randrange(1, 64))
    with open(file, "ab") as stream:
        stream.write(extra)
    return f"{len(extra)} bytes after the end of {file.name}"


def another_thing(path: Path, draw: Draw, things: tuple[str, ...] = ("directory", "FIFO", "dangling link")) -> str:
    """Something else under the name of a file."""
    thing = draw.choice(things)
    path.unlink(missing_ok=True)
    if thing == "directory":
        path.mkdir()
    elif thing == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    return f"a {thing} in place of {path.name}"


def any_file(folder: Path, draw: Draw) -> Path:
    return folder / draw.choice((STATE, ADAPTER, OPTIMIZER))


def weights(folder: Path, draw: Draw) -> Path:
    return folder / draw.choice((ADAPTER, OPTIMIZER))


def other_checkpoint(folder: Path, draw: Draw) -> Path:
    others = [path for path in sorted(folder.parent.iterdir()) if path.is_dir() and path != folder]
    return draw.choice(others or [folder])


def remove(file: Path, leave_empty: bool = False) -> str:
    file.unlink()
    if leave_empty:
        file.touch()
    return f"{file.name} {'emptied' if leave_empty else 'removed'}"


def swap(one: Path, two: Path) -> str:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{one.parent.name}/{one.name} and {two.parent.name}/{two.name} swapped"


def swap_between(folder: Path, draw: Draw) -> str:
    file = any_file(folder, draw)
    return swap(file, other_checkpoint(folder, draw) / file.name)


def copy_from(folder: Path, draw: Draw) -> str:
    file, other = any_file(folder, draw), other_checkpoint(folder, draw)
    shutil.copy(other / file.name, file)
    return f"{file.name} is that of {other.name}"


# ------------------------------------------------------------------------------------------------------- JSON of a file


def places(value: dict | list, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def parent_of(state: dict, path: tuple) -> dict | list:
    for key in path[:-1]:
        state = state[key]
    return state


def any_place(state: dict, draw: Draw, depth: int = 9) -> tuple:
    """Of a key at the top, and of one below it half of the time; so that a long list is not drawn most often."""
    top = draw.choice([key for key in sorted(state) if key not in ("format", "digest")])
    below = [path for path in places(state) if path[0] == top and len(path) <= depth]
    return draw.choice(below if draw.random() < 0.5 else below[:1])


def edited(file: Path, change: Callable[[dict], str], seal: bool = False) -> str:
    state = json.loads(file.read_text())
    what = change(state)
    if seal:
        reseal(file.parent, state)
    else:
        file.write_text(json.dumps(state))
    return what


def other_value(draw: Draw) -> Callable[[dict], str]:
    def change(state: dict) -> str:
        leaves = [path for path in places(state) if not isinstance(parent_of(state, path)[path[-1]], (dict, list))]
        top = draw.choice(sorted({path[0] for path in leaves} - {"format", "digest"}))
        path = draw.choice([path for path in leaves if path[0] == top])
        old = parent_of(state, path)[path[-1]]
        if isinstance(old, bool) or old is None:
            new = not old
        elif isinstance(old, str):
            new = old + "x"
        else:
            new = old + draw.choice((1, -1, 0.5, 1e-9 if isinstance(old, float) and abs(old) < 1e5 else 2))
        parent_of(state, path)[path[-1]] = new
        return f"{'.'.join(map(str, path))} {old} -> {new}"

    return change


def dropped(draw: Draw) -> Callable[[dict], str]:
    def change(state: dict) -> str:
        path = any_place(state, draw)
        del parent_of(state, path)[path[-1]]
        return f"{'.'.join(map(str, path))} dropped"

    return change


def other_type(draw: Draw) -> Callable[[dict], str]:
    def change(state: dict) -> str:
        path = any_place(state, draw)
        old = parent_of(state, path)[path[-1]]
        new = draw.choice([value for value in OTHER_TYPES if type(value) is not type(old)])
        parent_of(state, path)[path[-1]] = new
        return f"{'.'.join(map(str, path))} {json.dumps(old)[:40]} -> {json.dumps(new)}"

    return change


def with_values(**values) -> Callable[[dict], str]:
    def change(state: dict) -> str:
        state |= values
        return ", ".join(f"{key} {value!r}" for key, value in values.items())

    return change


def step_99(folder: Path, rename: bool, seal: bool = False) -> str:
    step = next(step for step in range(99, 0, -1) if not folder.with_name(f"step_{step:06d}").exists())
    what = edited(folder / STATE, with_values(step=step), seal)
    if rename:
        folder.rename(folder.with_name(f"step_{step:06d}"))
    return what + (", and the folder's name" if rename else "")


def strange_json(file: Path, draw: Draw) -> str:
    """A text that JSON readers trip over."""
    text = file.read_text()
    place = draw.choice([i for i, letter in enumerate(text) if letter == '"'])
    kinds = {
        "nested deep": '{"deep": ' + DEEP + "," + text.lstrip()[1:],
        "not UTF-8": text[: place + 1].encode() + bytes([draw.randrange(128, 256)]) + text[place + 1 :].encode(),
        "UTF-16": text.encode("utf-16"),
        "a list": f"[{text}]",
        "null": "null",
        "an infinite number": '{"step": Infinity,' + text.lstrip()[1:],
        "a number of 5000 digits": text.replace('"step": ', '"step": ' + "9" * 5000, 1),
        "two objects": text + text,
    }
    kind = draw.choice(sorted(kinds))
    content = kinds[kind]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"{file.name}: {kind}"


# ------------------------------------------------------------------------------------------- tensors, with new digests


def tensors_edited(file: Path, change: Callable[[dict[str, Tensor]], str]) -> str:
    tensors = load_file(file)
    what = change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    reseal(file.parent, json.loads((file.parent / STATE).read_text()))
    return f"{file.name}: {what}"


def not_finite(draw: Draw) -> Callable[[dict[str, Tensor]], str]:
    def change(tensors: dict[str, Tensor]) -> str:
        name, value = draw.choice(sorted(tensors)), draw.choice((math.nan, math.inf, -math.inf))
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = value
        return f"{value} in {name}"

    return change


def other_dtype(draw: Draw) -> Callable[[dict[str, Tensor]], str]:
    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(sorted(tensors))
        dtype = draw.choice((torch.bfloat16, torch.float16, torch.float64, torch.int32))
        tensors[name] = tensors[name].to(dtype)
        return f"{name} is {dtype}"

    return change


def tensor_gone(draw: Draw, renamed: bool) -> Callable[[dict[str, Tensor]], str]:
    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(sorted(tensors))
        tensor = tensors.pop(name)
        if renamed:
            new = draw.choice((name + "x", "x" + name, name.replace("layers.", "layers.9")))
            tensors[new] = tensor
            return f"{name} renamed {new}"
        return f"{name} missing"

    return change


def tensor_more(draw: Draw) -> Callable[[dict[str, Tensor]], str]:
    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(sorted(tensors))
        new = draw.choice((name + "_more", "more", "more|exp_avg", name.partition("|")[0] + "|more"))
        tensors[new] = torch.zeros(draw.randrange(1, 5))
        return f"{new} more"

    return change


def no_tensors(tensors: dict[str, Tensor]) -> str:
    tensors.clear()
    return "no tensors"


def other_shape(draw: Draw) -> Callable[[dict[str, Tensor]], str]:
    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice([name for name in sorted(tensors) if tensors[name].ndim == 2])
        old = tensors[name]
        shapes = {"flat": old.flatten(), "a row less": old[:-1], "in a third dimension": old[None]}
        if old.shape[0] != old.shape[1]:
            shapes["transposed"] = old.T
        shape = draw.choice(sorted(shapes))
        tensors[name] = shapes[shape].clone()
        return f"{name} {shape}"

    return change


# ----------------------------------------------------------------------------------------------- folders and the record


def replaced(folder: Path, draw: Draw, how: str) -> str:
    """Another thing under the name of a checkpoint's folder."""
    other = other_checkpoint(folder, draw)
    shutil.rmtree(folder)
    if how == "file":
        folder.write_bytes(draw.randbytes(draw.randrange(64)))
    elif how == "empty":
        folder.mkdir()
    else:
        folder.symlink_to(other.name if how == "link" else "nowhere")
    return f"{folder.name} is {how}" + (f" to {other.name}" if how == "link" else "")


def renamed(folder: Path, draw: Draw) -> str:
    number = int(folder.name.removeprefix("step_"))
    name = draw.choice((f"step_{number}", f"step_{number:05d}", f"step_{number:07d}", f"{folder.name}.old", "step_²"))
    name = f"{folder.name}.bak" if folder.with_name(name).exists() else name
    folder.rename(folder.with_name(name))
    return f"{folder.name} is named {name}"


def stray(run: Path, draw: Draw) -> str:
    """One more thing among the checkpoints."""
    newest = max((run / "checkpoints").iterdir())
    number = int(newest.name.removeprefix("step_"))
    names = ("step_", "step_x", "step_²", "step_-00001", "step_000099", f"step_{number}", f"{newest.name}.old")
    path = run / "checkpoints" / draw.choice(names)
    what = draw.choice(("an empty folder", "a copy", "a file"))
    if what == "a file":
        path.write_text("")
    elif what == "a copy":
        shutil.copytree(newest, path)
    else:
        path.mkdir()
    return f"{what} named {path.name}"


def left_over(run: Path, draw: Draw) -> str:
    """What a process that died while saving, discarding or writing leaves; or has become."""
    newest = max((run / "checkpoints").iterdir())
    name = draw.choice((".saving-step_000012", f".saving-{newest.name}", f".discarded-{newest.name}", ".run.json.tmp"))
    if name.endswith(".tmp") or draw.random() < 0.25:
        (run / name).write_bytes(draw.randbytes(32))
        return f"a file {name}"
    shutil.copytree(newest, run / name)
    cut(run / name / ADAPTER, draw)
    return f"a folder {name}"


def finished_without(run: Path, draw: Draw) -> str:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "finished"}))
    return "status finished, no adapter/"


def bad_line(run: Path, draw: Draw) -> str:
    file = run / draw.choice(RECORDS)
    lines = file.read_bytes().split(b"\n")
    i = draw.randrange(len(lines) - 1)
    half = lines[i][: draw.randrange(1, len(lines[i]))]
    lines[i] = draw.choice((b"garbage", half, half + b"\xff\xfe", b"[1]", b"null", b"\x00" * 40, DEEP.encode()))
    file.write_bytes(b"\n".join(lines))
    return f"{file.name}: line {i + 1} is {lines[i][:40]!r}"


def cut_last_line(run: Path, draw: Draw) -> str:
    file = run / draw.choice(RECORDS)
    content = file.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    length = draw.randrange(last, len(content))
    os.truncate(file, length)
    return f"{file.name}: {len(content) - length} bytes less"


def later_lines(run: Path, draw: Draw) -> str:
    file = run / draw.choice(RECORDS)
    lines = read_lines(file)
    newest = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())
    lines += [{**draw.choice(lines), "step": newest + i, "loss": 0.0} for i in range(1, draw.randrange(2, 5))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{file.name}: lines up to step {lines[-1]['step']}"


def strange_line(run: Path, draw: Draw) -> str:
    """A line that is JSON, but not of the record."""
    file = run / draw.choice(RECORDS)
    lines = read_lines(file)
    i = draw.randrange(len(lines))
    others = ({}, {"step": "8"}, {"step": None}, {"step": 1}, {"step": 1, "scores": "x"}, {"step": 1, "loss": "x"})
    lines[i] = draw.choice(others)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{file.name}: line {i + 1} is {lines[i]}"


CHECKPOINT: dict[str, Callable[[Path, Draw], str]] = {
    "bit of the adapter's values": lambda f, d: flip(f / ADAPTER, d, header_end(f / ADAPTER)),
    "bit of the optimizer's values": lambda f, d: flip(f / OPTIMIZER, d, header_end(f / OPTIMIZER)),
    "bit of a header": lambda f, d: flip(file := weights(f, d), d, 0, header_end(file)),
    "bit of the JSON": lambda f, d: flip(f / STATE, d),
    "file cut": lambda f, d: cut(any_file(f, d), d),
    "file with a block of zeros": lambda f, d: zero_block(any_file(f, d), d),
    "file emptied": lambda f, d: remove(any_file(f, d), leave_empty=True),
    "file removed": lambda f, d: remove(any_file(f, d)),
    "file with bytes after its end": lambda f, d: append(any_file(f, d), d),
    "files swapped between checkpoints": swap_between,
    "files swapped in a checkpoint": lambda f, d: swap(f / ADAPTER, f / OPTIMIZER),
    "file of another step": copy_from,
    "file replaced": lambda f, d: another_thing(any_file(f, d), d, ("directory", "dangling link")),
    "FIFO in place of a file": lambda f, d: another_thing(any_file(f, d), d, ("FIFO",)),
    "JSON: step 99": lambda f, d: step_99(f, rename=False),
    "JSON: step 99, renamed": lambda f, d: step_99(f, rename=True),
    "JSON: another value": lambda f, d: edited(f / STATE, other_value(d)),
    "JSON: another format number": lambda f, d: edited(
        f / STATE, with_values(format=d.choice((0, -1, "2", True, 99, 1, 2.0, None, [2])))
    ),
    "JSON: key dropped": lambda f, d: edited(f / STATE, dropped(d)),
    "JSON: another type": lambda f, d: edited(f / STATE, other_type(d)),
    "JSON: strange text": lambda f, d: strange_json(f / STATE, d),
    "resealed: step 99, renamed": lambda f, d: step_99(f, rename=True, seal=True),
    "resealed: key dropped": lambda f, d: edited(f / STATE, dropped(d), seal=True),
    "resealed: another type": lambda f, d: edited(f / STATE, other_type(d), seal=True),
    "resealed: adapter not finite": lambda f, d: tensors_edited(f / ADAPTER, not_finite(d)),
    "resealed: optimizer not finite": lambda f, d: tensors_edited(f / OPTIMIZER, not_finite(d)),
    "resealed: adapter of another dtype": lambda f, d: tensors_edited(f / ADAPTER, other_dtype(d)),
    "resealed: optimizer of another dtype": lambda f, d: tensors_edited(f / OPTIMIZER, other_dtype(d)),
    "resealed: tensor missing": lambda f, d: tensors_edited(weights(f, d), tensor_gone(d, renamed=False)),
    "resealed: tensor renamed": lambda f, d: tensors_edited(weights(f, d), tensor_gone(d, renamed=True)),
    "resealed: tensor more": lambda f, d: tensors_edited(weights(f, d), tensor_more(d)),
    "resealed: optimizer without tensors": lambda f, d: tensors_edited(f / OPTIMIZER, no_tensors),
    "resealed: another shape": lambda f, d: tensors_edited(weights(f, d), other_shape(d)),
    "folder is a file": lambda f, d: replaced(f, d, "file"),
    "folder is empty": lambda f, d: replaced(f, d, "empty"),
    "folder is a link to another": lambda f, d: replaced(f, d, "link"),
    "folder is a dangling link": lambda f, d: replaced(f, d, "dangling"),
    "folder renamed": renamed,
}
RUN: dict[str, Callable[[Path, Draw], str]] = {
    "one more among the checkpoints": stray,
    "left over by a dead process": left_over,
    "finished without an adapter": finished_without,
    "run.json: bytes": lambda r, d: d.choice((flip, cut, append, zero_block))(r / "run.json", d),
    "run.json: key dropped": lambda r, d: edited(r / "run.json", dropped(d)),
    "run.json: another type": lambda r, d: edited(r / "run.json", other_type(d)),
    "run.json: strange text": lambda r, d: strange_json(r / "run.json", d),
    "run.json: removed": lambda r, d: remove(r / "run.json"),
    "run.json: replaced": lambda r, d: another_thing(r / "run.json", d),
    "record: a bad line": bad_line,
    "record: the last line cut": cut_last_line,
    "record: a strange line": strange_line,
    "record: lines after the checkpoint": later_lines,
    "record: removed or emptied": lambda r, d: remove(r / d.choice(RECORDS), leave_empty=d.random() < 0.5),
    "record: replaced": lambda r, d: another_thing(r / d.choice(RECORDS), d),
}
