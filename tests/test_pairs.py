"""Rows in and out: nothing crashes a read, nothing is dropped without being counted, a swap turns everything."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmnlhf import pairs
from rmnlhf.pairs import HumanCritique, PreferencePair, fingerprint, read_jsonl, settle, swap_sides, write_jsonl


def row(i=0, **change):
    good = {
        "id": f"r{i}", "source": "own", "group": f"g{i}", "context": [{"role": "user", "content": "Why is the sky blue?"}],
        "response_a": f"Rayleigh scattering, case {i}.", "response_b": "It mirrors the sea.", "label": "A",
        "critiques": [{"annotator": "x", "label": "A", "text": "Response A names the cause."}], "meta": {"n": i},
    }  # fmt: skip
    return {**good, **change}


def write(path, lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def test_round_trip(tmp_path):
    rows = [PreferencePair.from_dict(row(i)) for i in range(5)]
    assert read_jsonl(write_jsonl(tmp_path / "deep" / "x.jsonl", rows)).pairs == rows
    assert not list(tmp_path.rglob("*.part"))


BAD = {
    "missing field": [{k: v for k, v in row(1).items() if k != "response_b"}, {"id": "only"}],
    "unknown field": [row(2, answer="?")],
    "tie or unknown label": [row(3, label="tie"), row(4, label=None), row(5, label=1), row(6, label=["A"])],
    "empty response": [row(7, response_a=""), row(8, response_b=" \n ")],
    "equal responses": [row(9, response_b=row(9)["response_a"])],
    "empty context": [row(10, context=[])],
    "malformed critique": [row(14, critiques=[{"label": "A"}]), row(15, critiques=[{"text": "x", "label": "C"}]), row(16, critiques=[3]), row(20, critiques="bare")],
    "malformed": [
        row(11, context=[{"role": "user"}]), row(12, response_a=None), [1, 2], "text", 3, None, row(13, context="hi"),
        row(18, meta=[1]), row(id=None), row(id=[]),
    ],
    "not UTF-8": [b'{"id": "\xff\xfe"}', json.dumps(row(17)).encode("utf-16"), row(19, response_a="half \ud800 of a sign")],
    "not JSON": [b"{nonsense", b"[" * 100_000, b"9" * 5000],
}  # fmt: skip


def test_each_bad_row_is_counted_under_its_reason(tmp_path):
    lines = [x for kind in BAD.values() for x in kind]
    good = [row(100), row(101, critiques=["a bare text"]), row(102, critiques=None)]
    read = read_jsonl(write(tmp_path / "x.jsonl", [good[0], *lines, b"", b"   ", *good[1:]]))
    expected = {kind: len(rows) for kind, rows in BAD.items()}
    assert {k: read.refused[k] for k in expected} == expected
    assert [p.id for p in read.pairs] == ["r100", "r101", "r102"]
    assert read.lines == len(read.pairs) + sum(read.refused.values())
    assert set(read.examples) == set(read.refused)
    assert all(f"{tmp_path / 'x.jsonl'}:" in text for text in read.examples.values())


def test_half_written_last_line_and_duplicate_ids(tmp_path):
    path = tmp_path / "x.jsonl"
    text = "\n".join(json.dumps(r) for r in [row(1), row(1, response_a="another"), row(2), row(3)])
    path.write_text(text[:-20])
    read = read_jsonl(path)
    assert [p.id for p in read.pairs] == ["r1", "r2"] and read.pairs[0].response_a == row(1)["response_a"]
    assert dict(read.refused) == {"duplicate id": 1, "half-written last line": 1} and read.lines == 4


def test_annotators_who_disagree_are_kept_and_no_reference(tmp_path):
    said = [{"annotator": a, "label": v, "text": f"by {a}"} for a, v in (("1", "A"), ("2", "B"), ("3", None))]
    (pair,) = read_jsonl(write(tmp_path / "x.jsonl", [row(critiques=said)])).pairs
    assert len(pair.critiques) == 3 and [c.annotator for c in pair.agreeing] == ["1"]


def test_byte_order_mark_crlf_and_odd_newlines(tmp_path):
    path = tmp_path / "x.jsonl"
    odd = row(2, response_a="one\u2028two\x85three")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(1)).encode() + b"\r\n" + json.dumps(odd, ensure_ascii=False).encode() + b"\r\n")
    assert [p.response_a for p in read_jsonl(path).pairs] == [row(1)["response_a"], odd["response_a"]]


def test_no_file_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="JSON Lines of PreferencePair"):
        read_jsonl(tmp_path / "none.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*row(), "text", "role"]), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()) | st.tuples(
    st.sampled_from([*row()]), json_values).map(lambda kv: json.dumps(row(0, **{kv[0]: kv[1]})).encode()), max_size=6))  # fmt: skip
def test_any_bytes_reconcile(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    read = read_jsonl(path)
    assert len(read.pairs) + sum(read.refused.values()) == read.lines
    assert all(pairs.refusal(p) is None for p in read.pairs)
    write_jsonl(path, read.pairs)
    assert len(read_jsonl(path).pairs) == len(read.pairs)


@pytest.mark.parametrize(
    "text, turned",
    [
        ("Response A beats Response B.", "Response B beats Response A."),
        ("Responses A and B are long; response A's end is odd.", "Responses B and A are long; response B's end is odd."),
        ("Response A or B?", "Response B or A?"),
        ("Response Apple, Plan B, vitamin A and B", "Response Apple, Plan B, vitamin A and B"),
    ],
)
def test_swap_sides(text, turned):
    assert swap_sides(text) == turned and swap_sides(turned) == text


def test_swapped_turns_labels_critiques_and_meta():
    core = [{"text": "Response B errs.", "side": "B", "polarity": -1}]
    pair = PreferencePair.from_dict(row(meta={"core": core, "note": "kept"}))
    turned = pair.swapped()
    assert (turned.label, turned.response_a, turned.critiques[0].label) == ("B", pair.response_b, "B")
    assert turned.critiques[0].text == "Response B names the cause."
    assert turned.meta == {"core": [{"text": "Response A errs.", "side": "A", "polarity": -1}], "note": "kept"}
    assert turned.swapped() == pair and pair.longer == "A" and turned.longer == "B"


def test_side_and_order_depend_on_the_id_alone():
    assert fingerprint("a", 1) == fingerprint("a", "1") != fingerprint("a1", "")
    sides = [settle(PreferencePair.from_dict(row(i))).label for i in range(400)]
    assert sides == [settle(PreferencePair.from_dict(row(i))).label for i in range(400)]
    assert 160 < sides.count("A") < 240


def test_a_pair_that_is_none_is_refused_with_its_id():
    with pytest.raises(ValueError, match=r"pair 'x': response_b is empty"):
        PreferencePair("x", "own", "g", [{"role": "user", "content": "q"}], "a", "", "A", [HumanCritique("1", "A", "t")])


def test_a_blank_critique_is_kept_and_no_reference(tmp_path):
    critiques = ["", {"annotator": "x", "label": "A", "text": " \n"}, {"annotator": "y", "label": "A", "text": "Response A says why."}]
    (found,) = read_jsonl(write(tmp_path / "own.jsonl", [row(critiques=critiques)])).pairs
    assert len(found.critiques) == 3 and [c.annotator for c in found.agreeing] == ["y"]


def test_a_group_may_be_the_number_zero_and_meta_may_hold_a_side_without_a_text(tmp_path):
    lines = [row(i, group=0, meta={"core": [{"side": "A", "text": None}, {"side": "B", "text": "Response B errs."}]}) for i in range(2)]
    found = read_jsonl(write(tmp_path / "own.jsonl", lines)).pairs
    assert {p.group for p in found} == {"0"}
    assert found[0].swapped().meta["core"] == [{"side": "B", "text": None}, {"side": "A", "text": "Response A errs."}]
