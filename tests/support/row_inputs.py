"""Ten inputs that a reader with README and --help alone thought of: what became of each then, and now.

    python tests/support/row_inputs.py [--output FILE]

Then: commit c178bd5. Now: what is learnt (between ⟦ and ⟧) of the first row, or the message.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets

from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.data import prepare_data, shown_rows
from support import suites

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
CHAT = ["--prompt_template", "chat", "--completion_only_loss", "true"]
PLAIN = ["--prompt_template", "none", "--completion_only_loss", "true"]
CALL = {"name": "pay", "arguments": '{"amount": 2.50}'}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
TOOL = {"type": "function", "function": {"name": "pay", "description": "Pays."}}
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.tool_calls %}"
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]<|im_end|>"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% else %}[TOOL] {{ m.content }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def answer(text: str | None, **others) -> dict:
    return {"role": "assistant", "content": text, **others}


def rows(*records: dict) -> dict[str, bytes]:
    return {"rows.jsonl": "\n".join(map(json.dumps, records)).encode()}


def turns(*messages: dict, **columns) -> dict[str, bytes]:
    return rows({"messages": list(messages), **columns})


THOUGHT = answer("<think>\nfirst thought\n</think>\n\n2")
# input -> (files, flags, what became of it then)
INPUTS: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "OpenAI's older function_call": (
        turns(user("Pay."), answer("", function_call=CALL), user("ok", "function"), answer("Done."), functions=[TOOL]),
        [*CHAT, "--chat_template", "qwen3"],
        "wrong in silence: the call was gone",
    ),
    "a call where the template has no generation prompt": (
        turns(user("Pay."), CALLED, user("ok", "tool"), answer("Done.")) | {"mistral.jinja": MISTRAL.encode()},
        [*CHAT, "--chat_template", "mistral.jinja"],
        "wrong in silence: learnt from the tool's name on",
    ),
    "roles of logs: prompter, chatgpt": (
        turns(user("Hello?", "prompter"), answer("Hello.") | {"role": "chatgpt"}),
        CHAT,
        "wrong in silence: the roles were text, the answer not learnt",
    ),
    "a role that nobody knows": (turns(user("a"), answer("b"), user("c", "critic")), CHAT, "the role was text"),
    "name and audio in a turn": (
        turns(user("Who am I?") | {"name": "alice", "audio": {"id": 1}}, answer("Alice.")),
        CHAT,
        "wrong in silence: gone",
    ),
    "thinking in every turn, Qwen3's template": (
        turns(user("1 + 1?"), THOUGHT, user("2 + 2?"), answer("4")) | {"qwen.jinja": THINKING.encode()},
        [*CHAT, "--chat_template", "qwen.jinja"],
        "refused, without a way out",
    ),
    "CSV with semicolons": (
        {"rows.csv": '\ufeffinstruction;input;output\r\nAdd;;"1,50 €; yes"\r\n'.encode()},
        PLAIN,
        "refused: cells that are more than the columns",
    ),
    "a folder with splits and hidden files": (
        {
            "set/train.jsonl": b'{"prompt": "a", "completion": " b"}',
            "set/test.jsonl": b'{"prompt": "c", "completion": " d"}',
            "set/._train.jsonl": b"\x00\x05\x16\x07",
            "set/dataset_infos.json": b'{"default": {}}',
        },
        PLAIN,
        "refused; without the hidden file the test rows would have been trained on",
    ),
    "Hermes: tools in the system turn and in a column": (
        turns(
            user(f"Tools: {json.dumps(TOOL)}", "system"), user("Pay."), answer("How much?"), tools=json.dumps([TOOL])
        ),
        CHAT,
        "refused: the template leaves tools out",
    ),
    "UltraFeedback: a text and a list of turns": (
        rows({"prompt": "Hello?", "chosen": [user("Hello?"), answer("Hello.")]}),
        [*PLAIN, "--column_mapping", "chosen=completion"],
        "refused: columns that are missing, of which none was",
    ),
    "true, 1.10, 1e5, null as text, a line separator": (
        rows({"prompt": "a", "completion": True}, {"prompt": "a", "completion": "null \u2028 1.10"}),
        PLAIN,
        "right",
    ),
    "weight 0 of the only answer": (
        turns(user("a"), answer("b", weight=0)),
        CHAT,
        "dropped, as if it was too long",
    ),
}


def outcome(folder: Path, files: dict[str, bytes], flags: list[str]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    first = next(iter(files))
    source = folder / (first.split("/")[0] if "/" in first else first)
    flags = [str(folder / flag) if (folder / flag).is_file() else flag for flag in flags]
    argv = ["--model_name_or_path", str(MODEL), "--train_file", str(source), "--show_rows", "1", "--report_to", "none"]
    try:
        args, _, _ = parse_training_arguments([*argv, *flags], "")
        text = shown_rows(args, prepare_data(args))
    except UsageError as error:
        text = f"refused: {error}"
    return text.replace(f"{folder}/", "").replace(str(folder), "").replace("\n", "\\n").replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for i, (name, (files, flags, then)) in enumerate(INPUTS.items()):
            (Path(folder) / str(i)).mkdir()
            table.append([name, then, outcome(Path(folder) / str(i), files, flags)])
            print(*table[-1], sep="\n  ", flush=True)
    if args.output:
        head = suites.heading("Rows that a reader thought of", "Made by tests/support/row_inputs.py.")
        args.output.write_text("\n".join([*head, *suites.markdown_table(["input", "then", "now"], table)]) + "\n")


if __name__ == "__main__":
    main()
