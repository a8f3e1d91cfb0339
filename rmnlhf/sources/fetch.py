"""Fill data/ from a mirror folder or from the upstreams, file by file, with sha256; what `make data` runs.

Mirror: the folder in RMNLHF_MIRROR, else ../shared/data where that exists. Without one, files come from the upstream's
raw address at the pinned commit. Files are written by rename, downloads resume, an upstream that does not answer is
asked once. Each trouble has its own error; one source in trouble does not stop the others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
from tqdm.auto import tqdm

from rmnlhf import ROOT, sources

CONNECT_SECONDS, READ_SECONDS = 4, 60


class FetchError(RuntimeError):
    """A file that could not be fetched; the message says which, why and what to do."""


class ChecksumError(FetchError):
    pass


class MissingFileError(FetchError):
    pass


class DiskFullError(FetchError):
    pass


class UnreachableError(FetchError):
    pass


def mirror() -> Path | None:
    folder = Path(os.environ.get("RMNLHF_MIRROR") or ROOT / ".." / "shared" / "data")
    return folder if folder.is_dir() else None


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(names=None, data_dir: str | Path = "data") -> dict[str, FetchError | None]:
    """Fetch `names` (default: all in the manifest). Returns {source: None if complete, else its first error}."""
    names = list(names or [n for n in [*sources.PAIRS, *sources.ROWS] if n not in sources.HUB and sources.folders(n)])
    Path(data_dir).mkdir(parents=True, exist_ok=True)  # a folder for the pipeline to look at, even where nothing answers
    jobs = [
        (n, folder, f)
        for n in names
        for folder in sources.folders(n)
        for f in sources.manifest().get(folder, {}).get("files", [])
    ]
    down: set[str] = set()  # hosts that did not answer: asked once, not once per file
    result: dict[str, FetchError | None] = dict.fromkeys(names)
    with tqdm(total=sum(f["bytes"] for *_, f in jobs), unit="B", unit_scale=True, desc="data", leave=False) as bar:
        for name, folder, f in jobs:
            bar.set_postfix_str(name, refresh=False)
            try:
                _one(folder, f, Path(data_dir), down, bar)
            except FetchError as e:
                result[name] = result[name] or e
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                what = f"no space left on the disk; free {f['bytes']:,} bytes and run `make data` again"
                result[name] = result[name] or DiskFullError(f"{Path(data_dir, f['path'])}: {what}")
    for name in names:
        if name in sources.HUB:
            try:
                _hub(name, Path(data_dir))
            except FetchError as e:
                result[name] = e
    return result


def _one(folder: str, f: dict, data_dir: Path, down: set[str], bar) -> None:
    file = data_dir / f["path"]
    if file.exists() and file.stat().st_size == f["bytes"] and sha256(file) == f["sha256"]:
        bar.update(f["bytes"])
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    copy = mirror() and mirror() / f["path"]
    if copy and copy.exists():
        shutil.copyfile(copy, part)
        bar.update(f["bytes"])
        origin = str(copy)
    else:
        origin = _address(folder, f)
        _download(origin, part, f["bytes"], down, bar)
    if (found := sha256(part)) != f["sha256"]:
        part.unlink()
        raise ChecksumError(
            f"{origin}: wrong checksum, expected {f['sha256'][:16]}…, found {found[:16]}…; it is not the file that was "
            f"pinned (cut off, or changed) and was not kept: run `make data` again"
        )
    os.replace(part, file)


def _address(folder: str, f: dict) -> str:
    entry = sources.manifest()[folder]
    if "upstream_path" not in f or not entry["commit"]:
        raise MissingFileError(
            f"{f['path']}: in no upstream, only in a mirror; set RMNLHF_MIRROR to a folder that has it"
        )
    owner_repo = entry["upstream"].removeprefix("https://github.com/")
    return f"https://raw.githubusercontent.com/{owner_repo}/{entry['commit']}/{quote(f['upstream_path'])}"


def _download(url: str, part: Path, size: int, down: set[str], bar) -> None:
    """GET `url` into `part`, going on from what is there. Raises UnreachableError or MissingFileError."""
    host = urlsplit(url).netloc
    if host in down:
        raise UnreachableError(f"{host} does not answer")
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        part.unlink(missing_ok=True)
        have = 0
    try:
        with requests.get(url, headers={"Range": f"bytes={have}-"} if have else {}, stream=True,
                          timeout=(CONNECT_SECONDS, READ_SECONDS)) as r:  # fmt: skip
            if r.status_code in (404, 410):
                raise MissingFileError(
                    f"{url}: not there (HTTP {r.status_code}); the upstream moved it: use a mirror (RMNLHF_MIRROR)"
                )
            if r.status_code not in (200, 206):
                raise UnreachableError(f"{url}: HTTP {r.status_code}; try again later or use a mirror (RMNLHF_MIRROR)")
            resumed = have and r.status_code == 206  # 200: the server sends it all again
            with part.open("ab" if resumed else "wb") as out:
                bar.update(have if resumed else 0)
                for chunk in r.iter_content(1 << 16):
                    out.write(chunk)
                    bar.update(len(chunk))
    except requests.RequestException as e:
        down.add(host)
        raise UnreachableError(
            f"{host} does not answer ({type(e).__name__}); check the network, or set RMNLHF_MIRROR to a folder with the "
            f"files. What was loaded stays: the next `make data` goes on from there"
        ) from e


def _hub(name: str, data_dir: Path) -> None:
    """Fetch a hub dataset into data/<name>, at its pinned revision."""
    from huggingface_hub import HfApi, snapshot_download

    spec, done = sources.HUB[name], data_dir / name / "FETCHED.json"
    if done.exists():
        return
    try:
        sha = HfApi().dataset_info(spec["id"], revision=spec["revision"], timeout=CONNECT_SECONDS).sha  # does the hub answer?
        snapshot_download(
            spec["id"], repo_type="dataset", revision=sha, local_dir=data_dir / name, allow_patterns=[spec["files"]]
        )
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise DiskFullError(f"{data_dir / name}: no space left on the disk") from e
        raise UnreachableError(f"hub dataset {spec['id']}: {type(e).__name__}: {e}") from e
    except Exception as e:  # the hub's client raises its own and its HTTP library's types
        raise UnreachableError(f"hub dataset {spec['id']}: {type(e).__name__}: {e}") from e
    done.write_text(json.dumps({"id": spec["id"], "revision": sha}) + "\n")


def main(argv=None) -> int:
    """Fetch the named sources (default: all but the hub's). Exit 1 for a wrong checksum or a full disk, 0 otherwise:
    without data everything still runs, on the generated pairs."""
    import argparse

    ap = argparse.ArgumentParser(description="Fetch the data sources, checked and resumable.")
    ap.add_argument(
        "names", nargs="*", metavar="name", help="sources; default: all except the hub's: " + ", ".join(sources.HUB)
    )
    ap.add_argument("--data-dir", default="data")
    args = ap.parse_args(argv)
    for name in args.names:
        sources.folders(name)
    result = fetch(args.names, args.data_dir)
    for name, error in result.items():
        print(f"{name:20} {'ok' if error is None else f'NOT FETCHED: {error}'}")
    broken = any(isinstance(e, (ChecksumError, DiskFullError)) for e in result.values())
    if not broken and all(result.values()):
        print("NO DATA: neither a mirror nor an upstream gave anything; everything runs on the generated pairs `controlled`.")
    return int(broken or bool(args.names) and any(result.values()))  # what was asked for by name must be there
