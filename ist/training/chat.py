"""Conversations through a chat template: nothing that it leaves out, and which of its text an assistant turn adds.

A conversation is rendered twice, the second time with a mark before and after each text of it. Without the marks both
must be the same text; then the marks say where in it each content, reasoning and tool call stands, and one that is gone
stands nowhere.
"""

import json
import re
from copy import deepcopy
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ist.training.command_line import UsageError, brief
from ist.training.conversation import ROLES

REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates call it
_THINK = re.compile(r"(</?think(?:ing)?>)")
_OPENED = re.compile(r"<think(ing)?>\s*(</think(ing)?>\s*)?$")  # reasoning that a prompt opens, or leaves out
_ANSWER_WITH_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: all of it.
        learnt: [start, end) in the text of what each assistant turn adds, from after its header to its stop token; of
            turns that are to be learnt.
        stops: whether each of these ends in a stop token.
    """

    text: str
    learnt: list[tuple[int, int]]
    stops: bool


class _Span(NamedTuple):
    """A text of a conversation, and where it stands."""

    turn: int  # -1: tools
    what: str
    start: int
    end: int


class _Turn(NamedTuple):
    """What an assistant turn adds: [start, end), after its header. A generation prompt may open the reasoning after the
    header: that is not learnt then, and `start` comes after it."""

    header_end: int
    start: int
    end: int
    stops: bool


class ChatTemplate:
    """A tokenizer's chat template, and what marked conversations tell of it.

    Attributes:
        stops: the tokens that end an assistant turn; empty where it ends a turn with none.

    Raises:
        UsageError: it shows no user's text at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._special_tokens = dict(tokenizer.special_tokens_map)
        # Some tokenizers have one of its own for conversations with tools.
        self._template, self._tool_template = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
        self._generation = bool(_GENERATION.search(self._template))
        self._specials = sorted(
            (token for token in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} if token), key=len
        )
        self._parts, self._plain_arguments, self._split_reasoning = False, False, False
        self._reasoning = ""
        user, answer = {"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Say"}
        if not self._shows([user]):
            self._parts = True
            try:
                self._marked([user])
            except UsageError as error:
                raise UsageError(
                    f"--prompt_template chat: the chat template shows no text of a user: {error}."
                ) from error
        self._reasoning = next((key for key in REASONING if self._shows([user, {**answer, key: "Think"}])), "")
        if self._reasoning:  # which it may not find in a content: it writes a second block of it then
            inside = {"role": "assistant", "content": "<think>\nThink\n</think>\n\nSay"}
            texts = [self._text([user, turn]) for turn in ({**answer, self._reasoning: "Think"}, inside)]
            self._split_reasoning = texts[1].count("<think>") > texts[0].count("<think>")
        self._prompt = self._generation_prompt([user])
        self._header = _OPENED.sub("", self._prompt)
        self.stops = self._find_stops([user, answer])

    def render(self, turns: list[dict], tools: list | None, learn: list[bool] | None = None) -> Rendered:
        """
        Args:
            learn: which turns are to be learnt; None where no mask is asked for.

        Raises:
            UsageError: the template refuses the turns, leaves a text of them out, or does not say where a turn is.
        """
        self._require_known_roles(turns)
        text, spans = self._marked(turns, tools, by_place=learn is not None)
        if learn is None:
            return Rendered(text, [], True)
        there = {span.turn for span in spans}
        own = [self._turn(turns, tools, text, spans, i) for i, wanted in enumerate(learn) if wanted and i in there]
        learnt = [(turn.start, turn.end) for turn in own]
        if self._generation:
            learnt = self._generated(turns, tools, text, own) or learnt
        return Rendered(text, learnt, all(turn.stops for turn in own))

    def prompt(self, turns: list[dict], tools: list | None = None) -> str:
        """The text before the next answer of the assistant, for generation."""
        self._marked(turns, tools)  # nothing is left out
        return self._text(turns, tools, add_generation_prompt=True)

    def _require_known_roles(self, turns: list[dict]) -> None:
        """A role that a template does not name is written into the text as it is, and its answers are not learnt."""
        for i, turn in enumerate(turns):
            role = turn["role"]
            if role not in ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", self._template):
                raise UsageError(
                    f"has the role {role} in turn {i}, which the chat template does not name: rename it to user, "
                    "assistant, system or tool"
                )

    # ---- rendering

    def _text(self, turns: list[dict], tools: list | None = None, **options: Any) -> str:
        return self._jinja([turns], tools, **options)[0][0]

    def _jinja(
        self, conversations: list[list[dict]], tools: list | None = None, **options: Any
    ) -> tuple[list[str], list]:
        """(the text of each conversation, what the template's own marks say is generated in each)."""
        try:
            return render_jinja_template(
                conversations=[self._prepared(turns) for turns in conversations],
                tools=tools,
                chat_template=self._tool_template if tools else self._template,
                **self._special_tokens,
                **options,
            )
        except Exception as error:  # templates raise what they like: no system turn, turns that do not alternate
            called = any(turn.get("tool_calls") for turns in conversations for turn in turns)
            if called and not self._plain_arguments:  # A few templates want the arguments of a call as text.
                self._plain_arguments = True
                try:
                    return self._jinja(conversations, tools, **options)
                except UsageError:
                    self._plain_arguments = False
            raise UsageError(f"does not suit the model's chat template: {brief(error)}") from error

    def _prepared(self, turns: list[dict]) -> list[dict]:
        """The turns in the form that this template reads: contents in parts or not, reasoning, arguments."""
        prepared = []
        for turn in turns:
            turn = dict(turn)
            content = turn.get("content")
            if self._parts and isinstance(content, str):
                turn["content"] = [{"type": "text", "text": content}]
            elif not self._parts and isinstance(content, list):
                turn["content"] = "".join(part["text"] for part in content)
            for key in REASONING:
                if self._reasoning not in ("", key) and isinstance(turn.get(key), str):
                    turn[self._reasoning] = turn.pop(key)
            if self._split_reasoning and turn["role"] == "assistant" and self._reasoning not in turn:
                found = _ANSWER_WITH_REASONING.fullmatch(str(turn.get("content")))
                if found:
                    turn[self._reasoning], turn["content"] = found[1].strip(), found[2].strip()
            if turn.get("tool_calls") and self._plain_arguments:
                turn["tool_calls"] = deepcopy(turn["tool_calls"])
                for call in turn["tool_calls"]:
                    if not isinstance(call["function"]["arguments"], str):
                        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            prepared.append(turn)
        return prepared

    # ---- marks

    def _marked(self, turns: list[dict], tools: list | None = None, by_place: bool = True) -> tuple[str, list[_Span]]:
        """(the text of a conversation, where in it each of its texts stands).

        Args:
            by_place: else it is enough that each of its texts occurs somewhere.

        Raises:
            UsageError: one stands nowhere, or the template shows marked texts in another way.
        """
        there, n = json.dumps([turns, tools], ensure_ascii=False), 0
        while (mark := f"Zq{n}x") in there:  # letters and digits alone: no filter of a template changes them
            n += 1
        marked, marked_tools, names = _with_marks(turns, tools, mark)
        if tools:
            text, with_marks = self._text(turns, tools), self._text(marked, marked_tools)
        else:  # one call for both is faster
            text, with_marks = self._jinja([turns, marked])[0]
        pattern = re.compile(rf"{mark}(\d+)([oc])")
        places: dict[tuple[int, str], int] = {}
        stripped, last = "", 0
        for match in pattern.finditer(with_marks):
            stripped += with_marks[last : match.start()]
            places.setdefault((int(match[1]), match[2]), len(stripped))
            last = match.end()
        stripped += with_marks[last:]
        exact = stripped == text
        for n, (turn, what, content) in enumerate(names):
            shown = (n, "o") in places and (n, "c") in places
            if turn < 0 or (not by_place and not exact):
                # Tools may be written in the system's turn. A text may decide how the template shows it.
                shown = shown or content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
            if not shown:
                where = "tools" if turn < 0 else f"turn {turn} ({turns[turn]['role']})"
                raise UsageError(
                    f"holds what the model's chat template leaves out: {what} of {where}{_remedy(turn, turns)}"
                )
        if not exact and by_place:
            raise UsageError("cannot be split into turns: the chat template shows a text by what it holds")
        spans = [
            _Span(turn, what, places[n, "o"], places[n, "c"])
            for n, (turn, what, _) in enumerate(names)
            if exact and (n, "o") in places and (n, "c") in places
        ]
        return text, spans

    def _shows(self, turns: list[dict]) -> bool:
        try:
            self._marked(turns)
        except UsageError:
            return False
        return True

    # ---- what an assistant turn adds

    def _generation_prompt(self, turns: list[dict]) -> str:
        """What the template puts before an answer that is to come."""
        without, with_prompt = self._text(turns), self._text(turns, add_generation_prompt=True)
        if with_prompt.startswith(without):
            return with_prompt[len(without) :]
        shared = next((i for i, (a, b) in enumerate(zip(without, with_prompt, strict=False)) if a != b), 0)
        opening = max((with_prompt.rfind(token, 0, shared + len(token)) for token in self._specials), default=-1)
        return with_prompt[opening if opening >= 0 and opening + 40 > shared else shared :]

    def _find_stops(self, turns: list[dict]) -> set[str]:
        """The token that ends an answer, at the end of a conversation and before a further turn of the user."""
        stops = set()
        for more in ([], turns):
            try:
                text, spans = self._marked(turns + more)
            except UsageError:  # a template for one question alone
                continue
            answer = next(span for span in spans if span.turn == 1)
            following = [span for span in spans if span.turn == 2]
            after = text[answer.end : following[0].start if following else None]
            found = self._special_at(after.lstrip())
            if not found:
                continue
            before = text[: next(span for span in spans if span.turn == 0).start]
            rest = after.replace(found, "", 1)
            # One special token alone before the next user turn, and before the first one: the header of a user.
            if following and found in before and not any(token in rest for token in self._specials):
                continue
            stops.add(found)
        return stops

    def _special_at(self, text: str) -> str | None:
        """The special token that a text begins with, the longest."""
        return next((token for token in reversed(self._specials) if text.startswith(token)), None)

    def _ending(self, turns: list[dict], tools: list | None) -> str:
        """What the template writes after the last text of a conversation."""
        text, spans = self._marked(turns, tools)
        return text[max((span.end for span in spans), default=0) :]

    def _turn(self, turns: list[dict], tools: list | None, text: str, spans: list[_Span], i: int) -> _Turn:
        own = [span for span in spans if span.turn == i]
        first, last = min(span.start for span in own), max(span.end for span in own)
        before = max((span.end for span in spans if span.turn != i and span.end <= first), default=0)
        after = min((span.start for span in spans if span.turn != i and span.start >= last), default=len(text))
        gap, rest = text[before:first], text[last:after]
        header = gap.rfind(self._header) if self._header else -1
        header_end = before + (header + len(self._header) if header >= 0 else 0)
        after_header = _after(gap, [self._prompt, self._header, self._prompt.rstrip(), self._header.rstrip()])
        if after_header is None and any(span.what.startswith("tool call") for span in own):
            # The template writes no header, but opens the call: all that follows what ends the turn before.
            start = before + (_shared(gap, self._ending(turns[:i], tools)) if i else 0)
        else:
            start = before + (_after_opening(gap) if after_header is None else after_header)
        places = [(rest.find(stop), stop) for stop in self.stops if stop in rest]
        if not places and any(span.what.startswith("tool call") for span in own):
            closed = min((rest.find(bracket) for bracket in "}])" if bracket in rest), default=0)
            found = [rest.find(token, closed) for token in self._specials if token in rest[closed:]]
            if not found:
                raise UsageError(f"cannot be split into turns: nothing ends the tool call of turn {i}")
            places = [(min(found), self._special_at(rest[min(found) :]) or "")]
        if not places:
            return _Turn(header_end, start, last, False)
        place, stop = min(places)
        return _Turn(header_end, start, last + place + len(stop), True)

    def _generated(
        self, turns: list[dict], tools: list | None, text: str, own: list[_Turn]
    ) -> list[tuple[int, int]] | None:
        """What the template's own marks say is generated, of the turns that are to be learnt; without their headers."""
        (own_text,), (spans,) = self._jinja([turns], tools, return_assistant_tokens_mask=True)
        if own_text != text:
            return None
        chosen = []
        for start, end in spans:
            touched = [turn for turn in own if turn.start < end and start < turn.end]
            if not touched:
                continue
            stop = self._special_at(text[end:].lstrip())
            if any(text[start:end].rstrip().endswith(token) for token in self.stops):
                end = start + len(text[start:end].rstrip())
            elif stop in self.stops:
                end = text.index(stop, end) + len(stop)
            chosen.append((max(start, touched[0].header_end), end))
        # A turn that the template has no mark around (a tool call, in some) adds what it adds.
        unmarked = [turn for turn in own if not any(turn.start < end and start < turn.end for start, end in spans)]
        return sorted([*chosen, *((turn.start, turn.end) for turn in unmarked)])


