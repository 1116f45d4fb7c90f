"""A finished run's adapter or model on the Hub: without a path of this machine in it."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ist.training.arguments import Arguments
from ist.training.command_line import UsageError, brief
from ist.training.export import base_name, write_card
from ist.training.files import RUN, read_object, write_json


def require_hub(args: Arguments) -> None:
    """Stop now, not after the training, when the result could not be pushed.

    Raises:
        UsageError: no login, or a base model that only this machine has and no name of it on the Hub.
    """
    if Path(args.model_name_or_path).exists() and not args.hub_base_model:
        raise UsageError(
            f"--push_to_hub true: the base model is a folder here ({args.model_name_or_path}); --hub_base_model is its "
            "name on the Hub."
        )
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise UsageError(
            f"--push_to_hub true finds no login ({brief(error)}): run `hf auth login`, or set HF_TOKEN."
        ) from error


def push(output_dir: Path, args: Arguments) -> None:
    """Push the result of a finished run, unless it was; run.json gets its address.

    Where that fails, one line on stderr says so: it costs no run.
    """
    run = read_object(output_dir / RUN)
    result = output_dir / ("model" if run["configuration"]["peft_method"] == "none" else "adapter")
    name = args.hub_model_id or re.sub(r"[^\w.-]+", "-", output_dir.absolute().name).strip("-.") or "ist"
    if str(run.get("hub") or "").rstrip("/").endswith(f"/{name}"):
        print(f"It is on the Hub: {run['hub']}.")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            api, private = HfApi(), args.hub_private_repo is not False
            url = api.create_repo(name, private=private, exist_ok=True)
            if private and not api.repo_info(url.repo_id).private:
                raise ValueError(f"{url.repo_id} is there and public; --hub_private_repo false pushes to it")
            stage(result, Path(folder) / result.name, run, args.hub_base_model, url.repo_id)
            api.upload_folder(
                repo_id=url.repo_id, folder_path=Path(folder) / result.name, commit_message="Importance-aware tuning"
            )
        write_json(output_dir / RUN, {**run, "hub": str(url)})
        print(f"pushed to {url}")
    except Exception as error:  # whatever the Hub or the network says
        again = f"the same command with --output_dir {output_dir} --resume_from_checkpoint auto tries again"
        print(f"{result} is not pushed ({brief(error)}); {again}.", file=sys.stderr, flush=True)


def stage(result: Path, folder: Path, run: dict[str, Any], base: str | None, repo_id: str) -> None:
    """Copy a result as the Hub gets it: the base model and the loading lines are the Hub's.

    Raises:
        ValueError: a file would still hold a path of this machine.
    """
    shutil.copytree(result, folder)
    name = run["configuration"]["model_name_or_path"]
    base = base or name
    if Path(base).exists():
        raise ValueError(f"the base model {base} is a folder of this machine; --hub_base_model is its name on the Hub")
    kind = ""
    for file in (folder / "adapter_config.json", folder / "config.json", folder / "tokenizer_config.json"):
        if not file.exists():
            continue
        values = read_object(file)
        kind = values.get("peft_type") or (values.get("architectures") or [kind])[0]
        for key in ("base_model_name_or_path", "_name_or_path", "name_or_path"):
            if key in values:
                values[key] = base
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(folder, run, base, repo_id, kind)
    paths = {str(result.parent.absolute()), base_name(name) if Path(name).exists() else ""} - {""}
    for file in folder.iterdir():
        if file.suffix in (".json", ".md", ".jinja", ".txt", ".py"):
            text = file.read_text(encoding="utf-8", errors="replace")
            if found := [path for path in paths if path in text]:
                raise ValueError(f"{file.name} holds {found[0]}, a path of this machine")
