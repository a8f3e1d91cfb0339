"""One look for all figures: the same colour for an arm everywhere, intervals drawn, files written by rename.

Call seaborn itself for the rest; only what it lacks stands here."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns

_COLOURS = sns.color_palette("colorblind")
ARMS = {
    "outcome": _COLOURS[7], "human": _COLOURS[2], "offline": _COLOURS[1], "online": _COLOURS[0],
    "cold_start": _COLOURS[4], "base": _COLOURS[5],
}  # fmt: skip
_FREE = [c for c in _COLOURS if c not in ARMS.values()]


def style():
    """Set the look of every figure that follows."""
    sns.set_theme(context="notebook", style="whitegrid", palette=_COLOURS)
    plt.rcParams.update({"figure.figsize": (7.5, 4), "figure.constrained_layout.use": True, "legend.frameon": False})


def palette(names) -> dict:
    """Colour of each name: the fixed one of an arm ("online-8" is arm online), else the next free colour of the same palette.

    All are safe for colour-blind readers. After the last free colour come darker shades of them, each round by 0.6."""
    names = list(dict.fromkeys(names))
    others = [n for n in names if str(n).split("-")[0] not in ARMS]
    shade = {n: tuple(x * 0.6 ** (i // len(_FREE)) for x in _FREE[i % len(_FREE)]) for i, n in enumerate(others)}
    return {n: shade.get(n) or ARMS[str(n).split("-")[0]] for n in names}


def intervals(table, x: str, y: str, hue: str | None = None, ax=None, low: str = "low", high: str = "high"):
    """Points `x` with their interval (columns `low`, `high`) per category `y`; one colour and offset per `hue`.

    table: DataFrame, one row per point. Returns the axes. A row whose interval is NaN keeps its point."""
    ax = ax or plt.gca()
    ys, hues = list(dict.fromkeys(table[y])), list(dict.fromkeys(table[hue])) if hue else [None]
    colours = palette(hues) if hue else {None: _COLOURS[0]}
    for j, name in enumerate(hues):
        rows = table[table[hue] == name] if hue else table
        at = [ys.index(v) + (j - (len(hues) - 1) / 2) * 0.7 / len(hues) for v in rows[y]]
        ax.hlines(at, rows[low].astype(float), rows[high].astype(float), color=colours[name], lw=2, alpha=0.6)
        ax.scatter(rows[x].astype(float), at, color=colours[name], s=28, zorder=3, label=name)
    ax.set_yticks(range(len(ys)), ys)
    ax.set_ylim(len(ys) - 0.5, -0.5)  # first row on top
    ax.set_xlabel(x)
    if hue:
        ax.legend(title=hue, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def save(fig, name: str, folder: str | Path = "results/figures") -> Path:
    """Write `fig` to <folder>/<name>.png, the same bytes for the same figure; returns the path."""
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    fig.savefig(part, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    os.replace(part, path)
    return path
