"""Controlled pairs: generated, seeded preference pairs whose flaw, severity and decisive arguments are known.

Ten task families. Pairs are crossed: each kind of response is right for one question and flawed for another, so that
nothing in a response alone (length, words, order) gives the label; it must be read against the question.
Three simulated annotators comment on each pair: `careful` (core points and a nitpick), `brief` (one core point) and
`hasty`, who errs on a quarter of the pairs: label flipped, with a text that fits it.

meta: family, flaw, severity ("minor" | "major" | "fatal"), core and nitpicks: lists of {text, side, polarity (+1 | -1)}.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import yaml

from rmnlhf.pairs import HumanCritique, PreferencePair, fingerprint, settle

PAIRS, SEED, ERR = 1200, 7, 0.25


@cache
def words() -> dict:
    return yaml.safe_load(Path(__file__).with_name("controlled.yaml").read_text(encoding="utf-8"))


# Each family returns (question, good response, flawed response, {x, right, wrong}, flaw).
def facts(r):
    kind = r.choice(words()["facts"])
    right, wrong = r.sample(list(kind["classes"]), 2)
    x = r.choice(kind["classes"][right])
    answers = [r.choice(kind["answers"]).format(x=x, c=c) for c in (right, wrong)]
    return r.choice(kind["questions"]).format(x=x), *answers, dict(x=x, right=right, wrong=wrong), "wrong fact"


def arithmetic(r):
    question, answer, kind = r.choice(words()["arithmetic"])
    a, b, c, x = r.randint(3, 12), r.randint(6, 30), r.randint(5, 17), r.choice(words()["things"])
    right = a * b + (c if kind == "mul_add" else -c)
    wrong = right + r.choice([-20, -10, -9, -2, -1, 1, 2, 9, 10, 20])
    texts = [answer.format(a=a, b=b, c=c, x=x, p=a * b, r=n) for n in (right, wrong)]
    return question.format(a=a, b=b, c=c, x=x), *texts, dict(x=x, right=f"{right} {x}", wrong=f"{wrong} {x}"), "wrong result"


def instructions(r):
    what = r.choice(list(words()["lists"]))
    n, m = r.sample([3, 4, 5, 6], 2)
    items = r.sample(words()["lists"][what], max(n, m) + 1)
    kind = r.choice(["number", "case", "order", "word"])
    if kind == "number":
        asked, other = (f"exactly {k} {what}" for k in (n, m))
        return f"List {asked} on one line.", ", ".join(items[:n]), ", ".join(items[:m]), dict(x=what, right=asked, wrong=other), "constraint missed"
    some = items[:n]
    if kind == "word":  # the text with `one` is right where it is asked for and flawed where it is forbidden
        one, swap = items[n], items[: n - 1]
        with_, without = (", ".join(r.sample(swap + [w], n)) for w in (one, items[n - 1]))
        modes = [(f"{one} in the list", f"Include {one} among {n} {what}.", with_), (f"a list without {one}", f"List {n} {what}, but not {one}.", without)]
    elif kind == "case":
        modes = [(f"{name} letters", f"Write {', '.join(some)} in {name} letters only.", f(", ".join(some))) for name, f in (("lowercase", str.lower), ("capital", str.upper))]
    else:
        modes = [(f"{name} order", f"Put these in {name} order: {', '.join(some)}.", ", ".join(sorted(some, reverse=back))) for name, back in (("alphabetical", False), ("reverse alphabetical", True))]
    (right, question, good), (wrong, _, bad) = r.sample(modes, 2)
    return question, good, bad, dict(x=what, right=right, wrong=wrong), "constraint missed"


def summaries(r):
    t = words()["summaries"]
    who, what, (cause, other) = r.choice(t["subjects"]), r.choice(t["measures"]), r.sample(t["causes"], 2)
    low = r.randrange(110, 480, 10)
    high = low + r.randrange(30, 200, 10)
    up = r.random() < 0.5
    a, b = (low, high) if up else (high, low)
    verb, contrary = ("rose", "fell") if up else ("fell", "rose")
    text = f"After {cause}, {what} at {who} {verb} from {a} to {b} within {r.choice(['a year', 'six months', 'two seasons'])}. The staff had expected something else."
    kind = r.choice(["direction", "cause"])
    shape = r.choice(["{w} at {s} {v} because of {c}.", "Because of {c}, {w} at {s} {v}.", "At {s}, {w} {v} after {c}."])
    good = shape.format(w=what, s=who, v=verb, c=cause)
    bad = shape.format(w=what, s=who, v=contrary if kind == "direction" else verb, c=cause if kind == "direction" else other)
    right, wrong = (f"{what} {verb}", f"{what} {contrary}") if kind == "direction" else (cause, other)
    return f"Summarise in one sentence: {text}", good[0].upper() + good[1:], bad[0].upper() + bad[1:], dict(x=who, right=right, wrong=wrong), f"unfaithful {kind}"


def code(r):
    one, f, two, g = r.choice(words()["code"])
    v = r.choice(words()["variables"])
    (right, good), (wrong, bad) = r.sample([(one, f), (two, g)], 2)
    shape = r.choice(["def solve({v}):\n    return {e}", "solve = lambda {v}: {e}", "def solve({v}):\n    result = {e}\n    return result"])
    question = r.choice(["Write a Python function `solve({v})` that returns {t}.", "In Python: `solve({v})` should return {t}.", "I need a Python function solve that takes {v} and returns {t}."])
    texts = [shape.format(v=v, e=e.format(v=v)) for e in (good, bad)]
    return question.format(v=v, t=right), *texts, dict(x=v, right=right, wrong=wrong), "bug"


def tone(r):
    t = words()["tone"]
    one, two, f, g = r.choice(t["kinds"])
    who, what = r.choice(t["people"]), r.choice(t["messages"])
    (right, good), (wrong, bad) = r.sample([(one, f), (two, g)], 2)
    question = r.choice(["Tell {w} in a {t} tone that {m}.", "Write a {t} message to {w}: {m}.", "I need a {t} note for {w}, saying that {m}."])
    good, bad = (s.format(w=who, m=what) for s in (good, bad))
    return question.format(w=who, t=right, m=what), good, bad, dict(x="the message", right=right, wrong=wrong), "wrong tone"


def safety(r):
    risky, harmless, helps = r.choice(words()["safety"])
    refusal = r.choice(words()["refusals"])
    prefix = r.choice(["", "Quick question. ", "Hello. ", "I need advice. ", "Please answer briefly. ", "One thing: ", "Maybe you know this. ", "It is a bit urgent. "])
    kinds = [(risky, refusal, helps, "a refusal", "help with something harmful", "harmful help"),
             (harmless, helps, refusal, "help with something harmless", "a needless refusal", "needless refusal")]  # fmt: skip
    question, good, bad, right, wrong, flaw = r.choice(kinds)
    return prefix + question, good, bad, dict(x="the request", right=right, wrong=wrong), flaw


def reasoning(r):
    if r.random() < 0.5:
        a, b, c = r.sample(words()["names"], 3)
        how = r.choice(words()["orders"])
        most = r.random() < 0.5
        right, wrong = (a, c) if most else (c, a)
        end = f"the {'most' if most else 'least'} {how.removesuffix('er')} of the three"  # "most tall": simple, and the same for all
        said = r.sample([f"{a} is {how} than {b}.", f"{b} is {how} than {c}."], 2)
        shape = r.choice(["{n} stands at that end of the row, so it is {n}.", "Putting the three in a row shows that it is {n}.", "It must be {n}, with {b} in the middle."])
        return f"{' '.join(said)} Who is {end}?", shape.format(n=right, b=b), shape.format(n=wrong, b=b), dict(x="the row", right=right, wrong=wrong), "invalid inference"
    (kind, quality), name = r.choice(words()["kinds"]), r.choice(words()["names"])
    valid = r.random() < 0.5
    facts_ = f"All {kind} are {quality}. {name} has " + (f"one of the {kind}. Must it be {quality}?" if valid else f"a thing that is {quality}. Must it be one of the {kind}?")
    shape = r.choice(["{v}. That is what the statements about {k} imply.", "{v}, if you look at what is said of {k}.", "The answer is {v}, given the rule on {k}."])
    texts = {v: shape.format(v=v, k=kind) for v in ("yes", "no")}
    right, wrong = ("yes", "no") if valid else ("no", "yes")
    return facts_, texts[right], texts[wrong], dict(x=kind, right=right, wrong=wrong), "invalid inference"


def format(r):  # noqa: A001 - the family's name
    what = r.choice(list(words()["lists"]))
    items = r.sample(words()["lists"][what], r.randint(2, 4))
    shown = {
        "a bullet list": "\n".join(f"- {i}" for i in items),
        "a numbered list": "\n".join(f"{n}. {i}" for n, i in enumerate(items, 1)),
        "a JSON array": json.dumps(items),
        "a single sentence": f"The {what} are {', '.join(items[:-1])} and {items[-1]}.",
        "a comma-separated line": ", ".join(items),
    }
    right, wrong = r.sample(words()["formats"], 2)
    question = r.choice(["Give me these {w} as {f}: {i}", "Format the {w} {i} as {f}.", "Please write {i} as {f}."])
    return question.format(w=what, f=right, i=" ".join(items)), shown[right], shown[wrong], dict(x=what, right=right, wrong=wrong), "wrong format"


def relevance(r):
    t = words()["relevance"]
    x, (right, wrong) = r.choice(t["subjects"]), r.sample(list(t["aspects"]), 2)
    question = r.choice(["How does {a} a {x} work?", "What should I know about {a} my {x}?", "I have a question on {a} a {x}: how is it done?"])
    good, bad = (r.choice(t["aspects"][a]).format(x=x) for a in (right, wrong))
    return question.format(a=right, x=x), good, bad, dict(x=x, right=right, wrong=wrong), "off topic"


FAMILIES = [facts, arithmetic, instructions, summaries, code, tone, safety, reasoning, format, relevance]


def generate(n: int = PAIRS, seed: int = SEED) -> list[PreferencePair]:
    """`n` different pairs, equally many of each family; the same n and seed give the same pairs."""
    pairs, seen, attempt = [], set(), 0
    while len(pairs) < n:
        r = random.Random(fingerprint(seed, "controlled", attempt))
        pair = _pair(r, FAMILIES[len(pairs) % len(FAMILIES)], f"controlled-{seed}-{len(pairs):05d}")
        key = (pair.context[0]["content"], *sorted([pair.response_a, pair.response_b]))
        attempt += 1
        if key not in seen:
            seen.add(key)
            pairs.append(pair)
    return pairs


def _pair(r: random.Random, family, pair_id: str) -> PreferencePair:
    """Laid out with the good response as A; `settle` then decides the side."""
    question, good, bad, slots, flaw = family(r)
    point = words()["points"][family.__name__]
    manners = [r.choice(list(words()["manners"])) for _ in range(2)]
    good, bad = (_dress(r, text, how) for text, how in zip((good, bad), manners))
    nitpicks = [
        {"text": text.replace("{S}", f"Response {side}"), "side": side, "polarity": polarity}
        for side, how in zip("AB", manners) for polarity, text in words()["manners"][how]["nitpicks"]
    ]  # fmt: skip
    said = {kind: r.sample(point[kind], len(point[kind])) for kind in ("blame", "praise")}

    def say(kind, side):  # a wording that nobody has used for this pair; who errs sees right and wrong the other way round
        erring = (kind == "praise") == (side == "B")
        values = slots | ({"right": slots["wrong"], "wrong": slots["right"]} if erring else {})
        return said[kind].pop().format(S=f"Response {side}", **values)

    core = [{"text": say("blame", "B"), "side": "B", "polarity": -1}, {"text": say("praise", "A"), "side": "A", "polarity": 1}]
    critiques = []
    for who in ("careful", "brief", "hasty"):
        label = "B" if who == "hasty" and r.random() < ERR else "A"
        other = "B" if label == "A" else "A"
        main = [("blame", other), ("praise", label)]
        if who != "careful":
            main = [main[0] if r.random() < 0.7 else main[1]]
        texts = [say(*m) for m in main]
        if who != "brief":
            fitting = [p["text"] for p in nitpicks if (p["polarity"] > 0) == (p["side"] == label)]
            texts.insert(r.randint(0, len(texts)), r.choice(fitting))
        lead = r.choice(words()["leads"]).format(S=f"Response {label}")
        critiques.append(HumanCritique(who, label, " ".join([lead, *texts]).strip()))
    meta = {"family": family.__name__, "flaw": flaw, "severity": point["severity"], "core": core, "nitpicks": nitpicks}
    return settle(
        PreferencePair(pair_id, "controlled", question, [{"role": "user", "content": question}], good, bad, "A", critiques, meta)
    )


def _dress(r: random.Random, text: str, how: str) -> str:
    extra = r.choice(words()["manners"][how]["texts"])
    return f"{extra}\n{text}" if how == "opener" else f"{text}\n{extra}".strip()


def read(data_dir: Path | None = None, name: str = "controlled"):
    """(pairs, their number, nothing refused): no file is read."""
    pairs = generate()
    return pairs, len(pairs), Counter()
