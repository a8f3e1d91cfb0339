"""One HTML file from the files of a run: what was run, the paper's claims beside this run's figures, curves, tables, figures,
and the critique viewer. Nothing is computed that a file of the run does not hold, and a stage that did not run is said to be
missing.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections import deque
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import jinja2
import yaml

from . import ROOT, rewards, sources, splits
from .grm import Judgement
from .pairs import OTHER, PreferencePair, read_jsonl, swap_sides
from .params import ARMS

TEMPLATES = Path(__file__).parent / "templates"
STAGES = {
    "00_data": "Data", "01_diagnosis": "Diagnosis", "02_core_similarity": "Process reward", "03_cold_start": "Cold start",
    "04_metarm": "MetaRM", "05_grpo_offline": "GRPO", "06_grpo_online": "Online, drift",
    "07_benchmarks": "Benchmarks", "08_downstream": "Downstream",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "peft", "sentence-transformers", "datasets", "vllm", "unsloth")
REPRODUCED, NOT_DECIDED, NOT_REPRODUCED, NOT_TESTABLE = WORDS = "reproduced", "not decided", "not reproduced", "not testable here"
MIN_N, MIN_GROUPS = 30, 10
VIEWED = 2000  # entries of the critique viewer
RULES = (
    f"Not testable here: the stage did not run, its file lacks the figure, the figure is missing (NaN), it rests on fewer than "
    f"{MIN_N} rows or {MIN_GROUPS} groups, the claim is about human text and the run had only generated pairs, no row differs between the "
    f"two that are compared, or the claim's own row says why. Reproduced: the whole 95 % interval lies on the claimed side of the stated "
    f"bound. Not reproduced: the whole interval lies on the other side. Not decided: the interval holds the bound; a larger run may go either way. Comparisons of arms draw pairs, whose debates may be fewer than {MIN_GROUPS}: see the limits."
)


@dataclass
class Run:
    """The files of one results folder. Every dict is empty where the stage did not run; `unreadable`: path → reason."""

    folder: Path
    params: dict | None = None
    metrics: dict[str, dict] = field(default_factory=dict)  # stage -> {key: number | text | {mean, low, high, n}}
    timings: dict[str, dict] = field(default_factory=dict)
    tables: dict[str, tuple[list, list]] = field(default_factory=dict)  # name -> (header, rows)
    figures: dict[str, bytes] = field(default_factory=dict)
    judgements: dict[str, list[dict]] = field(default_factory=dict)  # arm -> rows of benchmarks.runner.evaluate
    rollouts: dict[str, list[dict]] = field(default_factory=dict)  # arm -> the last rows of grpo's rollouts.jsonl
    former: int = 0  # rollouts before those
    pairs: dict[str, PreferencePair] = field(default_factory=dict)  # texts, from splits/, hidden critiques put back
    source: str | None = None  # data really used, from splits/
    unreadable: dict[str, str] = field(default_factory=dict)


def collect(results: str | Path = "results") -> Run:
    """Read what a run left. A broken file is named in `unreadable`, and the rest is used. Raises FileNotFoundError without folder."""
    folder = Path(results)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `make repro` makes it")
    run = Run(folder)

    def last(path: Path) -> bytes:  # the rollouts of a long run are gigabytes
        with path.open("rb") as file:
            lines = deque(enumerate(file), maxlen=VIEWED)
        run.former += lines[0][0] if lines else 0
        return b"".join(line for _, line in lines)

    def read(path: Path, how, load=Path.read_bytes):
        try:
            return how(load(path))
        except (ValueError, TypeError, csv.Error, yaml.YAMLError) as e:
            run.unreadable[str(path.relative_to(folder))] = str(e).split("\n")[0]

    def each(pattern: str, how, into: dict, name=lambda p: p.stem):
        for path in sorted(folder.glob(pattern)):
            if (got := read(path, how)) is not None:
                into[name(path)] = got

    if (folder / "params.yaml").exists():
        run.params = read(folder / "params.yaml", yaml.safe_load)
    each("metrics/*.json", _metrics, run.metrics)
    each("timings/*.json", _metrics, run.timings)
    each("tables/*.csv", _table, run.tables)
    each("figures/*.png", lambda raw: raw, run.figures)
    files: dict[Path, list[dict]] = {}
    each("judgements/**/*.jsonl", _rows, files, lambda p: p)  # several notebooks may judge with one arm
    for path, rows in files.items():
        run.judgements.setdefault(path.stem, []).extend(rows)
    seeds = [str(s) for s in ((run.params or {}).get("grpo") or {}).get("seeds", [])[1:]]
    for path in sorted(folder.glob("runs/*/rollouts.jsonl")):
        arm = path.parent.name
        if ("-" not in arm or arm.split("-")[1] in seeds) and (got := read(path, _rows, last)) is not None:  # others are of former parameters
            run.rollouts[arm] = got
    if (folder / "splits" / "splits.json").exists():
        s = splits.load(folder / "splits")
        run.source = s.source
        for pair in [p for role in (s.train, s.hidden, s.unseen, *s.evaluation.values()) for p in role]:
            run.pairs[pair.id] = replace(pair, critiques=s.hidden_truth.get(pair.id, pair.critiques))
    for path in sorted(folder.glob("pairs/*.jsonl")):  # what 07 asked, where it is no evaluation pair of the splits
        run.pairs |= {p.id: p for p in read_jsonl(path).pairs if p.id not in run.pairs}
    return run


def untraced(results: str | Path = "results") -> dict[str, list[str]]:
    """{table: its columns that hold a number which no metrics file of the run holds, to 1e-6}; a run's own metrics.jsonl and
    drift.jsonl count. Found by value: a number that happens to stand elsewhere (small counts, 0, 1) passes."""
    folder, known, lost = Path(results), set(), {}
    keep = lambda text: known.add(round(float(text), 6))  # noqa: E731
    for path in [*folder.glob("metrics/*.json"), *folder.glob("runs/*/metrics.jsonl"), *folder.glob("runs/*/drift.jsonl")]:
        for line in path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]:
            json.loads(line, parse_float=keep, parse_int=keep)
    for path in sorted(folder.glob("tables/*.csv")):
        header, rows = _table(path.read_bytes())
        for row in rows:
            for column, cell in zip(header, row):
                if re.fullmatch(r"-?\d[\d.]*(e-?\d+)?", cell) and not any(round(float(cell) + d, 6) in known for d in (0, -1e-6, 1e-6)):
                    lost.setdefault(path.stem, set()).add(column)
    return {name: sorted(columns) for name, columns in lost.items()}


def _metrics(raw: bytes) -> dict:
    data = json.loads(raw)
    if not isinstance(data, dict):
        raise TypeError(f"expected an object, found {type(data).__name__}")
    return flatten(data)


def flatten(data: dict, path: str = "") -> dict:
    """Nested metrics → {"a.b": leaf}; {"mean", "low", "high", "n"} is one leaf, what else stands beside it gets its own key."""
    out = {}
    for key, value in data.items():
        rest = value
        if isinstance(value, dict) and "mean" in value:
            out[path + key] = {k: value[k] for k in ("mean", "low", "high", "n") if k in value}
            rest = {k: v for k, v in value.items() if k not in out[path + key]}
        if isinstance(rest, dict):
            out |= flatten(rest, f"{path}{key}.")
        elif not isinstance(value, list):
            out[path + key] = value
    return out


def _table(raw: bytes) -> tuple[list, list]:
    rows = list(csv.reader(raw.decode("utf-8").splitlines()))
    return (rows[0], rows[1:]) if rows else ([], [])


def _rows(raw: bytes) -> list[dict]:
    """JSON Lines; a half-written last line of a killed run is left out."""
    lines = raw.decode("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


# ---- figures -------------------------------------------------------------------------------------------------------------


def number(value) -> str:
    """A number for reading; "–" for None and NaN."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or value == int(value) and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"


