"""The turns that a row of `read_rows` holds, as chat templates of transformers take them."""

import json
from typing import Any

from ist.training.command_line import UsageError

# Names of roles in ShareGPT, OpenAssistant and logs of models, in lower case. Others reach the template as they are.
ROLES = {
    **{"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"},
    **{"bard": "assistant", "claude": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"},
    **{"function": "tool", "observation": "tool", "function_call": "assistant"},
    **{role: role for role in ("user", "assistant", "system", "tool", "developer")},
}


def conversation(row: dict[str, Any]) -> tuple[list[dict], list | None, list[bool]]:
    """A row of any form as (turns, tools, which turns are to be learnt).

    Raises:
        UsageError: it holds no conversation, or no answer.
    """
    tools = as_list(row["tools"]) if row.get("tools") else None
    given = {column: turns_in(row, column) for column in ("prompt", "completion")}
    if row.get("history") and (row.get("messages") or any(given.values())):
        raise UsageError("holds turns and history: leave one out")
    if row.get("messages"):
        turns = _turns(row["messages"], "messages")
        learn = [turn["role"] == "assistant" and _weight(turn) for turn in turns]
    elif any(given.values()):
        if not all(given.values()):
            raise UsageError("must hold prompt and completion both as turns, or both as text")
        prompt, completion = (_turns(value, column) for column, value in given.items() if value)
        turns = prompt + completion
        learn = [i >= len(prompt) and turn["role"] == "assistant" and _weight(turn) for i, turn in enumerate(turns)]
    else:
        question, answer = question_and_answer(row)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        learn = [False, True]
        if row.get("history"):
            pairs = as_list(row["history"])
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                raise UsageError("must hold history as pairs of texts")
            earlier = [{"role": ("user", "assistant")[j], "content": str(pair[j])} for pair in pairs for j in (0, 1)]
            turns, learn = earlier + turns, [turn["role"] == "assistant" for turn in earlier] + learn
    if row.get("system"):
        if turns[0]["role"] == "system":
            raise UsageError("holds a system column and a system turn: leave one out")
        turns, learn = [{"role": "system", "content": row["system"]}, *turns], [False, *learn]
    if not any(turn["role"] == "assistant" and _says(turn) for turn in turns):
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise UsageError(f"has no answer: no assistant turn with content (roles: {roles})")
    return turns, tools, learn


def question_and_answer(row: dict[str, Any], may_be_empty: bool = False) -> tuple[str, str]:
    """The user's text and the assistant's, of an instruction row or one of prompt and completion.

    Raises:
        UsageError: there is no answer; or no question, unless it `may_be_empty`.
    """
    if row.get("instruction") is not None or row.get("output") is not None:
        question, answer, column = row.get("instruction") or "", row.get("output") or "", "output"
        if row.get("input"):
            question = f"{question}\n\n{row['input']}"
    elif row.get("prompt") is not None:
        question, answer, column = row["prompt"], row.get("completion") or "", "completion"
    else:
        raise UsageError("holds neither a conversation nor an instruction with its output")
    for name, value in ((column, answer), ("instruction", question)):
        if not isinstance(value, str):
            raise UsageError(f"has {json.dumps(value, default=str)[:40]} in {name}, where text is wanted")
    if not answer.strip():
        raise UsageError(f"has no answer: {column} is empty")
    if not question.strip() and not may_be_empty:
        raise UsageError("has no instruction")
    return question, answer


def as_list(value: str | list) -> list:
    """A list of a row; `read_rows` has it as JSON."""
    if isinstance(value, list):
        return value
    parsed: list = json.loads(value)
    return parsed


def turns_in(row: dict[str, Any], column: str) -> str | list | None:
    """The turns of prompt or completion, where it holds no text; `read_rows` has them in a column of their own."""
    value = row.get(f"{column}_turns") or row.get(column)
    return value if isinstance(value, list) or row.get(f"{column}_turns") else None


def _says(turn: dict) -> bool:
    content = turn.get("content")
    if isinstance(content, list):
        return any(part["text"].strip() for part in content)
    return bool((content or "").strip() or turn.get("tool_calls"))


def _weight(turn: dict) -> bool:
    """Whether a turn is to be learnt, by its own `weight` or `train`, which are taken out."""
    weight = turn.pop("weight", None)
    train = turn.pop("train", None)
    if weight not in (None, 0, 1):
        raise UsageError(f"has a turn of weight {weight}: 0 and 1 are served")
    if train not in (None, True, False):
        raise UsageError(f"has a turn with train {train}: true and false are served")
    return bool(1 if weight is None else weight) and train is not False


def _turns(text: str | list, column: str) -> list[dict]:
    """The turns of a column: roles and contents as transformers names them, text parts in their order."""
    turns = []
    for i, raw in enumerate(as_list(text)):
        turn = dict(raw) if isinstance(raw, dict) else {}
        if "from" in turn and "role" not in turn:
            turn["role"] = turn.pop("from")
            turn["content"] = turn.pop("value", None)
        role = turn.get("role")
        turn["role"] = ROLES.get(role.lower(), role) if isinstance(role, str) else None
        if call := turn.pop("function_call", None):  # OpenAI's older form
            turn["tool_calls"] = [call]
        if turn.get("content") is None and isinstance(turn.get("refusal"), str):
            turn["content"] = turn.pop("refusal")
        content = turn.get("content")
        if content is None and isinstance(turn.get("tool_calls"), list) and turn["tool_calls"]:
            turn["content"] = ""
        elif isinstance(content, list):
            turn["content"] = _parts(content, i)
        elif not isinstance(content, str):
            turn["role"] = None
        if not turn["role"]:
            raise UsageError(
                f'must hold {column} as a list of {{"role": text, "content": text}}, or with tool_calls; turn {i} is '
                f"{_shortened(raw)}"
            )
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_call(call, i) for call in turn["tool_calls"]]
        turns.append({key: value for key, value in turn.items() if value is not None})
    if not turns:
        raise UsageError(f"has no turns in {column}")
    return turns


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parts(parts: list, i: int) -> list[dict]:
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UsageError(f"has a part of type {kind} in turn {i}: parts of type text are served")
    return [{"type": "text", "text": part["text"]} for part in parts]


def _call(call: Any, i: int) -> dict:
    """A tool call with its arguments as an object, which most templates want."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"has a tool call without a name in turn {i}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise UsageError(f"has a tool call whose arguments are not JSON in turn {i}") from None
    kept = {key: value for key, value in call.items() if key in ("id", "type")}
    return {"type": "function", **kept, "function": {"name": function["name"], "arguments": arguments}}
