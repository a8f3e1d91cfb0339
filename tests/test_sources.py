"""Sources: counts that reconcile, texts normalised, labels of the right side; fetching with every kind of trouble."""

import errno
import gzip
import hashlib
import json
import re
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from rmnlhf import sources
from rmnlhf.sources import fetch as fetching
from rmnlhf.sources import helpsteer3, math500, processbench, ukpconvarg


# --- what the sources hold ---------------------------------------------------------------------------------------------
def test_ukpconvarg_counts(data_dir):
    pairs, rows, refused = sources.read("ukpconvarg", data_dir)
    assert (len(pairs), rows, dict(refused)) == (12_792, 16_927, {"tie": 3_289, "no gold label": 846})
    assert all(p.agreeing or p.meta["no_agreeing"] for p in pairs)
    assert sum("reason_codes" in p.meta for p in pairs) == 9_111
    assert {c for p in pairs for c in p.meta.get("reason_codes", [])} == set(ukpconvarg.CODES)
    assert len({p.id for p in pairs}) == len({p.meta["pair_id"] for p in pairs}) == len(pairs)
    assert len({p.group for p in pairs}) == 16  # debates; both stances in one group
    stances = {g: {p.meta["stance"] for p in pairs if p.group == g} for g in {p.group for p in pairs}}
    assert all(len(s) == 2 for s in stances.values())
    assert 0.48 < sum(p.label == "A" for p in pairs) / len(pairs) < 0.52


def test_ukpconvarg_longer_wins(data_dir):
    pairs = sources.load("ukpconvarg", data_dir)
    wins = sum(0.5 if p.longer is None else p.longer == p.label for p in pairs) / len(pairs)
    assert wins == pytest.approx(0.745, abs=0.001)


def test_ukpconvarg_critiques_name_the_sides_of_their_pair(data_dir):
    """Read from the files anew: where a worker says "A1 is better" and chose a1, the text praises the chosen side."""
    pairs = sources.load("ukpconvarg", data_dir)
    said = [c for p in pairs for c in p.agreeing]
    silent = sum(not re.search(r"Response [AB]", c.text) for c in said) / len(said)
    assert silent < 0.10
    assert not any(re.search(r"(?i)\ba[12]\b|\bargument (1|2|one|two)\b", c.text) for c in said)
    better = [(m[1], c.label) for c in said if (m := re.match(r"Response ([AB]) (?:is|was) (?:more|better)", c.text))]
    assert len(better) > 500 and sum(a == b for a, b in better) / len(better) > 0.95


@pytest.mark.parametrize(
    "written, normal",
    [
        ("A1 is better than a2", "Response A is better than Response B"),
        ("a1is well written", "Response A is well written"),
        ("A 2's point, A#1.", "Response B's point, Response A."),
        ("Argument 1 is clear; arguement two isn't", "Response A is clear; Response B isn't"),
        ("Argument A2 rambles, the A1 does not", "Response B rambles, Response A does not"),
        ("the first argument beats the second one", "Response A beats Response B"),
        ("The former is short, the latter has facts", "Response A is short, Response B has facts"),
        ("arg. number two, #1", "Response B, Response A"),
        ("A! explains more", "Response A explains more"),
        ("2 uses facts", "Response B uses facts"),
        ("It gives a point in 2 ways, an argument a child makes", "It gives a point in 2 ways, an argument a child makes"),
        ("one of a kind, A12, 1 reason", "one of a kind, A12, 1 reason"),
        ("first of all, the second reason", "first of all, the second reason"),
    ],
)
def test_ukpconvarg_names(written, normal):
    assert ukpconvarg.normalise(written) == normal


def test_mr_ben(data_dir):
    pairs, rows, refused = sources.read("mr_ben", data_dir)
    assert (len(pairs), rows, sum(refused.values())) == (1_351, 1_351, 0)
    assert len({p.id for p in pairs}) == len(pairs) and len({p.group for p in pairs}) < len(pairs)
    for p in pairs:
        wrong = "B" if p.label == "A" else "A"
        assert p.critiques and all(c.text.startswith(f"Response {wrong} is wrong: ") and c.label == p.label for c in p.critiques)


def test_haluquestqa_and_sample(data_dir):
    assert [len(sources.load(n, data_dir)) for n in ("haluquestqa", "helpsteer3_sample")] == [698, 100]
    sample = sources.load("helpsteer3_sample", data_dir)
    assert all(p.agreeing for p in sample)
    assert not any(re.search(r"@Response|\bRes[pon]+se [12]\b", c.text) for p in sample for c in p.critiques)