def show(value) -> str:
    """A figure with its interval and n, where it has them."""
    if not isinstance(value, dict):
        return number(value)
    text = number(value.get("mean"))
    if value.get("low") is not None and value.get("high") is not None:
        text += f" [{number(value['low'])}, {number(value['high'])}]"
    return text + (f", n = {value['n']:,}" if value.get("n") is not None else "")


def tidy(header: list[str], rows: list[list[str]]) -> tuple[list, list]:
    """A CSV for reading: columns x, x_low, x_high (or x.mean, x.low, x.high, or x, low, high side by side) become one "x [low, high]";
    numbers are rounded, a missing one is "–"."""

    def cell(text):
        try:
            return number(float(text)) if not text.strip().lstrip("-").isdigit() else number(int(text))
        except ValueError:
            return text

    def joined(row, i):
        span = [row[j] for j in spans.get(header[i], ())]
        if header[i] in spans and not row[i]:
            return "–"
        return cell(row[i]) + (f" [{cell(span[0])}, {cell(span[1])}]" if all(span) and span else "")

    spans = {}
    for c in header:
        stem = c.removesuffix("mean")
        for low, high in ((f"{c}_low", f"{c}_high"), (f"{stem}low", f"{stem}high"), ("low", "high")):
            if {low, high} <= set(header) and (low != "low" or header.index(low) == header.index(c) + 1):
                spans[c] = (header.index(low), header.index(high))
    hidden = {i for pair in spans.values() for i in pair}
    keep = [i for i in range(len(header)) if i not in hidden]
    names = [header[i] + (" [95 % interval]" if header[i] in spans else "") for i in keep]
    body = []
    for row in rows:
        row = row + [""] * (len(header) - len(row))
        body.append([joined(row, i) for i in keep])
    return names, body


