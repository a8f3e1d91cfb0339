"""Signatures of packages that cannot be imported without a GPU, read from the locked wheels' source.

    python tests/api/snapshot.py vllm unsloth      # after the lock has moved; writes tests/api/<package>.json
    python tests/api/snapshot.py --wheels DIR …    # wheels that are here already

Only the files that define what this project calls are unpacked (`WANTED`), and nothing of the package is run. A wheel without
its dependencies is fetched by pip into a temporary folder: vLLM's is half a gigabyte.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE.parents[1] / "requirements" / "constraints.txt"
# what we name in the code -> file in the wheel, what it is called there
WANTED = {
    "vllm": {
        "LLM": ("vllm/entrypoints/llm.py", "LLM.__init__"),
        "LLM.generate": ("vllm/entrypoints/llm.py", "LLM.generate"),
        "LLM.chat": ("vllm/entrypoints/llm.py", "LLM.chat"),
        "LLM.collective_rpc": ("vllm/entrypoints/llm.py", "LLM.collective_rpc"),
        "LLM.reset_prefix_cache": ("vllm/entrypoints/llm.py", "LLM.reset_prefix_cache"),
        "LLM.get_tokenizer": ("vllm/entrypoints/llm.py", "LLM.get_tokenizer"),
        "LLM.sleep": ("vllm/entrypoints/llm.py", "LLM.sleep"),
        "LLM.wake_up": ("vllm/entrypoints/llm.py", "LLM.wake_up"),
        "EngineArgs": ("vllm/engine/arg_utils.py", "EngineArgs"),
        "SamplingParams": ("vllm/sampling_params.py", "SamplingParams"),
        "StructuredOutputsParams": ("vllm/sampling_params.py", "StructuredOutputsParams"),
        "RequestOutput": ("vllm/outputs.py", "RequestOutput.__init__"),
        "CompletionOutput": ("vllm/outputs.py", "CompletionOutput"),
        "Logprob": ("vllm/logprobs.py", "Logprob"),
        "Worker.reload_weights": ("vllm/v1/worker/gpu_worker.py", "Worker.reload_weights"),
        "GPUModelRunner.reload_weights": ("vllm/v1/worker/gpu_model_runner.py", "GPUModelRunner.reload_weights"),
    },
    "unsloth": {
        "FastLanguageModel.from_pretrained": ("unsloth/models/loader.py", "FastLanguageModel.from_pretrained"),
        "FastLanguageModel.get_peft_model": ("unsloth/models/llama.py", "FastLlamaModel.get_peft_model"),
    },
}
SERVERS = {"vllm"}  # of these also the server's addresses
NAMED = {"vllm": ("vllm/envs.py", ["VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_SERVER_DEV_MODE"])}  # environment variables


def locked(package: str) -> str:
    """The package's version in requirements/constraints.txt."""
    found = re.search(rf"^{re.escape(package)}==([^\s;]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise ValueError(f"{package} is not in {LOCK.name}")
    return found[1]


def signature(tree: ast.Module, name: str) -> dict:
    """{names, any}: the arguments of a function, a method or a dataclass-like class; `any` where it takes **kwargs."""
    node = tree
    for part in name.split("."):
        # the last one: overloads come first
        found = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and n.name == part]
        if not found:
            raise LookupError(f"no {name} in this file")
        node = found[-1]
    if isinstance(node, ast.ClassDef):
        fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return {"names": [f for f in fields if not f.startswith("_")], "any": False}
    a = node.args
    return {"names": [x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs] if x.arg not in ("self", "cls")], "any": a.kwarg is not None}


def routes(sources: list[str]) -> list[str]:
    """The addresses that a FastAPI server answers, from its source."""
    return sorted({m[1] for text in sources for m in re.finditer(r'@\w*(?:router|app)\.(?:get|post)\(\s*"(/[^"]*)"', text)})


def snapshot(package: str, wheel: Path) -> dict:
    out = {"package": package, "version": wheel.name.split("-")[1]}
    with zipfile.ZipFile(wheel) as z:
        trees = {file: ast.parse(z.read(file)) for file in {f for f, _ in WANTED[package].values()}}
        out["signatures"] = {k: {"file": f, **signature(trees[f], n)} for k, (f, n) in WANTED[package].items()}
        if package in SERVERS:
            out["routes"] = routes([z.read(f).decode() for f in z.namelist() if f.startswith(f"{package}/entrypoints/") and f.endswith(".py")])
        if package in NAMED:
            file, names = NAMED[package]
            known = set(re.findall(r'^    "(\w+)": ', z.read(file).decode(), re.MULTILINE))
            out["environment"] = [n for n in names if n in known]
    return out


def main():
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("packages", nargs="+", choices=WANTED)
    reader.add_argument("--wheels", type=Path, help="a folder that holds the locked wheels")
    args = reader.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for package in args.packages:
            if not args.wheels:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder]
                subprocess.run([*pip, f"{package}=={locked(package)}"], check=True)
            (wheel,) = Path(args.wheels or folder).glob(f"{package}-{locked(package)}*.whl")
            out = HERE / f"{package}.json"
            out.write_text(json.dumps(snapshot(package, wheel), indent=1) + "\n", encoding="utf-8")
            print(f"{out.name}: {package} {locked(package)}")


if __name__ == "__main__":
    main()
