"""What is learnt of a conversation under trl's chat templates and SmolLM2's, turn by turn.

    python tests/support/chat_templates.py [NAME ...] [--output FILE]

Each template renders five conversations with SmolLM2's tokenizer, to which the template's special tokens are added.
The learnt tokens, decoded turn by turn, must be the assistant's turn and a stop token, exactly; a turn may begin with
what the template writes between its header and the content (an empty block of reasoning, a channel). Exit code 1: one
is not.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ist.loss import IGNORE
from ist.training.command_line import UsageError
from ist.training.encoding import Encoder
from support import suites

FOLDER = Path(trl.__file__).parent / "chat_templates"
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
OUTCOMES = ("exact", "no stop token", "refused", "another text")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str | None, **others) -> dict:
    return {"role": "assistant", "content": text, **others}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Look up the weather.", "parameters": PARAMETERS}
RESULT = {"role": "tool", "name": "get_weather", "content": "sunny", "tool_call_id": "1"}
# conversation -> (row, what each assistant turn holds, in its order)
CONVERSATIONS = {
    "one turn": ({"messages": [user("1 + 1?"), answer("a")]}, [["a"]]),
    "several": (
        {"messages": [user("1 + 1?"), answer("2"), user("And 2 + 2?"), answer("It is 4.")]},
        [["2"], ["It is 4."]],
    ),
    "system": ({"messages": [{"role": "system", "content": "Be brief."}, user("1 + 1?"), answer("2")]}, [["2"]]),
    "think": ({"messages": [user("1 + 1?"), answer("<think>\none and one\n</think>\n\n2")]}, [["one and one", "2"]]),
    "tools": (
        {
            "messages": [user("Weather?"), answer(None, tool_calls=[CALL]), RESULT, answer("It is sunny.")],
            "tools": [{"type": "function", "function": TOOL}],
        },
        [["get_weather", "city", "Paris"], ["It is sunny."]],
    ),
}
# The tokens that end a turn, by template; from the models' own configurations (eos_token_id of generation).
STOPS = {
    **{"cohere2": ["<|END_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"], "cohere": ["<|END_OF_TURN_TOKEN|>"]},
    **{"deepseek": ["<｜end▁of▁sentence｜>"], "gemma4": ["<turn|>", "<tool_call|>"]},
    **{"diffusion_gemma": ["<turn|>", "<tool_call|>"], "gemma": ["<end_of_turn>"], "phi3": ["<|end|>"]},
    **{"glm4moe": ["<|user|>", "<|observation|>"], "gptoss": ["<|return|>", "<|end|>", "<|call|>"]},
    **{"idefics3": ["<end_of_utterance>"], "smolvlm": ["<end_of_utterance>"], "llama3": ["<|eot_id|>"]},
    **{"llava_next": ["</s>"], "muse_glimmer": ["<|eot|>"]},
}
CHATML = ["<|im_end|>"]
# What templates write around the texts of a turn: blocks of reasoning, channels, calls.
AROUND = re.compile(
    r"(<think>|</think>|<\|channel>thought|<channel\|>|<\|channel\|>(final|analysis|commentary json)<\|message\|>"
    r"|<\|(end|eom)\|><\|start\|>assistant| to=(user|self|functions\.|get_weather|)|<\|message\|>"
    r'|<\|tool_call>call:|<\|"\|>|<tool_call>|</tool_call>|<tool_call\|>|<function=|</function>|<parameter=|</parameter>'
    r"|<arg_key>|</arg_key>|<arg_value>|</arg_value>|<\|tool_call_start\|>|<\|tool_call_end\|>"
    r"|</?atem:(function_calls|invoke|parameter)|name=|\"name\":|\"arguments\":|\"parameters\":|[\s{}()\[\]\"':,>=])*"
)


def with_special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    tokenizer = deepcopy(tokenizer)
    found = re.findall(
        r"<[|｜][^<>\s]{1,40}?[|｜]>|<(?:start|end)_of_(?:turn|utterance)>|</?s>|<bos>|<eos>|<\|?[a-z_]+\|?>|\[/?INST\]",
        template,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(found))})
    tokenizer.chat_template = template
    return tokenizer


def is_exact(text: str, holds: list[str], stops: list[str]) -> tuple[bool, bool]:
    """(whether a learnt turn holds these texts in this order, and nothing else but what templates write around them;
    whether it ends in a stop token)."""
    stop = next((stop for stop in sorted(stops, key=len, reverse=True) if text.endswith(stop)), "")
    around = AROUND.pattern
    pattern = around + around.join(map(re.escape, holds)) + around
    return bool(re.fullmatch(pattern, text[: len(text) - len(stop)])), bool(stop)


def outcomes(name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """The result of each conversation under a template."""
    template = tokenizer.chat_template if name == "SmolLM2" else (FOLDER / f"{name}.jinja").read_text()
    tokenizer = with_special_tokens(tokenizer, template)
    known = [stops for start, stops in STOPS.items() if name.startswith(start)]
    encoder = Encoder("chat", tokenizer, 4096, completion_only_loss=True)
    for number, (conversation, (row, turns)) in enumerate(CONVERSATIONS.items()):
        result = {"topology": conversation, "kind": name, "number": number, "what": conversation}
        try:
            (encoded,) = encoder.encode([encoder.text(row)])
        except UsageError as error:
            yield result | {"outcome": "refused", "why": str(error)}
            continue
        learnt, turn = [], []
        for label in [*encoded["labels"], IGNORE]:
            if label != IGNORE:
                turn.append(label)
            elif turn:
                learnt.append(tokenizer.decode(turn))
                turn = []
        exact = [
            is_exact(text, holds, known[0] if known else CHATML) for text, holds in zip(learnt, turns, strict=False)
        ]
        if len(learnt) != len(turns) or not all(same for same, _ in exact):
            yield result | {"outcome": "another text", "fault": json.dumps(learnt, ensure_ascii=False)}
        else:
            stopped = all(ends for _, ends in exact)
            result["outcome"] = "exact" if stopped else "no stop token"
            # The run says so, too.
            yield result | ({} if stopped == encoded["stops"] else {"fault": f"stops: {encoded['stops']}"})


def names() -> list[str]:
    return ["SmolLM2", *sorted(file.stem for file in FOLDER.glob("*.jinja"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    results = [result for name in args.names or names() for result in outcomes(name, tokenizer)]
    for result in results:
        told = result.get("fault") or result.get("why") or ""
        print(f"{result['kind']}, {result['topology']}: {result['outcome']} {told}".rstrip(), flush=True)
    faults = sum("fault" in result for result in results)
    print(f"{len(results)} conversations, {faults} of them not learnt as they are")
    if args.output:
        write_table(args.output, results)
    return 1 if faults else 0


def write_table(file: Path, results: list[dict]) -> None:
    command = f"Made by tests/support/chat_templates.py with trl {trl.__version__}: template x conversation."
    lines = suites.heading("Chat templates", command)
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    cells = {(result["kind"], result["topology"]): result for result in results}
    reasons: list[str] = []

    def cell(kind: str, conversation: str) -> str:
        result = cells[kind, conversation]
        if "why" not in result:
            return result["outcome"]
        if result["why"] not in reasons:
            reasons.append(result["why"])
        return f"refused ({reasons.index(result['why']) + 1})"

    rows = [[kind, *(cell(kind, conversation) for conversation in CONVERSATIONS)] for kind in kinds]
    lines += [*suites.markdown_table(["template", *CONVERSATIONS], rows), ""]
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