# ---- claims --------------------------------------------------------------------------------------------------------------


def claims(run: Run, path: Path = TEMPLATES / "claims.yaml") -> list[dict]:
    """The paper's claims with this run's figure, its file and key, a word and the reason for the word."""
    generated = run.source == "controlled"
    out = []
    for claim in yaml.safe_load(path.read_text(encoding="utf-8")):
        stage, metrics = claim.get("stage"), run.metrics.get(claim.get("stage")) or {}
        if claim.get("key") not in metrics and claim.get("or_key") in metrics:
            claim = {**claim, "key": claim["or_key"]}
        key = claim.get("key")
        value = metrics.get(key)
        word, why = judge(claim, value, stage in run.metrics, generated, metrics.get(f"{key}.groups"))
        for other, wanted in claim.get("where", {}).items():  # the figure means what the claim says only then
            if value is not None and word != NOT_TESTABLE and metrics.get(other) != wanted:
                word, why = NOT_TESTABLE, claim["where_text"] if other in metrics else f"metrics/{stage}.json does not say whether {other} is {wanted}"
        out.append({**claim, "value": value, "word": word, "why": why, "file": f"metrics/{stage}.json" if value is not None else None})
    return out


def judge(claim: dict, value, ran: bool = True, generated: bool = False, groups: int | None = None) -> tuple[str, str]:
    """(word, reason) for one claim by `RULES`.

    claim: {stage, key, above | below: bound; human: true where only human text can test it}, or {untestable: reason}.
    groups: of how many independent groups (debates, questions) the rows are, where the file says it."""
    if claim.get("untestable"):
        return NOT_TESTABLE, claim["untestable"]
    if not ran:
        return NOT_TESTABLE, f"stage {claim['stage']} did not run"
    if value is None:
        return NOT_TESTABLE, claim.get("lacking") or f"metrics/{claim['stage']}.json has no {claim['key']}"
    if claim.get("human") and generated:
        return NOT_TESTABLE, "this run had generated pairs only, the claim is about human critiques"
    mean = value.get("mean") if isinstance(value, dict) else value
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not math.isfinite(mean):
        return NOT_TESTABLE, "the figure is missing"
    low, high, n = (value.get(k) if isinstance(value, dict) else None for k in ("low", "high", "n"))
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return NOT_TESTABLE, "the figure has no interval"
    elif n is None or n < MIN_N:
        return NOT_TESTABLE, f"n = {n}, fewer than {MIN_N}"
    if groups is not None and groups < MIN_GROUPS:
        return NOT_TESTABLE, f"the rows come from {groups} groups, fewer than {MIN_GROUPS}"
    if low == high:
        return NOT_TESTABLE, "the interval has no width: no row differs, so the size of an effect cannot be told"
    bound = claim["above"] if "above" in claim else claim["below"]
    if low <= bound <= high:
        return NOT_DECIDED, f"the interval holds {number(bound)}"
    word = REPRODUCED if (low > bound) == ("above" in claim) else NOT_REPRODUCED
    return word, f"the interval lies {'above' if low > bound else 'below'} {number(bound)}"


