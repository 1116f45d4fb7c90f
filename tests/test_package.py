"""`pip install ./ist`: the callback's example from another folder, with the installed package alone."""

import json
import os
import subprocess
import sys

from support import ROOT, read_lines


def test_the_installed_package_trains_from_another_folder(tiny, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    source = tmp_path / "ist"  # a copy: building leaves files in the folder
    tracked = subprocess.run(["git", "ls-files", "ist"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*install, str(source)], check=True)
    rows = [{"instruction": f"How much is {i} + 1?", "output": str(i + 1)} for i in range(16)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(ROOT / "launch/examples/trainer.py"), str(tiny), "../rows.json", "run", "22"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True)
    run = tmp_path / "elsewhere/run"
    assert [line["step"] for line in read_lines(run / "importance.jsonl")] == [10, 20]
    assert (run / "adapter/adapter_model.safetensors").exists() and (run / "importance.png").exists()
    where = "import ist; print(ist.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=run, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path / "site"))
