"""The generative reward model's text: a pair → prompt, a completion → `Judgement`.

A completion is an optional think block, then `<critics>…</critics>`, then `<choice>[[A]]</choice>` or `<choice>[[B]]</choice>`
(paper, released code). Text of the data cannot forge any of these: see `neutralise`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .pairs import PreferencePair

SYSTEM = "You are a careful judge. You compare two responses to a conversation."
TASK = (
    "Which response is better? Give the decisive reasons between <critics> and </critics>, "
    "then your choice as <choice>[[A]]</choice> or <choice>[[B]]</choice>."
)
THINK = " Think first, between <think> and </think>."
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
    talk = "\n\n".join(f"{t['role']}: {neutralise(text)}" for t, text in zip(pair.context, turns))
    body = f"[Conversation]\n{talk}\n\n[Response A]\n{neutralise(first)}\n\n[Response B]\n{neutralise(second)}\n\n{TASK}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": body + (THINK if think else "")}]


def format_judgement(critique: str, verdict: str) -> str:
    """The completion that says `critique` and `verdict`: the cold start's target text."""
    return f"<critics>{neutralise(critique.strip())}</critics>\n<choice>[[{verdict}]]</choice>"


def encode_prompt(pair: PreferencePair, tokenizer, max_prompt: int, swap: bool = False, think: bool = False) -> list[int]:
    """Token ids of the chat prompt with the generation prefix, at most `max_prompt` long.

    Where the pair is too long its longest texts (turns, responses) are cut from the middle, with a marker, to one common
    length, so that instruction and format always survive. Raises ValueError where `max_prompt` cannot hold even these."""

    def encode(turns, a, b):
        messages = _messages(turns, pair, swap, think, a, b)
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

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


def neutralise(text: str) -> str:
    return text


def parse_judgement(text: str, max_lines: int = 4, max_chars: int = 1500) -> Judgement:
    """First form; hardened next."""
    m = re.fullmatch(r"\s*<critics>(.*?)</critics>\s*<choice>\s*\[\[([AB])\]\]\s*</choice>\s*", text.split("</think>")[-1], re.S)
    if not m:
        return Judgement(None, None, "format")
    return Judgement(m[1].strip(), m[2], None)