# ---- what was run --------------------------------------------------------------------------------------------------------


def provenance(run: Run) -> list[tuple[str, str, str]]:
    """[(what, value, where from)]: profile, data, model, seed, commit, versions, time, machine."""
    p = run.params or {}
    rows = [
        ("Profile", p.get("profile"), "params.yaml › profile"),
        ("Data", run.source, "splits/splits.json › source"),
        ("Policy", (p.get("policy") or {}).get("model"), "params.yaml › policy.model"),
        ("MetaRM", (p.get("metarm") or {}).get("base"), "params.yaml › metarm.base"),
        ("Process reward", (p.get("similarity") or {}).get("backend"), "params.yaml › similarity.backend"),
        ("GRPO", f"{p['grpo']['steps']} steps of {p['grpo']['prompts']} × {p['grpo']['group']} rollouts, seeds {p['grpo']['seeds']}"
         if p.get("grpo") else None, "params.yaml › grpo"),
        ("Seed", p.get("seed"), "params.yaml › seed"),
        ("Commit", commit(), "git, when the report was made"),
        ("Versions", versions(), "installed packages, when the report was made"),
        ("Machine", machine(), "when the report was made"),
    ]  # fmt: skip
    if seconds := [t["seconds"] for t in run.timings.values() if isinstance(t.get("seconds"), (int, float))]:
        rows.append(("Time of the stages", duration(sum(seconds)), "timings/*.json › seconds"))
    if step := run.timings.get("06_step"):
        said = f"{step['with_metarm_over_without']:.3f} times one without; process rewards {step['process_share']:.1%} of it"
        rows.append(("A step with the online MetaRM", said, "timings/06_step.json, medians of arm online"))
    return [(a, "missing" if b is None else str(b), c) for a, b, c in rows]


