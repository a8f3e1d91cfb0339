import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

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