def test_diagnosis_rows(data_dir):
    assert len(math500.rows(data_dir)) == 500
    rows = processbench.rows(data_dir)
    assert Counter(r["subset"] for r in rows) == {"gsm8k": 400, "math": 1000, "olympiadbench": 1000, "omnimath": 1000}
    assert all(-1 <= r["label"] < len(r["steps"]) for r in rows)


def hub_folder(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "FETCHED.json").write_text('{"id": "x", "revision": "y"}')
    return tmp_path / name


def helpsteer_row(**change):
    opinion = {"score": -2, "reasoning": "@Response 1 is better than @Response 2, whose list is wrong.", "feedback1": "f", "feedback2": "g"}
    tie = {"score": 0, "reasoning": "Response 1 and response 2 are alike.", "feedback1": "", "feedback2": ""}
    other = {"score": 1, "reasoning": "Resonse 2 is slightly better than Response 1.", "feedback1": "", "feedback2": ""}
    return {
        "domain": "general", "language": "english", "context": [{"role": "user", "content": "q"}], "response1": "one",
        "response2": "two", "overall_preference": -2, "individual_preference": [opinion, tie, other], **change,
    }  # fmt: skip


def test_helpsteer3_layout(tmp_path):
    folder = hub_folder(tmp_path, "helpsteer3")
    (folder / "preference").mkdir()
    train = [helpsteer_row(), helpsteer_row(overall_preference=0), helpsteer_row(overall_preference=3, response1=""),
             helpsteer_row(overall_preference=None), helpsteer_row(overall_preference=1, individual_preference=[])]  # fmt: skip
    with gzip.open(folder / "preference" / "train.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, train)) + "\n")
    with gzip.open(folder / "preference" / "validation.jsonl.gz", "wt") as f:
        f.write(json.dumps(helpsteer_row(context=[{"role": "user", "content": "other"}])) + "\n")
    pairs, rows, refused = sources.read("helpsteer3", tmp_path)
    assert rows == 6 and len(pairs) == 3
    assert sum(refused.values()) == 3 and refused["tie"] == refused["no preference"] == refused["response_a is empty"] == 1
    assert [p.meta["split"] for p in pairs] == ["train", "train", "validation"]
    assert pairs[0].group == pairs[1].group != pairs[2].group
    for p in (pairs[0], pairs[2]):
        chosen = p.response_a if p.label == "A" else p.response_b
        wrong = "B" if p.label == "A" else "A"
        assert chosen == "one" and len(p.critiques) == 3
        assert [c.label for c in p.critiques] == [p.label, None, wrong]
        assert p.critiques[0].text == f"Response {p.label} is better than Response {wrong}, whose list is wrong."
        assert p.critiques[2].text == f"Response {wrong} is slightly better than Response {p.label}."
    assert pairs[1].critiques == [] and {pairs[1].response_a, pairs[1].response_b} == {"one", "two"}


def test_helpsteer3_text_decides_where_no_score_is_given():
    opinion = {"score": None, "reasoning": "Response B is much better than Response A."}
    assert helpsteer3._critique(0, opinion, "A").label == "B"
    assert helpsteer3._critique(0, {"score": None, "reasoning": "Short and clear."}, "A").label == "A"
    assert helpsteer3._critique(0, {"score": None, "reasoning": " "}, "A") is None


def test_tulu3_layout(tmp_path):
    from pyarrow import Table, parquet

    def said(*texts):
        return [{"content": t, "role": r} for t, r in zip(texts, ("user", "assistant"))]

    rows = [
        {"id": "a", "prompt": "Do it in 3 words.", "constraints": ["3 words"], "chosen": said("Do it in 3 words.", "so it is"),
         "rejected": said("Do it in 3 words.", "no"), "chonsen_model": "m", "rejected_model": "n"},
        {"id": "b", "prompt": "p", "constraints": [], "chosen": said("p", "same"), "rejected": said("p", "same"),
         "chonsen_model": "m", "rejected_model": "n"},
        {"id": "c", "prompt": "p", "constraints": [], "chosen": [], "rejected": said("p", "x"), "chonsen_model": "", "rejected_model": ""},
    ]  # fmt: skip
    folder = hub_folder(tmp_path, "tulu3_if") / "data"
    folder.mkdir()
    parquet.write_table(Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    pairs, count, refused = sources.read("tulu3_if", tmp_path)
    assert count == 3 and dict(refused) == {"both responses are the same": 1, "a response is missing": 1}
    (p,) = pairs
    assert (p.response_a if p.label == "A" else p.response_b) == "so it is"
    assert p.context == [{"role": "user", "content": "Do it in 3 words."}] and not p.critiques and p.meta["constraints"] == ["3 words"]


def test_names_and_absence(tmp_path):
    assert sources.names() == ["ukpconvarg", "mr_ben", "haluquestqa", "helpsteer3", "helpsteer3_sample", "tulu3_if", "controlled"]
    for name in [*sources.PAIRS, *sources.ROWS]:
        assert sources.licence(name)
        assert sources.available(name, tmp_path) is (name == "controlled")
    with pytest.raises(FileNotFoundError, match="make data"):
        sources.load("ukpconvarg", tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m rmnlhf.sources helpsteer3"):
        sources.load("helpsteer3", tmp_path)
    with pytest.raises(KeyError, match="unknown source 'nope'"):
        sources.path("nope")
    with pytest.raises(KeyError, match="no pairs in 'math500'"):
        sources.load("math500")


def test_manifest_is_pinned():
    for folder, entry in sources.manifest().items():
        assert entry["licence"] and entry["files"]
        for f in entry["files"]:
            assert re.fullmatch(r"[0-9a-f]{64}", f["sha256"]) and f["bytes"] > 0 and ".." not in f["path"]
            if folder != "helpsteer3_sample":
                url = fetching._address(folder, f)
                assert re.match(rf"https://raw\.githubusercontent\.com/[^/]+/[^/]+/{entry['commit']}/\S+$", url)
    assert all(re.fullmatch(r"[0-9a-f]{40}", h["revision"]) for h in sources.HUB.values())


# --- fetch -------------------------------------------------------------------------------------------------------------
CONTENT = {"one/a.txt": b"alpha" * 50_000, "one/b.txt": b"beta", "two/c.txt": b"gamma" * 10}


@pytest.fixture
def small(monkeypatch):
    """A registry of two small sources."""
    entries = {}
    for file, content in CONTENT.items():
        entry = entries.setdefault(file.split("/")[0], {"upstream": "https://github.com/o/r", "commit": "c" * 40, "licence": "x", "files": []})
        digest = hashlib.sha256(content).hexdigest()
        entry["files"].append({"path": file, "upstream_path": file, "bytes": len(content), "sha256": digest})
    monkeypatch.setattr(sources, "manifest", lambda: entries)
    monkeypatch.setattr(sources, "PAIRS", {"one": ["one"], "two": ["two"]})
    monkeypatch.setattr(sources, "ROWS", [])
    monkeypatch.setenv("RMNLHF_MIRROR", "/nowhere/at/all")
    return entries


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    for file, content in CONTENT.items():
        (tmp_path / "mirror" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / file).write_bytes(content)
    monkeypatch.setenv("RMNLHF_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


@pytest.fixture
def upstream(monkeypatch):
    """A server of CONTENT that knows ranges; `asked` lists (path, Range header)."""
    asked, ranges, cut = [], [True], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.lstrip("/")
            asked.append((path, self.headers.get("Range")))
            if path not in CONTENT:
                return self.send_error(404)
            start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and ranges[0] else 0
            body = CONTENT[path][start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if path in cut else body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetching, "_address", lambda folder, f: f"http://127.0.0.1:{server.server_port}/{f['upstream_path']}")
    server.asked, server.ranges, server.cut = asked, ranges, cut
    yield server
    server.shutdown()


def complete(folder):
    return {f: (folder / f).read_bytes() == c for f, c in CONTENT.items() if (folder / f).exists()}


def test_fetch_from_a_mirror(small, mirror, tmp_path):
    assert fetching.fetch(data_dir=tmp_path / "data") == {"one": None, "two": None}
    assert complete(tmp_path / "data") == dict.fromkeys(CONTENT, True) and not list(tmp_path.rglob("*.part"))
    assert sources.available("one", tmp_path / "data")


def test_fetch_from_upstream_and_not_twice(small, upstream, tmp_path):
    assert fetching.fetch(data_dir=tmp_path) == {"one": None, "two": None}
    assert complete(tmp_path) == dict.fromkeys(CONTENT, True) and len(upstream.asked) == 3
    fetching.fetch(data_dir=tmp_path)
    assert len(upstream.asked) == 3
    (tmp_path / "one/b.txt").write_bytes(b"bet!")  # same size, other content: noticed and fetched again
    assert fetching.fetch(data_dir=tmp_path)["one"] is None and upstream.asked[3:] == [("one/b.txt", None)]


def test_a_cut_download_goes_on_where_it_stopped(small, upstream, tmp_path):
    upstream.cut.append("one/a.txt")
    result = fetching.fetch(["one"], tmp_path)
    assert isinstance(result["one"], fetching.UnreachableError) and not (tmp_path / "one/a.txt").exists()
    have = (tmp_path / "one/a.txt.part").stat().st_size
    assert 0 < have < len(CONTENT["one/a.txt"])
    upstream.cut.clear()
    assert fetching.fetch(["one"], tmp_path)["one"] is None
    assert ("one/a.txt", f"bytes={have}-") in upstream.asked and complete(tmp_path)["one/a.txt"]


def test_a_server_without_ranges_sends_it_all_again(small, upstream, tmp_path):
    upstream.ranges[0] = False
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.txt.part").write_bytes(b"stale")
    assert fetching.fetch(["one"], tmp_path)["one"] is None and complete(tmp_path)["one/a.txt"]


def test_wrong_checksum_is_not_kept(small, mirror, tmp_path, capsys):
    (mirror / "one/b.txt").write_bytes(b"evil")
    assert fetching.main(["--data-dir", str(tmp_path / "data")]) == 1
    out = capsys.readouterr().out
    assert "wrong checksum" in out and "b.txt" in out and re.search(r"two\s+ok", out)
    assert not (tmp_path / "data/one/b.txt").exists() and not list(tmp_path.rglob("*.part"))


def test_missing_file(small, upstream, tmp_path):
    small["two"]["files"][0]["upstream_path"] = "two/gone.txt"
    result = fetching.fetch(data_dir=tmp_path)
    assert isinstance(result["two"], fetching.MissingFileError) and "404" in str(result["two"]) and result["one"] is None


def test_full_disk(small, mirror, tmp_path, monkeypatch, capsys):
    def full(src, dst):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert fetching.main(["--data-dir", str(tmp_path / "data")]) == 1
    out = capsys.readouterr().out
    assert "a.txt: no space left on the disk; free 250,000 bytes" in out and "NO DATA" not in out


def test_unreachable_is_asked_once_and_loud(small, tmp_path, monkeypatch, capsys):
    calls = []

    def get(url, **_):
        calls.append(url)
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", get)
    assert fetching.main(["--data-dir", str(tmp_path)]) == 0  # everything still runs, on `controlled`
    out = capsys.readouterr().out
    assert fetching.main(["one", "--data-dir", str(tmp_path)]) == 1  # what is asked for by name must be there
    calls.pop()
    assert len(calls) == 1 and "raw.githubusercontent.com does not answer" in out and "RMNLHF_MIRROR" in out
    assert [line for line in out.splitlines() if line.startswith("NO DATA")] == [
        "NO DATA: neither a mirror nor an upstream gave anything; everything runs on the generated pairs `controlled`."
    ]


def test_a_mirror_lacking_a_file_is_completed_from_upstream(small, mirror, upstream, tmp_path):
    (mirror / "two/c.txt").unlink()
    assert fetching.fetch(data_dir=tmp_path / "data") == {"one": None, "two": None}
    assert [path for path, _ in upstream.asked] == ["two/c.txt"]


def test_what_is_in_no_upstream_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("RMNLHF_MIRROR", str(tmp_path / "none"))
    error = fetching.fetch(["helpsteer3_sample"], tmp_path)["helpsteer3_sample"]
    assert isinstance(error, fetching.MissingFileError) and "only in a mirror" in str(error)


def test_unknown_source_is_refused():
    with pytest.raises(KeyError, match="unknown source 'x'"):
        fetching.main(["x"])


def test_hub_without_network_is_one_clear_error(tmp_path):
    error = fetching.fetch(["tulu3_if"], tmp_path)["tulu3_if"]  # the tests run with the hub switched off
    assert isinstance(error, fetching.UnreachableError) and "allenai/tulu-3-pref-personas-instruction-following" in str(error)
    assert not sources.available("tulu3_if", tmp_path)


@pytest.mark.parametrize("name", list(sources.HUB))
def test_a_hub_dataset_comes_at_its_pinned_commit_or_is_not_marked_as_there(name, tmp_path, monkeypatch):
    spec, asked = sources.HUB[name], []

    class Api:
        trouble = None

        def dataset_info(self, repo, revision, timeout):
            if self.trouble:
                raise self.trouble
            asked.append((repo, revision))
            return type("Info", (), {"sha": revision})

    def snapshot(repo, *, repo_type, revision, local_dir, allow_patterns):
        asked.append((repo, revision, repo_type, *allow_patterns))
        local_dir.mkdir(parents=True)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for trouble, error in ((RuntimeError("offline"), fetching.UnreachableError), (OSError(errno.ENOSPC, "full"), fetching.DiskFullError)):
        Api.trouble = trouble
        found = fetching.fetch([name], tmp_path)[name]
        assert isinstance(found, error) and not asked and not (tmp_path / name / "FETCHED.json").exists()
    Api.trouble = None
    assert fetching.fetch([name], tmp_path) == {name: None}
    assert asked == [(spec["id"], spec["revision"]), (spec["id"], spec["revision"], "dataset", spec["files"])]
    assert json.loads((tmp_path / name / "FETCHED.json").read_text()) == {"id": spec["id"], "revision": spec["revision"]}
    assert fetching.fetch([name], tmp_path) == {name: None} and len(asked) == 2