def commit() -> str | None:
    """Short hash of HEAD, with "+ changes" where tracked files differ; None outside a repository."""

    def git(*args):
        return subprocess.run(["git", *args], check=False, cwd=ROOT, capture_output=True, text=True, timeout=30)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + (" + changes" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def versions() -> str:
    out = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            out.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(out)


def machine() -> str:
    """Processor count, architecture, memory and GPU; "unknown" where it cannot be read."""
    try:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        memory = "memory unknown"
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, {memory}, {gpu}"


def duration(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    return f"{m // 60} h {m % 60:02} min" if m >= 60 else f"{m} min {s:02} s" if m else f"{s} s"


# ---- viewer --------------------------------------------------------------------------------------------------------------


def viewer(run: Run, limit: int = VIEWED) -> dict:
    """The viewer's data: {"pairs": {id: texts}, "entries": [one arm's judgement of one pair, or one training rollout]}.

    Held-out judgements come first, whole pairs at a time; then training rollouts, the last steps first; `limit` entries in all.
    Sides (verdicts, arguments) are put in the pair's own order, critiques of the other order too."""
    entries = []
    for arm, rows in run.judgements.items():
        by_pair: dict = {}  # one judgement for each order
        for row in rows:
            by_pair.setdefault(str(row["id"]), {})[row["order"]] = row
        for pair_id, mine in by_pair.items():
            shown = [_judgement(mine[order], order == "ba", run.params) for order in sorted(mine)]
            source = next(iter(mine.values())).get("source")
            entries.append({"arm": arm, "set": "held-out", "pair": pair_id, "source": source, "shown": shown})
    rank = {i: hashlib.sha256(i.encode()).digest() for i in {e["pair"] for e in entries}}
    entries.sort(key=lambda e: (e["pair"] not in run.pairs, rank[e["pair"]], e["pair"]))  # pairs whose texts are known first
    training = sorted(((arm, r) for arm, rows in run.rollouts.items() for r in rows), key=lambda t: -(t[1].get("step") or 0))
    left_out = run.former + max(0, len(entries) + len(training) - limit)
    entries = entries[:limit] + [
        {"arm": arm, "set": "training", "pair": str(r["pair_id"]), "source": r.get("source"), "step": r.get("step"),
         "shown": [_judgement(r, bool(r.get("swap")), run.params)]}
        for arm, r in training[: max(0, limit - len(entries))]
    ]  # fmt: skip
    used = {e["pair"] for e in entries}
    texts = {i: _texts(run.pairs[i]) for i in sorted(used) if i in run.pairs}
    return {"pairs": texts, "entries": entries, "left_out": left_out}


def _texts(pair: PreferencePair) -> dict:
    return {
        "source": pair.source, "group": pair.group, "context": pair.context, "a": pair.response_a, "b": pair.response_b,
        "label": pair.label, "critiques": [{"who": c.annotator, "label": c.label, "text": c.text} for c in pair.critiques],
    }  # fmt: skip


def _named(clause: str) -> str:
    """A clause as a reader knows it: sides by their names again."""
    clause = re.sub(r"\bSIDE([AB])\b(?: (?='s\b))?", r"Response \1", clause).replace("BOTHSIDES", "both responses")
    return re.sub(r"\s+([,;:.])", r"\1", clause)


def _judgement(row: dict, swap: bool, p: dict | None) -> dict:
    """One judgement for the page, in the pair's own order; rows hold it as shown to the model. A held-out row gets the reward
    that it would have earned with its human critiques."""

    def side(letter):
        return OTHER.get(letter, letter) if swap else letter

    def own(text):
        return swap_sides(text) if swap and text else text

    def arguments(name):
        return [{**a, "text": own(_named(a["text"])), "side": side(a.get("side"))} for a in row.get(name) or []]

    def finite(x):
        return None if isinstance(x, float) and not math.isfinite(x) else x

    verdict = row.get("verdict")
    correct = bool(row["correct"]) if row.get("correct") is not None else verdict is not None and verdict == row.get("label")
    f1 = finite(row.get("f1", row.get("process")))
    parts = {k: finite(row.get(k)) for k in ("outcome", "process", "metarm", "reward") if k in row}
    if not parts and p and row.get("label") in OTHER and row.get("correct") is not None:
        said, r = Judgement(row.get("critique"), verdict, row.get("error")), p["reward"]
        total = rewards.composite(said, row["label"], f1, r["weight"], r["gated"], r["binary"], p["similarity"]["threshold"])
        parts = {"outcome": rewards.outcome(said, row["label"]), "process": f1, "reward": finite(total)}
    inconsistent = finite(row.get("inconsistent"))
    if "inconsistent" not in row and correct and f1 is not None and p:
        inconsistent = f1 < p["similarity"]["threshold"]
    return {
        "order": "ba" if swap else "ab", "verdict": side(verdict), "correct": correct, "error": row.get("error") or None,
        "critique": own(row.get("critique")) or "", "text": row.get("text") if not row.get("critique") else None, "f1": f1,
        "inconsistent": None if inconsistent is None else bool(inconsistent),
        "arguments": arguments("arguments"), "reference": arguments("reference"), "matches": row.get("matches") or [],
        "precision": finite(row.get("precision")), "recall": finite(row.get("recall")), "rewards": parts,
    }  # fmt: skip


# ---- the page ------------------------------------------------------------------------------------------------------------


def build(results: str | Path = "results", out: str | Path | None = None) -> Path:
    """Write <results>/report.html, self-contained, and return its path; what was run stands in <results>/run.json too."""
    run = collect(results)
    (run.folder / "run.json").write_text(json.dumps({k: v for k, v, _ in provenance(run)}, indent=1) + "\n", encoding="utf-8")
    data = viewer(run)
    script = (TEMPLATES / "viewer.js").read_text(encoding="utf-8")
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.globals |= {"show": show, "tidy": tidy, "duration": duration}
    found = claims(run)
    page = env.get_template("report.html.j2").render(
        run=run, provenance=provenance(run), claims=found, rules=RULES, stages=STAGES, limits=limits(run, found), viewer=data,
        images={k: base64.b64encode(v).decode() for k, v in run.figures.items()},
        words={w: sum(c["word"] == w for c in found) for w in WORDS},
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"), script=script, island=island(data),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    out = Path(out or run.folder / "report.html")
    part = out.with_name(out.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, out)
    return out


def island(data) -> str:
    """JSON that can stand inside <script>: no text of the data can end the element or open another."""
    text = json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None), ensure_ascii=False)  # NaN → null
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def limits(run: Run, found: list[dict]) -> list[str]:
    """What this run cannot show, from its own files."""
    p, out = run.params or {}, []
    if p.get("profile") and p["profile"] != "gpu":
        out.append(
            f"The policy is {p['policy']['model']}, trained for {p['grpo']['steps']} steps of {p['grpo']['prompts']} × "
            f"{p['grpo']['group']} rollouts. The paper trains 7B and 32B models on 256 × 8 rollouts a step: absolute figures do "
            "not compare, directions may not carry over."
        )
    compared = {
        "`human` − `cold_start`": ("05_grpo_offline", "paired.human_minus_cold_start.f1"), "`human` − `outcome`": ("05_grpo_offline", "paired.human_minus_outcome.f1"),
        "`online` − `outcome`": ("06_grpo_online", "online_over_outcome"),
    }  # fmt: skip
    found_in = {what: (run.metrics.get(stage, {}), key) for what, (stage, key) in compared.items()}
    said = ", ".join(f"{what} in {m[f'{k}.groups_above']} of {m[f'{k}.of_groups']}" for what, (m, k) in found_in.items() if f"{k}.of_groups" in m)
    out.append(
        "Intervals of the arms (03 to 06) draw pairs, not debates: they speak of these debates; others may differ by more."
        + (f" Debates in which the difference in core-F1 lies above 0: {said}." if said else "")
    )
    out += _arms(run)
    groups = next((run.metrics.get(c["stage"], {}).get(f"{c['key']}.groups") for c in found if c["id"] == "inconsistency"), None)
    if groups is not None and groups < MIN_GROUPS:
        out.append(f"The rates of 01 draw groups, here {groups}: too few for their intervals to be trusted.")
    if p.get("grpo"):
        n = len(p["grpo"]["seeds"])
        many = f"{n} training seeds, averaged within a pair" if n > 1 else "One training seed"
        out.append(f"{many}: intervals cover the choice of evaluation rows, not the luck of a training run.")
    if (p.get("similarity") or {}).get("backend") == "offline":
        out.append("The process reward comes from the matcher that needs no LLM (`similarity.backend: offline`), not from the paper's LLM judge.")
    stock, own = (run.metrics.get("02_core_similarity", {}).get(f"paid/{k}") or {} for k in ("stock_reason", "annotator_of_the_pair"))
    if None not in (stock.get("low"), own.get("high")) and stock["low"] > own["high"]:
        out.append(
            f"One sentence, said of every better response of unseen pairs, earns a core-F1 of {show(stock)}; an annotator's own reason, held "
            f"against the others of the pair, {show(own)}. Here a process reward pays for what people say most: hold the arms against `stock_reason`."
        )
    grpo = run.metrics.get("05_grpo_offline", {})
    if lost := grpo.get("hidden_pairs.without_critique"):
        out.append(
            f"No one has written a critique of {lost} of the {grpo['hidden_pairs.all']} hidden pairs: arm `human` earns no process reward there, "
            "so it is no upper bound, and shares of its gap to `outcome` mean little."
        )
    if run.source == "controlled":
        out.append("The pairs are generated: nothing here is about people's critiques.")
    if missing := [s for s in STAGES if s not in run.metrics]:
        out.append("Stages that did not run: " + ", ".join(missing) + ".")
    untested = [c["id"] for c in found if c["word"] == NOT_TESTABLE]
    if untested:
        out.append(f"{len(untested)} of {len(found)} claims could not be tested: " + ", ".join(untested) + ".")
    return out


def _arms(run: Run) -> list[str]:
    """What the arms' comparison does not say by itself: where the lead comes from, and what is said whatever is shown."""
    paired, online, out = run.metrics.get("05_grpo_offline", {}), run.metrics.get("06_grpo_online", {}), []

    def known(key):
        value = paired.get(f"paired.{key}.f1") or {}
        return value if None not in (value.get("low"), value.get("high")) else None

    names = ("human_minus_cold_start", "outcome_minus_cold_start", "human_minus_outcome", "human_minus_stock_reason", "human_minus_offline")
    start, lost, lead, stock, offline = map(known, names)
    if start and start["low"] <= 0 and lead and lead["low"] > 0:
        out.append(
            f"Arm `human` is not clearly above the cold start in core-F1 ({show(start)})"
            + (f": its lead over `outcome` ({show(lead)}) comes with what `outcome` lost against the cold start ({show(lost)})." if lost and lost["high"] < 0 else ".")
        )
    if stock and stock["low"] <= 0:
        how = "below" if stock["high"] < 0 else "not clearly above"
        out.append(f"Arm `human` is {how} one constant sentence, the stock reason, in core-F1 ({show(stock)}).")
    if offline and offline["high"] < 0:
        out.append(
            f"Arm `human`, to which all critiques are shown, is below `offline` in core-F1 ({show(offline)}): what people wrote is here no upper bound, and "
            "the share of its gap to `outcome` that an arm closes may be above 1."
        )
    arms = [a for a in ("cold_start", *ARMS) if online.get(f"{a}.most frequent critique") is not None]
    if arms:
        said = ", ".join(f"`{a}` {online[f'{a}.most frequent critique']:.0%}" for a in arms)
        first = ", ".join(f"`{a}` {online[f'{a}.first response named']:.0%}" for a in arms if online.get(f"{a}.first response named") is not None)
        most = max(arms, key=lambda a: online[f"{a}.most frequent critique"])
        one = f": `{most}` has learnt one sentence and says it of nearly every pair, so its core-F1 is what that sentence earns" if online[f"{most}.most frequent critique"] > 0.9 else ""
        out.append(f"Share of the most frequent critique among all that an arm writes: {said}{one}. Share of verdicts for the response shown first, one half being right: {first}.")
    if (n := online.get("drift_online_better.measures")) and 2 * online["drift_online_better.mae"] < n:
        out.append(f"On fresh rollouts of unseen pairs the online MetaRM had the lower error at {online['drift_online_better.mae']} of {n} measures: the frozen one did not fall behind.")
    limit = ((run.params or {}).get("benchmarks") or {}).get("max_prompt")
    if limit and (found := run.metrics.get("07_benchmarks")):
        shares = {k.split(".", 1)[1]: v for k, v in found.items() if k.startswith("prompts_cut.") and v}
        which = ": " + ", ".join(f"{v:.0%} of {k}" for k, v in shares.items()) if shares else ""
        out.append(f"07 cuts the prompts of other sets than this run's evaluation pairs to {limit} tokens, from the middle (`benchmarks.max_prompt`){which}.")
    return out


def model_card(params, adapter: str | Path, results: str | Path = "results") -> str:
    """Markdown model card of the adapter of one arm (its folder stands in results/runs/<arm>/): its licence, the adapters that it
    stands on, data and licences, training, and this run's own figures for the arm, each with its file and key."""
    from .policy import _chain

    run, model = collect(results), params.policy.model
    arm = Path(adapter).resolve().parent.name
    figures = [
        (stage, key, value) for stage in STAGES for key, value in run.metrics.get(stage, {}).items()
        if {arm, arm.split("-")[0]} & set(key.split(".")) and isinstance(value, dict) and value.get("n")
    ]  # fmt: skip
    known = {"smollm2": "apache-2.0", "huggingfacetb/smollm2": "apache-2.0", "deepseek-ai/deepseek-r1-distill-qwen": "mit"}
    chain = _chain(adapter) if (Path(adapter) / "adapter_config.json").exists() else []
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    return env.get_template("model_card.md.j2").render(
        params=params, arm=arm, figures=figures, show=show, commit=commit(), versions=versions(), limits=limits(run, []),
        licence=next((text for start, text in known.items() if model.lower().startswith(start)), "other"),
        chain=[f"{f.resolve().parent.name}/{f.name}" for f in chain],
        licences={s: sources.licence(s) if s in sources.names() else "the owner's" for s in (run.source or "").split("+") if s},
    )  # fmt: skip


# ---- README --------------------------------------------------------------------------------------------------------------

KEPT = ROOT / "docs" / "long"  # metrics, parameters and main figures of the run that README shows
SHOWN = {"06_arms.png": "critiques, verdicts and inconsistency of each arm", "09_learning_curves.png": "learning curves"}
BLOCK = re.compile(r"(<!-- run of profile long: made by `make readme` -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(results: str | Path = "results", folder: Path = KEPT) -> None:
    """Copy what README shows of a run of profile long to `folder`, to be committed: figures and numbers, no text of the data.

    Raises ValueError for a run of another profile, and for one that lacks a stage."""
    run = collect(results)
    profile = (run.params or {}).get("profile")
    if profile != "long":
        raise ValueError(f"{results} holds a run of profile {profile}; README shows one of profile long: `make long`")
    if missing := [s for s in STAGES if s not in run.metrics]:
        raise ValueError(f"{results} lacks stages {', '.join(missing)}: `make long` goes on where it stopped")
    shutil.rmtree(folder, ignore_errors=True)
    names = ["params.yaml", "run.json", *(f"figures/{n}" for n in SHOWN), *(f"metrics/{s}.json" for s in STAGES)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.folder / name, folder / name)


def excerpt(folder: Path = KEPT) -> str:
    """Markdown from the files that `keep` left: the arms, the paper's claims, what was run."""
    run, lines = collect(folder), json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run.source = lines["Data"]
    figures = run.metrics["06_grpo_online"]
    arms = [a for a in ("cold_start", "stock_reason", "outcome", "offline", "online", "human") if f"{a}.core-F1" in figures]
    columns = ["core-F1", "core-F1 of right verdicts", "verdict accuracy", "inconsistency"]
    columns = [c for c in columns if f"{arms[0]}.{c}" in figures]
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    return env.get_template("readme.md.j2").render(
        arms=arms, columns=columns, metrics=figures, claims=claims(run), lines=lines, show=show, shown=SHOWN, limits=limits(run, []),
        folder=folder.relative_to(ROOT).as_posix(), paired=run.metrics["05_grpo_offline"], threshold=run.params["similarity"]["threshold"],
        names=dict(zip(columns, ("f1", "f1_right", "correct", "inconsistent"))),
    )  # fmt: skip


def with_excerpt(readme: str) -> str:
    """README's text with the block between its two marks made anew."""
    return BLOCK.sub(lambda found: found[1] + excerpt() + found[2], readme)


if __name__ == "__main__":  # make readme
    try:
        keep()
    except (FileNotFoundError, ValueError) as e:
        print(f"{KEPT.relative_to(ROOT)} stays as it is: {e}")
    path = ROOT / "README.md"
    path.write_text(with_excerpt(path.read_text(encoding="utf-8")), encoding="utf-8")
