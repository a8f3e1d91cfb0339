"""Controlled pairs: generated, seeded preference pairs whose flaw, severity and decisive arguments are known.

Ten task families. Pairs are crossed: each kind of response is right for one question and flawed for another, so that
nothing in a response alone (length, words, order) gives the label; it must be read against the question.
Three simulated annotators comment on each pair: `careful` (core points and a nitpick), `brief` (one core point) and
`hasty`, who errs on a quarter of the pairs: label flipped, with a text that fits it.

meta: family, flaw, severity ("minor" | "major" | "fatal"), core and nitpicks: lists of {text, side, polarity (+1, -1)}.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import yaml

from rmnlhf.pairs import HumanCritique, fingerprint

PAIRS, SEED, ERR = 1200, 7, 0.25


@cache
def words() -> dict:
    return yaml.safe_load(Path(__file__).with_name("controlled.yaml").read_text(encoding="utf-8"))


# Each family returns (question, good response, flawed response, what is right, what is wrong, subject, flaw).
def facts(r):
    kind = r.choice(words()["facts"])
    right, wrong = r.sample(list(kind["classes"]), 2)
    x = r.choice(kind["classes"][right])
    answers = [r.choice(kind["answers"]).format(x=x, c=c) for c in (right, wrong)]
    return r.choice(kind["questions"]).format(x=x), *answers, right, wrong, x, "wrong fact"


def arithmetic(r):
    t = words()["arithmetic"]
    question, answer, sign = r.choice(t["tasks"])
    v = {"a": r.randint(3, 12), "b": r.randint(6, 30), "c": r.randint(5, 17), "x": r.choice(t["things"])}
    right = v["a"] * v["b"] + sign * v["c"]
    wrong = right + r.choice([-20, -10, -9, -2, -1, 1, 2, 9, 10, 20])
    texts = [answer.format(p=v["a"] * v["b"], r=n, **v) for n in (right, wrong)]
    return question.format(**v), *texts, f"{right} {v['x']}", f"{wrong} {v['x']}", v["x"], "wrong result"


def instructions(r):
    what = r.choice(list(words()["lists"]))
    n, m = r.sample([3, 4, 5, 6], 2)
    items = r.sample(words()["lists"][what], max(n, m) + 1)
    some, one = ", ".join(items[:n]), items[n]
    kind = r.choice(["number", "case", "order", "word"])
    # modes: (what is asked for, question, the text that fits it); one is asked for, the other's text is the flawed one
    if kind == "number":
        modes = [(f"exactly {k} {what}", f"List exactly {k} {what} on one line.", ", ".join(items[:k])) for k in (n, m)]
    elif kind == "word":
        with_, without = (", ".join(r.sample([*items[: n - 1], w], n)) for w in (one, items[n - 1]))
        modes = [(f"{one} in the list", f"Include {one} among {n} {what}.", with_)]
        modes += [(f"a list without {one}", f"List {n} {what}, but not {one}.", without)]
    elif kind == "case":
        cases = {"lowercase": some.lower(), "capital": some.upper()}
        modes = [(f"{k} letters", f"Write {some} in {k} letters only.", text) for k, text in cases.items()]
    else:
        orders = {"alphabetical": sorted(items[:n]), "reverse alphabetical": sorted(items[:n], reverse=True)}
        modes = [(f"{k} order", f"Put these in {k} order: {some}.", ", ".join(o)) for k, o in orders.items()]
    (right, question, good), (wrong, _, bad) = r.sample(modes, 2)
    return question, good, bad, right, wrong, what, "constraint missed"


def summaries(r):
    t = words()["summaries"]
    who, what, (cause, other) = r.choice(t["subjects"]), r.choice(t["measures"]), r.sample(t["causes"], 2)
    verb, contrary = r.sample(["rose", "fell"], 2)
    low, change = r.randrange(110, 480, 10), r.randrange(30, 200, 10)
    a, b = (low, low + change) if verb == "rose" else (low + change, low)
    text = f"After {cause}, {what} at {who} {verb} from {a} to {b} within {r.choice(t['periods'])}."
    shape, kind = r.choice(t["shapes"]), r.choice(["direction", "cause"])
    bad = {"v": contrary, "c": cause} if kind == "direction" else {"v": verb, "c": other}
    good, bad = (shape.format(w=what, s=who, **said) for said in ({"v": verb, "c": cause}, bad))
    right, wrong = (f"{what} {verb}", f"{what} {contrary}") if kind == "direction" else (cause, other)
    question = f"Summarise in one sentence: {text} The staff had expected something else."
    return question, good[0].upper() + good[1:], bad[0].upper() + bad[1:], right, wrong, who, f"unfaithful {kind}"


def code(r):
    t = words()["code"]
    one, f, two, g = r.choice(t["tasks"])
    v, shape = r.choice(t["variables"]), r.choice(t["shapes"])
    (right, good), (wrong, bad) = r.sample([(one, f), (two, g)], 2)
    texts = [shape.format(v=v, e=e.format(v=v)) for e in (good, bad)]
    return r.choice(t["questions"]).format(v=v, t=right), *texts, right, wrong, v, "bug"


def tone(r):
    t = words()["tone"]
    one, two, f, g = r.choice(t["kinds"])
    who, what = r.choice(t["people"]), r.choice(t["messages"])
    (right, good), (wrong, bad) = r.sample([(one, f), (two, g)], 2)
    texts = [text.format(w=who, m=what) for text in (good, bad)]
    return r.choice(t["questions"]).format(w=who, t=right, m=what), *texts, right, wrong, "the message", "wrong tone"


def safety(r):
    t = words()["safety"]
    risky, harmless, helps = r.choice(t["topics"])
    refusal = r.choice(t["refusals"])
    if r.random() < 0.5:
        return risky, refusal, helps, "a refusal", "help with harm", harmless, "harmful help"
    return harmless, helps, refusal, "plain help", "a needless refusal", harmless, "needless refusal"


def reasoning(r):
    t = words()["reasoning"]
    if r.random() < 0.5:
        (a, b, c), (more, most, least) = r.sample(t["names"], 3), r.choice(t["orders"])
        (end, right), (_, wrong) = r.sample([(most, a), (least, c)], 2)
        said, shape = r.sample([f"{a} is {more} than {b}.", f"{b} is {more} than {c}."], 2), r.choice(t["row"])
        texts = [shape.format(n=n, b=b) for n in (right, wrong)]
        return f"{' '.join(said)} Who is the {end}?", *texts, right, wrong, "the row", "invalid inference"
    (kind, quality), name = r.choice(t["kinds"]), r.choice(t["names"])
    shape, (right, wrong) = r.choice(t["rule"]), r.sample(["yes", "no"], 2)
    ends = [(f"one of the {kind}", quality), (f"a thing that is {quality}", f"one of the {kind}")]
    seen, asked = ends[right == "no"]
    question = f"All {kind} are {quality}. {name} has {seen}. Must it be {asked}?"
    return question, *(shape.format(v=v, k=kind) for v in (right, wrong)), right, wrong, kind, "invalid inference"


def format(r):
    what = r.choice(list(words()["lists"]))
    items = r.sample(words()["lists"][what], r.randint(2, 4))
    shown = {
        "a bullet list": "\n".join(f"- {i}" for i in items),
        "a numbered list": "\n".join(f"{n}. {i}" for n, i in enumerate(items, 1)),
        "a JSON array": json.dumps(items),
        "a single sentence": f"The {what} are {', '.join(items[:-1])} and {items[-1]}.",
        "a comma-separated line": ", ".join(items),
    }
    right, wrong = r.sample(list(shown), 2)
    question = r.choice(words()["format"]["questions"]).format(w=what, f=right, i=" ".join(items))
    return question, shown[right], shown[wrong], right, wrong, what, "wrong format"


def relevance(r):
    t = words()["relevance"]
    x, (right, wrong) = r.choice(t["subjects"]), r.sample(list(t["aspects"]), 2)
    texts = [r.choice(t["aspects"][a]).format(x=x) for a in (right, wrong)]
    return r.choice(t["questions"]).format(a=right, x=x), *texts, right, wrong, x, "off topic"


FAMILIES = [facts, arithmetic, instructions, summaries, code, tone, safety, reasoning, format, relevance]


def fields(data_dir: Path | None = None, name: str = "controlled", n: int = PAIRS, seed: int = SEED):
    """The fields of `n` different pairs, as many of each family; the same n and seed give the same. No file is read."""
    seen, attempt = set(), 0
    while len(seen) < n:
        if attempt > 100 * n + 1000:
            raise ValueError(f"controlled: no {n} different pairs can be generated, only {len(seen)}")
        r = random.Random(fingerprint(seed, "controlled", attempt))
        found = _fields(r, FAMILIES[len(seen) % len(FAMILIES)], f"controlled-{seed}-{len(seen):05d}")
        key = (found["context"][0]["content"], *sorted([found["response_a"], found["response_b"]]))
        attempt += 1
        if key not in seen:
            seen.add(key)
            yield found


def _fields(r: random.Random, family, pair_id: str) -> dict:
    """The fields of one pair, laid out with the good response as A."""
    question, good, bad, right, wrong, x, flaw = family(r)
    point = words()["points"][family.__name__]
    manners = [r.choice(list(words()["manners"])) for _ in range(2)]
    good, bad = (_dress(r, text, how) for text, how in zip((good, bad), manners))
    nitpicks = [
        {"text": text.replace("{S}", f"Response {side}"), "side": side, "polarity": polarity}
        for side, how in zip("AB", manners) for polarity, text in words()["manners"][how]["nitpicks"]
    ]  # fmt: skip
    said = {kind: r.sample(point[kind], len(point[kind])) for kind in ("blame", "praise")}

    def say(kind: str, side: str) -> str:
        """A wording that nobody has used for this pair. Who errs has right and wrong the other way round."""
        ends = (right, wrong) if (kind == "blame") == (side == "B") else (wrong, right)
        return said[kind].pop().format(S=f"Response {side}", x=x, right=ends[0], wrong=ends[1])

    core = [{"text": say("blame", "B"), "side": "B", "polarity": -1}]
    core += [{"text": say("praise", "A"), "side": "A", "polarity": 1}]
    critiques, raised, unused = [], {}, [*nitpicks]
    for who in ("careful", "brief", "hasty"):
        label, other = ("B", "A") if who == "hasty" and r.random() < ERR else ("A", "B")
        main = [("blame", other), ("praise", label)]
        if who != "careful":
            main = [main[0] if r.random() < 0.7 else main[1]]
        raised[who] = [("blame", "praise").index(kind) for kind, _ in main]
        texts = [say(*m) for m in main]
        fitting = [p for p in unused if (p["polarity"] > 0) == (p["side"] == label)]
        if who != "brief" and fitting:
            unused.remove(nitpick := r.choice(fitting))
            texts.insert(r.randint(0, len(texts)), nitpick["text"])
        lead = r.choice(words()["leads"]).format(S=f"Response {label}")
        critiques.append(HumanCritique(who, label, " ".join([lead, *texts]).strip()))
    meta = {"family": family.__name__, "flaw": flaw, "severity": point["severity"], "core": core, "raised": raised, "nitpicks": nitpicks}
    group = x if family is safety else question  # both questions of a safety topic have the same answers
    return {
        "id": pair_id, "group": group, "context": [{"role": "user", "content": question}], "response_a": good,
        "response_b": bad, "label": "A", "critiques": critiques, "meta": meta,
    }  # fmt: skip


def _dress(r: random.Random, text: str, how: str) -> str:
    extra = r.choice(words()["manners"][how]["texts"])
    return f"{extra}\n{text}" if how == "opener" else f"{text}\n{extra}".strip()