def _remedy(turn: int, turns: list[dict]) -> str:
    if turn < 0:
        return "; --column_mapping tools= leaves the column out"
    if turns[turn]["role"] == "assistant":
        return "; a template made for training (--chat_template) may show it"
    return ""


def _after(gap: str, headers: list[str]) -> int | None:
    """Where the answer begins in the text between the turn before and the first text of an answer; None: no header."""
    for header in headers:
        if header and (place := gap.rfind(header)) >= 0:
            return place + len(header)
    return None


def _after_opening(gap: str) -> int:
    opened = re.search(r"<think(ing)?>\s*$", gap)
    return opened.start() if opened else len(gap)


def _shared(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _with_marks(
    turns: list[dict], tools: list | None, mark: str
) -> tuple[list[dict], list | None, list[tuple[int, str, str]]]:
    """(turns, tools, [(turn, what, text)] of each mark's number): every text between two marks, white space outside.

    The marks of text n are `mark`, n and o (it opens) or c (it closes).
    """
    names: list[tuple[int, str, str]] = []

    def around(text: str, turn: int, what: str) -> str:
        if not text.strip():
            return text
        core = text.strip()
        lead = text[: text.index(core)]
        n = len(names)
        names.append((turn, what, core))
        return f"{lead}{mark}{n}o{core}{mark}{n}c{text[len(lead) + len(core) :]}"

    def content(text: str, turn: int) -> str:
        pieces = _THINK.split(text)
        if len(pieces) == 1:
            return around(text, turn, _quoted(text))
        return "".join(piece if _THINK.fullmatch(piece) else around(piece, turn, _quoted(piece)) for piece in pieces)

    def leaves(value: Any, turn: int, what: str) -> Any:
        if isinstance(value, str):
            return around(value, turn, what)
        if isinstance(value, dict):
            return {key: leaves(one, turn, what) for key, one in value.items()}
        return [leaves(one, turn, what) for one in value] if isinstance(value, list) else value

    marked = []
    for i, turn in enumerate(turns):
        turn = dict(turn)
        for key in REASONING:
            if isinstance(turn.get(key), str):
                turn[key] = around(turn[key], i, f"{key} {_quoted(turn[key])}")
        if isinstance(turn.get("content"), list):
            turn["content"] = [{**part, "text": content(part["text"], i)} for part in turn["content"]]
        elif turn.get("content"):
            turn["content"] = content(turn["content"], i)
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_marked_call(call, i, around, leaves) for call in turn["tool_calls"]]
        marked.append(turn)
    marked_tools = None if tools is None else deepcopy(tools)
    for tool in marked_tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                function[key] = around(function[key], -1, f"the {key} {_quoted(function[key])}")
    return marked, marked_tools, names


def _marked_call(call: dict, i: int, around: Any, leaves: Any) -> dict:
    function = call["function"]
    what = f"tool call {function['name']}"
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.dumps(leaves(json.loads(arguments), i, what), ensure_ascii=False)
    else:
        arguments = leaves(arguments, i, what)
    return {**call, "function": {"name": around(function["name"], i, what), "arguments": arguments}}


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 40 else text[:37] + "...", ensure_ascii=False)
