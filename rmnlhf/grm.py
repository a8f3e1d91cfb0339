"""The generative reward model's text: a pair → prompt, a completion → `Judgement`.

A completion is an optional think block, then `<critics>…</critics>`, then `<choice>[[A]]</choice>` or `<choice>[[B]]</choice>`
(paper, released code). Text of the data cannot forge any of these: see `neutralise`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .pairs import PreferencePair

SYSTEM = "You are a careful judge. You compare two responses to a conversation."
TASK = (
    "Which response is better? Give the decisive reasons between <critics> and </critics>, "
    "then your choice as <choice>[[A]]</choice> or <choice>[[B]]</choice>."
)
THINK = " Think first, between <think> and </think>; then keep the reasons within 4 lines and 1500 characters."  # the limits of `grm`
CUT = " […] "


@dataclass(frozen=True)
class Judgement:
    """What a completion says. `error` is None or a short reason; with an error the verdict is None."""

    critique: str | None
    verdict: str | None
    error: str | None


def build_prompt(pair: PreferencePair, swap: bool = False, think: bool = False) -> list[dict[str, str]]:
    """Chat messages that ask for a judgement of `pair`; `swap` shows its response_b first, as "Response A"."""
    return _messages([t["content"] for t in pair.context], pair, swap, think, pair.response_a, pair.response_b)


def _messages(turns, pair, swap, think, response_a, response_b):
    first, second = (response_b, response_a) if swap else (response_a, response_b)
    text = _body(turns, pair, first, second) + f"\n\n{TASK}" + (THINK if think else "")
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _body(turns, pair, first, second):
    talk = "\n\n".join(f"{neutralise(t['role'])}: {neutralise(text)}" for t, text in zip(pair.context, turns))
    return f"[Conversation]\n{talk}\n\n[Response A]\n{neutralise(first)}\n\n[Response B]\n{neutralise(second)}"


def body(pair: PreferencePair) -> str:
    """Conversation and both responses as text, neutralised: what any judge reads."""
    return _body([t["content"] for t in pair.context], pair, pair.response_a, pair.response_b)


def format_judgement(critique: str, verdict: str) -> str:
    """The completion that says `critique` and `verdict`: the cold start's target text."""
    return f"<critics>{neutralise(critique.strip())}</critics>\n<choice>[[{verdict}]]</choice>"


def encode_prompt(pair: PreferencePair, tokenizer, max_prompt: int, swap: bool = False, think: bool = False) -> list[int]:
    """Token ids of the chat prompt with the generation prefix, at most `max_prompt` long.

    Where the pair is too long its longest texts (turns, responses) are cut from the middle, with a marker, to one common
    length, so that instruction and format always survive. Raises ValueError where `max_prompt` cannot hold even these.
    A think block that the chat template opens (R1 distills) is left to the model to open: only then does the completion tell
    what was thought from what was said, wherever it is cut, and what the cold start teaches stands outside it."""

    def encode(turns, a, b):
        messages = _messages(turns, pair, swap, think, a, b)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        opened = next((n for n in range(1, 9) if re.fullmatch(r"\s*<think>\s*", tokenizer.decode(ids[-n:]))), 0)
        return ids[: len(ids) - opened]

    texts = [t["content"] for t in pair.context] + [pair.response_a, pair.response_b]
    ids = encode(texts[:-2], *texts[-2:])
    if len(ids) <= max_prompt:
        return ids
    pieces = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    low, high, best = 0, max(map(len, pieces)), None
    while low <= high:  # the largest common length that fits
        keep = (low + high) // 2
        cut = [_cut(t, p, keep, tokenizer) for t, p in zip(texts, pieces)]
        ids = encode(cut[:-2], *cut[-2:])
        if len(ids) <= max_prompt:
            best, low = ids, keep + 1
        else:
            high = keep - 1
    if best is None:
        raise ValueError(f"pair {pair.id!r}: the bare prompt has {len(ids)} tokens, policy.max_prompt is {max_prompt}: raise it")
    return best


