"""The datasets: a registry, one file per dataset, and `fetch` (what `make data` runs).

    sources.load("ukpconvarg") -> list[PreferencePair]       sources.path("judgebench") -> its folder under data/

A source's files, upstream commit, licence and sha256 stand in manifest.json; hub datasets are named in `HUB`.
"""

from __future__ import annotations

import gc
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

from rmnlhf.pairs import PreferencePair, settle

# pair sources: name -> folders under data/ that they read
PAIRS = {
    "ukpconvarg": ["ukpconvarg1", "ukpconvarg2"],
    "mr_ben": ["mr_ben"],
    "haluquestqa": ["haluquestqa"],
    "helpsteer3": ["helpsteer3"],
    "helpsteer3_sample": ["helpsteer3_sample"],
    "tulu3_if": ["tulu3_if"],
    "controlled": [],
}
# only fetched and located here; rmnlhf.benchmarks and the two `rows` functions read them
ROWS = ["judgebench", "pandalm", "llmbar", "rm_bench", "rewardbench", "rewardbench2", "math500", "processbench"]
# hub datasets: fetched on request (they are large), at these commits
HUB = {
    "helpsteer3": {
        "id": "nvidia/HelpSteer3", "files": "preference/*", "licence": "CC-BY-4.0",
        "revision": "f6d145777bcbde96137596340fab89793acd1031",
    },
    "tulu3_if": {
        "id": "allenai/tulu-3-pref-personas-instruction-following", "files": "data/*", "licence": "ODC-BY-1.0",
        "revision": "cdf475940025c0434a22dbd0bbed336a746942fe",
    },
    "rewardbench": {
        "id": "allenai/reward-bench", "files": "data/filtered*", "licence": "ODC-BY-1.0",
        "revision": "168d848cdbbea9764fae4a544dc9ca1e6cca4931",
    },
    "rewardbench2": {
        "id": "allenai/reward-bench-2", "files": "data/test*", "licence": "ODC-BY-1.0",
        "revision": "7ff08853b0d5686e79b13fda8677024f566a104a",
    },
}  # fmt: skip
MODULES = {"helpsteer3_sample": "helpsteer3"}


@cache
def manifest() -> dict:
    """{folder: {upstream, commit, licence, note, files: [{path, upstream_path, bytes, sha256}]}}"""
    return json.loads(Path(__file__).with_name("manifest.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    return list(PAIRS)


def folders(name: str) -> list[str]:
    """The folders under data/ of a source. Raises KeyError, with the names that exist, for an unknown one."""
    if name not in PAIRS and name not in ROWS:
        raise KeyError(f"unknown source {name!r}; known: {', '.join([*PAIRS, *ROWS])}")
    return PAIRS.get(name, [name])


def path(name: str, data_dir: str | Path = "data") -> Path:
    """The (first) folder that holds a source's files, whether they have been fetched or not."""
    return Path(data_dir, (folders(name) or [name])[0])


def licence(name: str) -> str:
    first = next(iter(folders(name)), None)
    return "Apache-2.0 (this project)" if first is None else (manifest().get(first) or HUB[first])["licence"]


def available(name: str, data_dir: str | Path = "data") -> bool:
    """Whether all files of a source are there, at their size (`fetch` checks the sha256)."""
    for folder in folders(name):
        if folder in HUB and not Path(data_dir, folder, "FETCHED.json").exists():
            return False
        for f in manifest().get(folder, {}).get("files", []):
            file = Path(data_dir, f["path"])
            if not file.exists() or file.stat().st_size != f["bytes"]:
                return False
    return True


def rows(name: str, data_dir: str | Path = "data") -> Iterator[tuple[str, dict]]:
    """(file stem, row) of every row in a source's .jsonl, .jsonl.gz, .json (a list) and .parquet files, by file name.

    Raises FileNotFoundError, with what to do, where files are missing."""
    _require(name, data_dir)
    for file in sorted(path(name, data_dir).rglob("*")):
        stem = file.name.split(".")[0]
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
                yield from ((stem, json.loads(line)) for line in f if line.strip())
        elif file.suffix == ".json" and file.name != "FETCHED.json":
            content = json.loads(file.read_text(encoding="utf-8"))
            yield from ((stem, row) for row in (content if isinstance(content, list) else content.values()))
        elif file.suffix == ".parquet":
            from pyarrow import parquet

            yield from ((stem, row) for row in parquet.read_table(file).to_pylist())


def _require(name: str, data_dir) -> None:
    if not available(name, data_dir):
        hint = f"python -m rmnlhf.sources {name}" if name in HUB else "make data"
        raise FileNotFoundError(f"{path(name, data_dir)}: files of source {name!r} are missing; run `{hint}`")


def load(name: str, data_dir: str | Path = "data") -> list[PreferencePair]:
    """All usable pairs of a source, in its own order; `read` also says what was left out, and why.

    Raises KeyError for an unknown name, FileNotFoundError (its message says what to do) where files are missing."""
    if name not in PAIRS:
        raise KeyError(f"no pairs in {name!r}; sources of pairs: {', '.join(PAIRS)}")
    return read(name, data_dir)[0]


def read(name: str, data_dir: str | Path = "data") -> tuple[list[PreferencePair], int, Counter]:
    """(pairs, rows read, Counter of refused rows by reason) of a source; len(pairs) + refused == rows.

    A source's module yields, for each row, the fields of a pair (`settle` then decides the order) or why it is none."""
    _require(name, data_dir)
    pairs, refused = _read(name, Path(data_dir).resolve())
    return list(pairs), len(pairs) + sum(refused.values()), Counter(refused)


@cache
def _read(name: str, data_dir: Path) -> tuple[list[PreferencePair], Counter]:
    module = import_module(f"rmnlhf.sources.{MODULES.get(name, name)}")
    pairs, refused = [], Counter()
    collecting = gc.isenabled()
    gc.disable()  # walking all rows anew as they grow takes as long as reading them
    try:
        for fields in module.fields(data_dir, name):
            try:
                if isinstance(fields, dict):
                    pairs.append(settle(PreferencePair(source=name, **fields)))
                else:
                    refused[fields] += 1
            except ValueError as e:
                refused[str(e).split("': ", 1)[-1]] += 1  # without the id
    finally:
        if collecting:
            gc.enable()
    return pairs, refused
