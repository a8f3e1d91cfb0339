"""Run one numbered notebook headless, as a DVC stage does: `python -m rmnlhf.notebook 02_core_similarity`.

papermill executes it; the executed copy and its HTML land in results/notebooks/, after a failure too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from . import ROOT

sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's check of IRIs: a second at each start, and no notebook holds one


def run(name: str, params_file: str = "results/params.yaml", out: str | Path = "results/notebooks") -> Path:
    """Execute notebooks/<name>.ipynb from the repository root; returns the HTML file.

    Raises papermill's PapermillExecutionError after the executed copy (with the traceback in it) is written."""
    import nbformat
    import papermill
    from nbconvert import HTMLExporter

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    executed, html = out / f"{name}.ipynb", out / f"{name}.html"
    number = name.split("_")[0]
    for old in [*Path("results/figures").glob(f"{number}_*"), *Path("results/tables").glob(f"{number}_*")]:
        old.unlink()  # of a former run, perhaps of another profile
    shutil.rmtree(Path("results/judgements") / number, ignore_errors=True)
    os.environ |= {"RMNLHF_HEADLESS": "1", "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "20")}  # progress as lines of the log
    start = time.time()
    try:
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb", executed, {"params_file": params_file}, kernel_name="python3",
            cwd=str(ROOT), stdout_file=sys.stdout, stderr_file=sys.stderr, progress_bar=False,
            shutdown_kernel="immediate",  # a graceful end takes apart all that torch imported: 2.5 s
            extra_arguments=["--log-level=40"],  # errors: the kernel is ours and local
        )  # fmt: skip
    finally:
        if executed.exists():
            html.write_text(HTMLExporter().from_notebook_node(_without_progress(nbformat.read(executed, 4)))[0], encoding="utf-8")
    timing = Path("results/timings") / f"{name}.json"
    timing.parent.mkdir(parents=True, exist_ok=True)
    timing.write_text(json.dumps({"notebook": name, "seconds": round(time.time() - start, 1)}) + "\n")
    return html


def _without_progress(notebook):
    """The notebook without progress bars' lines: the log keeps them, between code and table they only stand in the way."""
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            if out.output_type == "stream" and out.name == "stderr":
                out.text = "\n".join(line for line in re.split(r"[\r\n]+", out.text) if line and not re.search(r"\d+%\||it/s\]|s/it\]", line))
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("text", True)]
    return notebook


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("name", help="a notebook's name without .ipynb")
    ap.add_argument("--params", default="results/params.yaml", help="the file that the notebook reads its parameters from")
    args = ap.parse_args()
    os.chdir(ROOT)
    if not (ROOT / "notebooks" / f"{args.name}.ipynb").exists():
        names = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
        sys.exit(f"no notebook {args.name!r}; there are: {', '.join(names)}")
    from papermill.exceptions import PapermillExecutionError

    try:
        html = run(args.name, args.params)
    except PapermillExecutionError as e:
        where = f"results/notebooks/{args.name}.html"
        sys.exit(f"{args.name}: cell {e.cell_index} failed with {e.ename}: {e.evalue}\nThe executed notebook, traceback included: {where}")
    print(f"{args.name}: done, {html}")


if __name__ == "__main__":
    main()
