import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from rmnlhf import plots


def table():
    return pd.DataFrame(
        [("outcome", "x", 0.5, 0.4, 0.6), ("online", "x", 0.7, 0.6, 0.8), ("online", "y", 0.2, float("nan"), float("nan"))],
        columns=["arm", "benchmark", "accuracy", "low", "high"],
    )


def test_an_arm_keeps_its_colour_whatever_stands_beside_it():
    assert plots.palette(["online", "outcome"])["online"] == plots.palette(["human", "x", "online-8"])["online-8"]
    colours = plots.palette(["p", "q", "r", "outcome"])
    assert len(set(colours.values())) == 4


# linear RGB as a dichromat sees it: Machado, Oliveira and Fernandes 2009, severity 1
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def nearest(colours, seen):
    """The least CIELAB distance of two colours, seen with a colour vision deficiency."""
    rgb = np.array(colours)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(SEEN[seen]).T
    xyz = linear.clip(0, 1) @ XYZ.T / XYZ.sum(1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return apart[~np.eye(len(lab), dtype=bool)].min()


@pytest.mark.parametrize("seen", SEEN)
def test_colours_differ_for_a_colour_blind_reader(seen):
    few = plots.palette([*plots.ARMS, "p", "q", "r", "s"])
    assert len(few) == 10 and nearest(list(few.values()), seen) > 10
    many = plots.palette([f"judge {i}" for i in range(8)])
    assert nearest(list(many.values()), seen) > 6


def test_more_names_than_colours_are_still_told_apart_and_keep_the_first_ones():
    names = [f"judge {i}" for i in range(20)]
    colours = plots.palette([*names, "online"])
    assert len(set(colours.values())) == 21 and list(colours) == [*names, "online"]
    assert plots.palette(names[:3]) == {n: colours[n] for n in names[:3]}


def test_intervals_draws_every_row_inside_its_own_interval():
    plots.style()
    fig, ax = plt.subplots()
    plots.intervals(table(), "accuracy", "benchmark", hue="arm", ax=ax)
    points = {c.get_label(): c.get_offsets().data.tolist() for c in ax.collections if not str(c.get_label()).startswith("_")}
    assert [x for x, _ in points["online"]] == [0.7, 0.2] and [x for x, _ in points["outcome"]] == [0.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "y"]
    lines = [seg for c in ax.collections if hasattr(c, "get_segments") for seg in c.get_segments()]
    assert any(abs(s[0][0] - 0.4) < 1e-9 and abs(s[1][0] - 0.6) < 1e-9 for s in lines if len(s))
    plt.close(fig)


def test_save_writes_the_same_bytes_twice_and_leaves_no_part(tmp_path):
    written = []
    for folder in ("a", "b"):
        fig, ax = plt.subplots()
        plots.intervals(table(), "accuracy", "benchmark", ax=ax)
        written.append(plots.save(fig, "f", tmp_path / folder))
        plt.close(fig)
    assert written[0].read_bytes() == written[1].read_bytes() and written[0].read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["f.png"]
