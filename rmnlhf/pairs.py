"""Preference pairs and human critiques: the rows that everything else reads.

A row is one conversation with two responses, a gold preference and any number of human critiques. Rows come in and go
out as JSON Lines; a row that cannot be used is refused with a reason and counted, so that kept + refused = read.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)
Label = Literal["A", "B"]
OTHER = {"A": "B", "B": "A"}
# "Response A", "Responses A and B", "Response A or B": the letter after a joining word is a side too
_SIDE = re.compile(r"\b([Rr]esponses?\s+)(A|B)\b(?:(\s*(?:and|or|nor|vs\.?|versus|than|,|/|&)\s*)(A|B)\b)?")


@dataclass(frozen=True)
class HumanCritique:
    """One annotator's free-text reason. `label`: the response that this annotator preferred ("A", "B") or None (tie, unknown).

    `text` names the responses "Response A" and "Response B", in the order of its pair."""

    annotator: str
    label: Label | None
    text: str

    def swapped(self) -> HumanCritique:
        return HumanCritique(self.annotator, OTHER.get(self.label), swap_sides(self.text))


@dataclass(frozen=True)
class PreferencePair:
    """One conversation with two responses and a gold preference.

    context: list of {"role": "system" | "user" | "assistant", "content": str}, the last turn being the user's
    label: "A" | "B", the response that people prefer; ties are no pairs
    group: rows of one group (debate, question) never stand on both sides of a split
    critiques: human critiques, those that contradict the label included (`HumanCritique.label` tells)
    meta: what a source adds (flaw, reason codes, domain, ...)
    """

    id: str
    source: str
    group: str
    context: list[dict[str, str]]
    response_a: str
    response_b: str
    label: Label
    critiques: list[HumanCritique] = field(default_factory=list)
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        if reason := refusal(self):
            raise ValueError(f"pair {self.id!r}: {reason}")

    @property
    def agreeing(self) -> list[HumanCritique]:
        """The critiques of annotators who chose the gold label: what the process reward compares with."""
        return [c for c in self.critiques if c.label == self.label and c.text.strip()]

    @property
    def longer(self) -> Label | None:
        """The side with more characters; None where both have as many."""
        a, b = len(self.response_a), len(self.response_b)
        return None if a == b else "A" if a > b else "B"

    def swapped(self) -> PreferencePair:
        """The same pair shown in the other order, labels and critiques included."""
        return PreferencePair(
            self.id, self.source, self.group, self.context, self.response_b, self.response_a, OTHER[self.label],
            [c.swapped() for c in self.critiques], _swap_meta(self.meta),
        )  # fmt: skip

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict) -> PreferencePair:
        """Raises ValueError, with the field's name, for anything that is not a pair."""
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, found {type(row).__name__}")
        if unknown := set(row) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}; put extra columns under 'meta'")
        if missing := [n for n in ("id", "context", "response_a", "response_b", "label") if n not in row]:
            raise ValueError(f"missing field {missing[0]!r}")
        if isinstance(row["id"], (dict, list, bool)) or row["id"] in (None, ""):
            raise ValueError(f"id is {row['id']!r}, expected a text or a number")
        if not isinstance(row.get("meta") or {}, dict):
            raise ValueError(f"meta is {type(row['meta']).__name__}, expected an object")
        group = row["id"] if row.get("group") in (None, "") else row["group"]
        critiques = []
        if not isinstance(row.get("critiques") or [], list):
            raise ValueError(f"critiques is {type(row['critiques']).__name__}, expected a list")
        for i, c in enumerate(row.get("critiques") or []):
            if isinstance(c, str):
                c = {"text": c}
            if not isinstance(c, dict) or not isinstance(c.get("text"), str):
                raise ValueError(f"critiques[{i}]: expected a text or {{annotator, label, text}}")
            if c.get("label") not in (None, "A", "B"):
                raise ValueError(f"critiques[{i}].label is {c['label']!r}, allowed: 'A', 'B', null")
            critiques.append(HumanCritique(str(c.get("annotator", i)), c.get("label", row["label"]), c["text"]))
        return cls(
            str(row["id"]), str(row.get("source") or "own"), str(group), row["context"],
            row["response_a"], row["response_b"], row["label"], critiques, row.get("meta") or {},
        )  # fmt: skip


def swap_sides(text: str) -> str:
    """Exchange "Response A" and "Response B" in a text."""
    return _SIDE.sub(lambda m: m[1] + OTHER[m[2]] + (m[3] + OTHER[m[4]] if m[4] else ""), text)