def _cut(text, ids, keep, tokenizer):
    if len(ids) <= keep:
        return text
    head = (keep + 1) // 2
    return tokenizer.decode(ids[:head]) + CUT + (tokenizer.decode(ids[-(keep // 2) :]) if keep > 1 else "")


# Delimiters that no text of the data may form: this format's tags and verdicts, the headings and tags of this prompt and of the
# judges' (similarity, arguments), and the turn tokens of the common chat templates. Each match is the character that a backslash
# follows once neutralised.
_TAGS = r"/?(?:critics|critique|choice|think)\s*>"
_CHAT = r"\|[^|<>\n]{1,40}\|>|｜[^｜<>\n]{1,40}｜>|/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|SYS)>|/?INST\]"
_HEADINGS = r"(?:Response [AB]|Conversation|(?:(?:Generated|Reference) )?Critique)\]"
_FORGED = re.compile(rf"<(\\*)(?={_TAGS}|{_CHAT})|\[(\\*)(?=/?INST\]|\[\\*\s*(?:response\s*)?[AB]\s*\]|{_HEADINGS})", re.IGNORECASE | re.ASCII)


def neutralise(text: str) -> str:
    r"""Break every delimiter inside a text of the data with a backslash: `<choice>` → `<\choice>`. `restore` undoes it exactly."""
    return _FORGED.sub(lambda m: m[0] + "\\", text)


def restore(text: str) -> str:
    """The inverse of `neutralise`: restore(neutralise(x)) == x for every x."""
    return _FORGED.sub(lambda m: m[0].removesuffix("\\"), text)


_TAG = re.compile(r"<(/?)(critics|choice|think)>", re.IGNORECASE | re.ASCII)
_SIDE = r"\s*(?:(?:response|answer)\s*)?([AB])\s*"
_CHOICE = re.compile(rf"[\s*\"'`]*(?:\[\[{_SIDE}\]\]|\[{_SIDE}\]|\({_SIDE}\)|{_SIDE})[\s*\"'`.]*", re.IGNORECASE | re.ASCII)
_BARE = re.compile(r"\[\[\s*(?:response\s*)?[AB]\s*\]\]", re.IGNORECASE | re.ASCII)
_END = re.compile(r"(?:\s|<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|</s>|<｜end▁of▁sentence｜>)*\Z")
_SENTENCE = re.compile(r"[.!?;]+(?=\s|$)|\n+")  # not within "e.g." or "U.S."


def parse_judgement(text: str, max_lines: int = 4, max_chars: int = 1500, max_repeats: int = 2) -> Judgement:
    """Completion → critique and verdict, in linear time; never raises for a text.

    The verdict is the one choice block that follows the one critique block and ends the text. What stands in the think block
    (everything up to the last `</think>`) or in the critique can never be a verdict, nor what follows a `<think>` that is not
    closed: the prompt must not have opened it (see `encode_prompt`).
    Errors: over `max_lines` non-blank lines or `max_chars` characters of critique, or one sentence more than `max_repeats`
    times (paper, released code: reward −1), as well as anything cut, nested, doubled, hedged or missing."""
    if not isinstance(text, str) or not text.strip():
        return Judgement(None, None, "empty output")
    tags = [(m[1] + m[2].lower(), m.start(), m.end()) for m in _TAG.finditer(text)]
    names = [t[0] for t in tags]
    thought = max((i + 1 for i, n in enumerate(names) if n == "/think"), default=0)
    start = tags[thought - 1][2] if thought else 0
    tags, names = tags[thought:], names[thought:]
    if "think" in names:
        return Judgement(None, None, "think block not closed")
    if not names or "critics" not in names:
        return Judgement(None, None, "no critique block")
    if names.count("critics") > 1 or names.count("/critics") > 1:
        return Judgement(None, None, "more than one critique block")
    if "/critics" not in names:
        return Judgement(None, None, "critique block not closed")
    opened, closed = names.index("critics"), names.index("/critics")
    if opened != 0 or closed < opened:
        return Judgement(None, None, "a tag stands before the critique block")
    critique = restore(text[tags[opened][2] : tags[closed][1]].strip())
    after = names[closed + 1 :]
    error = None
    if after != ["choice", "/choice"]:
        error = (
            "no choice block" if not after else "choice block not closed" if after == ["choice"] else "not exactly one choice block"
        )
        return Judgement(critique or None, None, error)
    (_, choice_start, inner_start), (_, inner_end, choice_end) = tags[closed + 1 :]
    choice = _CHOICE.fullmatch(text[inner_start:inner_end]) if inner_end - inner_start <= 60 else None
    repeats = Counter(s for s in (" ".join(s.lower().split()) for s in _SENTENCE.split(critique)) if s)
    if not choice:
        error = "the choice is neither A nor B"
    elif _BARE.search(text, start, tags[opened][1]) or _BARE.search(text, tags[closed][2], choice_start):
        error = "a verdict outside the choice block"
    elif not _END.match(text, choice_end):
        error = "text after the choice"
    elif not critique:
        error = "empty critique"
    elif len(critique) > max_chars:
        error = f"critique over {max_chars} characters"
    elif sum(bool(line.strip()) for line in critique.splitlines()) > max_lines:
        error = f"critique over {max_lines} lines"
    elif max(repeats.values(), default=0) > max_repeats:
        error = f"a sentence more than {max_repeats} times"
    return Judgement(critique or None, None if error else choice[choice.lastindex].upper(), error)
