"""Going on from what an earlier run left: its adapter's configuration, weights and scores."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import AdaLoraConfig, PeftConfig
from transformers.utils.hub import cached_file

from ist.config import ISTConfig
from ist.training.arguments import Arguments
from ist.training.command_line import UsageError, brief
from ist.training.files import IMPORTANCE, file_digest, json_digest, read_lines, read_object, require_no_pipes

CONFIG = "adapter_config.json"


@cache
def adapter_folder(name: str) -> Path:
    """The folder of an adapter: `name`, or what the Hub has under it (its cache, without a network); the same one
    whenever it is asked for.

    Raises:
        UsageError: there is no adapter; the message names one that is near.
    """
    key, folder = f"--adapter_name_or_path {name}", Path(name)
    if folder.exists():
        require_no_pipes(key, folder)
        if (folder / CONFIG).is_file():
            return folder
        near = [path for path in (folder / "adapter", folder.parent / "adapter") if (path / CONFIG).is_file()]
        hint = f"; take {near[0]}" if near else ""
        raise UsageError(f"{key} is not a folder with an adapter (no {CONFIG}){hint}.")
    try:
        return Path(snapshot_download(name, allow_patterns=["adapter_*"]))
    except Exception as error:  # a name that the Hub does not have, no network
        raise UsageError(f"{key} is no folder, and no adapter on the Hub or in its cache: {brief(error)}") from error


def require_no_adapter(key: str, name: str) -> None:
    """transformers loads an adapter that lies beside a model's weights, and says nothing.

    Args:
        key: the argument, for the message.

    Raises:
        UsageError: `name`, a folder or a model on the Hub, holds an adapter.
    """
    try:
        found = cached_file(name, CONFIG, _raise_exceptions_for_missing_entries=False, local_files_only=True)
    except (OSError, ValueError):  # no such model: the error of its loading says so
        return
    if not found:
        return
    if (Path(found).parent / "config.json").exists():
        raise UsageError(
            f"{key} {name} holds an adapter beside its weights ({CONFIG}), which would be loaded with them: remove it "
            "from there."
        )
    base = read_object(Path(found)).get("base_model_name_or_path")
    raise UsageError(
        f"{key} {name} is an adapter and no model: pass {key} {base or 'ITS_BASE'}, and the adapter by its own key "
        "(--adapter_name_or_path of train_ist.py, --adapter of ist.evaluate)."
    )


def files_digest(files: Iterable[Path]) -> str:
    """Digest of the files' contents.

    Raises:
        UsageError: one cannot be read.
    """
    digests = []
    for file in files:
        try:
            digests.append(file_digest(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}. Repair it, or name another one.") from error
    return json_digest(digests)[:16]


def adapter_digest(folder: str | Path | None, key: str = "--adapter") -> str | None:
    """Digest of an adapter's configuration and weights; the order of module names, a set to PEFT, does not count.

    Args:
        key: the argument that names it, for messages.

    Raises:
        ReadError, UsageError: a file cannot be read.
    """
    if folder is None:
        return None
    file = Path(folder) / CONFIG
    listed = {name: sorted(map(str, v)) if isinstance(v, list) else v for name, v in read_object(file, key).items()}
    weights = files_digest(path for path in sorted(Path(folder).glob("adapter_*")) if path != file)
    return hashlib.sha256((json.dumps(listed, sort_keys=True) + weights).encode()).hexdigest()[:16]


def base_notes(args: Arguments) -> list[str]:
    """A line where an adapter to go on from names another base model; a folder may have another name here."""
    if not args.adapter_name_or_path:
        return []
    base = read_object(adapter_folder(args.adapter_name_or_path) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or Path(base).name.lower() == Path(args.model_name_or_path).name.lower():
        return []
    return [f"{args.adapter_name_or_path} was trained on {base}, and goes on here on {args.model_name_or_path}"]


def require_schedule(args: Arguments, peft_config: PeftConfig | None, before: int | None, max_steps: int) -> None:
    """For a run that goes on, of `before` steps until then.

    Raises:
        UsageError: it has more steps now, and its method was scheduled over those.
    """
    if before == max_steps:
        return
    if args.selection == "id3" and not args.id3_steps:
        raise UsageError("--max_steps: id3 was scheduled over the run's steps; a run with --id3_steps can go on.")
    if isinstance(peft_config, AdaLoraConfig):
        raise UsageError("--max_steps: AdaLoRA's budget was scheduled over the run's steps, which must stay.")


def earlier_scores(adapter: Path, config: ISTConfig, layers: list[str]) -> list[float]:
    """[N_L] the last scores of the run that an adapter is of.

    Raises:
        UsageError: no such run beside the adapter, no scores of it, or they are of other layers or another rule.
    """
    key, run_folder = "--keep_importance true", adapter.parent
    if config.selection != "ist":
        raise UsageError(f"{key} is for --selection ist, whose scores it keeps; got {config.selection}.")
    if not (run_folder / "run.json").is_file():
        raise UsageError(f"{key}: {run_folder} is not the folder of a run (no run.json), so it has no scores.")
    run = read_object(run_folder / "run.json")
    lines = [line for line in read_lines(run_folder / IMPORTANCE) if isinstance(line.get("scores"), list)]
    if not lines:
        raise UsageError(f"{key}: the run in {run_folder} has no scores ({IMPORTANCE}): leave it out.")
    rule = (run.get("configuration") or {}).get("score_rule")
    if run.get("layers") != layers or len(lines[-1]["scores"]) != len(layers):
        raise UsageError(f"{key}: the scores in {run_folder} are of other layers than this model's.")
    if rule != config.score_rule:
        raise UsageError(f"{key}: the scores in {run_folder} are of --score_rule {rule}; got {config.score_rule}.")
    return lines[-1]["scores"]