def _swap_meta(value):
    """Entries of `meta` that name a side ({text, side, polarity}) turn with their pair."""
    if isinstance(value, list):
        return [_swap_meta(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.get("side") not in ("A", "B"):
        return {k: _swap_meta(v) for k, v in value.items()}
    text = {"text": swap_sides(value["text"])} if isinstance(value.get("text"), str) else {}
    return {**value, "side": OTHER[value["side"]], **text}


def fingerprint(*parts) -> int:
    """A 64-bit number that depends on the text of `parts` alone: what rows are ordered by, and which side they stand on."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def code(*names: str) -> str:
    """16 hex digits of what the modules rmnlhf/<name>.py say, comments and layout aside: beside what they made, it tells whether they changed."""
    folder = Path(__file__).parent
    return f"{fingerprint(*(ast.dump(ast.parse((folder / f'{n}.py').read_text(encoding='utf-8'))) for n in names)):016x}"


def settle(pair: PreferencePair) -> PreferencePair:
    """The pair in the order that its id's hash decides: sources lay a pair out as they find it, then settle it."""
    return pair.swapped() if fingerprint("order", pair.id) % 2 else pair


def refusal(pair: PreferencePair) -> str | None:
    """Why a pair cannot be used, or None."""
    if pair.label not in ("A", "B"):
        return f"label is {pair.label!r}, allowed: 'A', 'B' (ties are no pairs)"
    if not isinstance(pair.context, list):
        return f"context is {type(pair.context).__name__}, expected a list of {{role, content}}"
    if not pair.context:
        return "context is empty: it needs at least the user's turn"
    for i, turn in enumerate(pair.context):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            return f"context[{i}] is not {{role, content}}"
    for name in ("response_a", "response_b"):
        value = getattr(pair, name)
        if not isinstance(value, str):
            return f"{name} is {type(value).__name__}, expected a text"
        if not value.strip():
            return f"{name} is empty"
    if pair.response_a.strip() == pair.response_b.strip():
        return "both responses are the same"
    return None


@dataclass
class Read:
    """What a JSONL file held. len(pairs) + sum(refused.values()) == lines."""

    pairs: list[PreferencePair]
    lines: int
    refused: Counter
    examples: dict[str, str]  # reason -> "file:line: what was wrong"


def read_jsonl(path: str | Path) -> Read:
    """Read `PreferencePair` rows; blank lines do not count, every other line is kept or refused with a reason.

    Rules: not UTF-8, not JSON (a half-written last line too), missing or unknown fields, ties, empty or equal responses
    and a second row with an id already seen are refused. A critique whose annotator disagrees with the label is kept: it
    is no reference for the process reward. Raises FileNotFoundError where there is no file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected JSON Lines of PreferencePair rows (README, 'Your own data')")
    read, seen = Read([], 0, Counter(), {}), set()

    def refuse(kind: str, what: object):
        read.refused[kind] += 1
        read.examples.setdefault(kind, f"{path}:{number}: {what}")

    with path.open("rb") as f:
        for number, raw in enumerate(f, 1):
            if not raw.strip():
                continue
            read.lines += 1
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                json.dumps(row, ensure_ascii=False).encode()  # an escaped half of a character cannot be written again
            except UnicodeError as e:
                refuse("not UTF-8", e)
                continue
            except (ValueError, RecursionError) as e:  # RecursionError: nested too deep
                refuse("not JSON" if raw.endswith(b"\n") else "half-written last line", e)
                continue
            try:
                pair = PreferencePair.from_dict(row)
            except (ValueError, TypeError) as e:
                kind = next((k for k in _KINDS if k in str(e)), "malformed")
                refuse(_KINDS.get(kind, kind), e)
                continue
            if pair.id in seen:
                refuse("duplicate id", pair.id)
                continue
            seen.add(pair.id)
            read.pairs.append(pair)
    return read


_KINDS = {
    "missing field": "missing field", "unknown field": "unknown field", "ties are no pairs": "tie or unknown label",
    "is empty: it needs": "empty context", "is empty": "empty response", "are the same": "equal responses",
    "critiques": "malformed critique",
}  # fmt: skip


def write_jsonl(path: str | Path, rows: Iterable) -> Path:
    """Write pairs (or plain dicts) by rename: a killed run never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row if isinstance(row, dict) else row.to_dict(), ensure_ascii=False) + "\n")
    os.replace(part, path)
    return path


def read_rows(path: str | Path) -> Iterator[dict]:
    """Rows of a JSONL file, one at a time: the rollouts of a long run are gigabytes. No file: none. A line that is no JSON
    object (a half-written last one) is left out and said."""
    path, bad = Path(path), 0
    if not path.exists():
        return
    with path.open("rb") as f:
        for line in filter(bytes.strip, f):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                bad += 1
    if bad:
        log.warning("%s: %d unreadable line%s left out", path, bad, "s" * (bad > 1))


def append_rows(path: str | Path, rows: list[dict]):
    """Add rows to a JSONL file; after a half-written line they start on a new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
        f.flush()
        os.fsync(f.fileno())
