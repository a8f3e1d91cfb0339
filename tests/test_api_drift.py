"""Every argument that the package hands to unsloth, vllm, trl, transformers and peft exists in the locked version.

Calls are collected from the package, the benches and the notebooks' code cells. What can be imported is inspected; vllm and unsloth, which need a GPU, are checked
against signatures read from the locked wheels (tests/api). Drift fails; nothing is skipped.
"""

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import sys

import pytest

from rmnlhf import ROOT

API = ROOT / "tests" / "api"
sys.path.insert(0, str(API))
import snapshot

SNAPSHOTS = {p: json.loads((API / f"{p}.json").read_text(encoding="utf-8")) for p in snapshot.WANTED}
INSPECTED = ("trl", "transformers", "peft", "accelerate", "torch", "datasets", "sentence_transformers")
FILES = sorted((ROOT / "rmnlhf").rglob("*.py")) + sorted((ROOT / "bench").glob("*.py")) + sorted((ROOT / "notebooks").glob("*.ipynb"))
CLIENT = "trl.generation.vllm_client.VLLMClient"  # `self.client` in a file that imports it
MUST = {"unsloth": {"from_pretrained", "get_peft_model"}, "vllm": {"LLM", "SamplingParams", "generate"}}  # calls that the collector has to see
VLLM_METHODS = {"collective_rpc", "reset_prefix_cache", "sleep", "wake_up", "get_tokenizer", "chat"}
# a keyword argument that a **kwargs passes on: where it must be known in the end
PASSED_ON = {"vllm.LLM": "EngineArgs", "vllm.Worker.reload_weights": "GPUModelRunner.reload_weights"}
HUB = {"revision", "gguf_file", "subfolder", "cache_dir", "token", "local_files_only"}  # from_pretrained hands these on to the hub's loader


def calls():
    """(file:line, dotted name, number of positional arguments, keyword names) of every call on something imported."""
    out = []
    for file in FILES:
        tree = ast.parse(source(file))
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            where = f"{file.relative_to(ROOT)}:{node.lineno}"
            keywords = [k.arg for k in node.keywords if k.arg]
            if name and name.split(".")[0] in names:
                first, _, rest = name.partition(".")
                out.append((where, names[first] + (f".{rest}" if rest else ""), len(node.args), keywords))
            elif isinstance(node.func, ast.Attribute) and re.search(r"(\.llm|_engine)$", ast.unparse(node.func.value)):
                method = node.func.attr
                if method in VLLM_METHODS or (method == "generate" and ast.unparse(node.func.value).endswith(".llm")):
                    out.append((where, f"vllm.LLM.{method}", len(node.args), keywords))
            elif CLIENT in names.values() and name and name.startswith("self.client."):
                out.append((where, CLIENT + name.removeprefix("self.client"), len(node.args), keywords))
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "reload_weights":
                out.append((where, "vllm.Worker.reload_weights", len(node.args), keywords))
    return out


def source(file) -> str:
    """A notebook's code cells, one after the other, or the file; lines are counted in that."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")


def dotted(node) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def foreign(package):
    return [c for c in calls() if c[1].split(".")[0] == package]


def problems(found, keywords, known, takes_any):
    return [] if takes_any else [k for k in keywords if k not in known]


@pytest.mark.parametrize("package", sorted(SNAPSHOTS))
def test_snapshot_is_of_the_locked_version(package):
    assert SNAPSHOTS[package]["version"] == snapshot.locked(package), (
        f"tests/api/{package}.json is of {SNAPSHOTS[package]['version']}, the lock has {snapshot.locked(package)}: "
        f"run `python tests/api/snapshot.py {package}`, then this test"
    )


@pytest.mark.parametrize("package", sorted(SNAPSHOTS))
def test_calls_fit_the_snapshot(package):
    known, used = SNAPSHOTS[package]["signatures"], foreign(package)
    found = {name.rsplit(".", 1)[1] for _, name, _, _ in used}
    assert found >= MUST[package], f"calls of {package} not found: {MUST[package] - found}: the collector is blind"
    wrong = []
    for where, name, positional, keywords in used:
        short = re.sub(rf"^{package}(\.[a-z_]+)*\.(?=[A-Z])", "", name)
        if short == name:  # a module's own function
            short = name.split(".", 1)[1]
        if short not in known:
            wrong.append(f"{where}: {name} is in no snapshot: add it to WANTED in tests/api/snapshot.py")
            continue
        names, takes_any = list(known[short]["names"]), known[short]["any"]
        if takes_any and (further := PASSED_ON.get(name)):
            names, takes_any = names + known[further]["names"], False
        wrong += [f"{where}: {name}({k}=) is unknown in {package} {SNAPSHOTS[package]['version']}" for k in keywords if not takes_any and k not in names]
        if positional > len(known[short]["names"]):
            wrong.append(f"{where}: {name} takes {len(known[short]['names'])} arguments, {positional} are given")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [p for p in INSPECTED if p != "datasets"])
def test_installed_version_is_the_locked_one(package):
    distribution = package.replace("_", "-")
    assert importlib.metadata.version(distribution).split("+")[0] == snapshot.locked(distribution)


def test_calls_fit_what_is_installed():
    wrong, checked = [], set()
    for package in INSPECTED:
        for where, name, positional, keywords in foreign(package):
            target = resolve(name)
            if target is None:
                wrong.append(f"{where}: {name} does not exist")
                continue
            try:
                signature = inspect.signature(target)
            except (TypeError, ValueError):  # written in C
                continue
            known = {n for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            takes_any = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
            if name.startswith(CLIENT + ".") and positional >= len(signature.parameters):  # `self` is one of them
                wrong.append(f"{where}: {name} takes {len(signature.parameters) - 1} arguments, {positional} are given")
            checked |= {(name, k) for k in keywords if k in known}
            wrong += [f"{where}: {name}({k}=) is unknown" for k in keywords if k not in known and not takes_any]
            if takes_any and name.endswith("from_pretrained") and package in ("transformers", "peft"):
                wrong += [f"{where}: {name}({k}=) is unknown" for k in keywords if k not in known | HUB and not known_to_loader(k)]
    assert not wrong, "\n".join(wrong)
    for name, keyword in (("trl.GRPOConfig", "loss_type"), ("trl.SFTConfig", "max_length"), ("peft.LoraConfig", "target_modules"),
                          ("transformers.BitsAndBytesConfig", "bnb_4bit_compute_dtype")):  # fmt: skip
        if any(c[1] == name for c in calls()):
            assert any(n == name for n, _ in checked), f"{name}: no argument was checked ({keyword} was expected)"


def test_notebooks_and_the_client_of_a_vllm_server_are_collected():
    """What 08 builds, and every method of trl's client that rollout.VllmServer calls."""
    found = calls()
    assert {n for w, n, *_ in found if w.startswith("notebooks/08")} >= {"trl.GRPOConfig", "trl.GRPOTrainer"}
    assert {n.rpartition(".")[2] for _, n, *_ in found if n.startswith(CLIENT + ".")} == {
        "init_communicator", "update_named_params", "reset_prefix_cache", "generate",
    }  # fmt: skip


def reads(file, holder, names):
    """{(class, attribute)} that `holder`, a class or function of a file, reads of what vLLM returns; names: expression -> its class."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == holder]
    return {(names[v], n.attr) for n in ast.walk(node) if isinstance(n, ast.Attribute) and (v := ast.unparse(n.value)) in names}


def test_what_is_read_of_vllms_answers_is_there():
    read = reads("rmnlhf/rollout.py", "VllmEngine", {"request": "RequestOutput", "o": "CompletionOutput", "lp[i]": "Logprob"})
    read |= reads("rmnlhf/judge.py", "_ask_vllm", {"out": "RequestOutput", "out.outputs[0]": "CompletionOutput"})
    assert read >= {("RequestOutput", "outputs"), ("RequestOutput", "prompt_token_ids"), ("Logprob", "logprob")} | {
        ("CompletionOutput", a) for a in ("token_ids", "logprobs", "finish_reason", "text")
    }, "the collector is blind"
    known = SNAPSHOTS["vllm"]["signatures"]
    assert not (lost := {f"{c}.{a}" for c, a in read if a not in known[c]["names"]}), lost


def test_vllms_server_has_the_addresses_flags_and_variables_that_are_used():
    """Addresses: of trl's client, as far as it is called. Flags and variables: of the command in the README, and in the code."""
    from trl.generation.vllm_client import VLLMClient

    vllm, used = SNAPSHOTS["vllm"], {n.rpartition(".")[2] for _, n, *_ in calls() if n.startswith(CLIENT + ".")}
    client = "".join(inspect.getsource(getattr(VLLMClient, m)) for m in ("__init__", "check_server", "weight_update", "_start_weight_update", "_finish_weight_update", *used))
    addresses = set(re.findall(r"\{self\.base_url\}(/[\w/]+)", client))
    assert {"/v1/completions", "/update_weights", "/health"} <= addresses and not (lost := addresses - set(vllm["routes"])), lost
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`([^`]*vllm serve [^`]*)`", readme)
    flags = {f.replace("-", "_") for f in re.findall(r" --([\w-]+)", command)}
    assert flags >= {"weight_transfer_config", "logprobs_mode"} and flags <= set(vllm["signatures"]["EngineArgs"]["names"])
    variables = set(re.findall(r"\b(VLLM_\w+)=", command)) | {v for f in FILES for v in re.findall(r'"(VLLM_\w+)"', source(f))}
    assert "VLLM_SERVER_DEV_MODE" in variables and variables <= set(vllm["environment"])


def known_to_loader(keyword: str) -> bool:
    """Whether transformers' model loader reads this one of its **kwargs, or hands it on to the configuration."""
    import transformers.modeling_utils as loader

    if hasattr(loader.PreTrainedConfig, keyword) or keyword in inspect.signature(loader.PreTrainedConfig).parameters:
        return True
    return re.search(rf'kwargs\.pop\("{keyword}"|\b{keyword}\b\s*[:=]', inspect.getsource(loader.PreTrainedModel.from_pretrained)) is not None


def resolve(name: str):
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            target = getattr(target, part, None)
        return target
    return None


def test_overridden_methods_of_trl_are_still_called_with_what_ours_take():
    """Our trainer replaces methods of trl's: each must be there still, with no argument that ours would refuse."""
    from trl import GRPOTrainer

    from rmnlhf import grpo

    inherited = [n for n, f in vars(grpo.Trainer).items() if inspect.isfunction(f) and not n.startswith("__") and hasattr(GRPOTrainer, n)]
    assert {"_generate_single_turn", "_calculate_rewards", "training_step", "_get_per_token_logps_and_entropies", "_save_checkpoint"} <= set(inherited)
    for private in ("_tokenize_prompts", "_generate_and_score_completions", "_compute_loss", "_prepare_inputs"):
        assert hasattr(GRPOTrainer, private), f"trl has no GRPOTrainer.{private} any more: rmnlhf/grpo.py builds on it"
    for name in inherited:
        theirs, ours = (inspect.signature(getattr(c, name)).parameters for c in (GRPOTrainer, grpo.Trainer))
        takes_any = {k: any(p.kind == k for p in ours.values()) for k in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)}
        if all(takes_any.values()):
            continue
        for argument, p in theirs.items():
            if p.kind in takes_any:
                continue
            assert argument in ours or takes_any[inspect.Parameter.VAR_KEYWORD], f"trl passes {argument} to {name}; ours does not take it"
        for argument, p in ours.items():
            if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD:
                assert argument in theirs or any(q.kind == q.VAR_KEYWORD for q in theirs.values()), f"{name}: trl no longer gives {argument}"


def test_the_inputs_our_loss_reads_are_those_trl_makes():
    """Keys of trl's batch that `packs` and `pack_loss` use are still named in the source that makes it."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"):
        assert f'"{key}":' in source, f"trl's batch has no {key} any more"
    assert "ref_per_token_logps" in inspect.getsource(GRPOTrainer._compute_loss)


def test_a_wrong_argument_in_a_notebook_or_of_the_client_would_be_found(tmp_path, monkeypatch):
    cells = ["from trl.generation.vllm_client import VLLMClient\n", "self.client = VLLMClient(no_such=1)\nself.client.generate([], batch=2)\nself.client.close(1)\n"]
    cells.append("self.client.reset_prefix_cache(3)\n")
    book = {"cells": [{"cell_type": "code", "source": [c]} for c in cells] + [{"cell_type": "markdown", "source": ["not (python"]}]}
    (tmp_path / "bad.ipynb").write_text(json.dumps(book))
    monkeypatch.setattr(sys.modules[__name__], "FILES", [tmp_path / "bad.ipynb"])
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError) as wrong:
        test_calls_fit_what_is_installed()
    for told in ("VLLMClient(no_such=)", "generate(batch=)", "VLLMClient.close does not exist", "reset_prefix_cache takes 0 arguments, 1 are given"):
        assert told in str(wrong.value)


def test_a_wrong_argument_would_be_found(tmp_path, monkeypatch):
    """The collector sees calls through imports inside functions, aliases and attributes."""
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from vllm import LLM as L\n    e = L(model='x', no_such=1)\n    self.llm.sleep(depth=2)\n    from trl import GRPOConfig\n    GRPOConfig(no_such=1)\n")
    monkeypatch.setattr(sys.modules[__name__], "FILES", [bad])
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = {name: keywords for _, name, _, keywords in calls()}
    assert found == {"vllm.LLM": ["model", "no_such"], "vllm.LLM.sleep": ["depth"], "trl.GRPOConfig": ["no_such"]}
    with pytest.raises(AssertionError, match="no_such"):
        test_calls_fit_what_is_installed()
    bad.write_text(bad.read_text() + "    from vllm import SamplingParams\n    SamplingParams(n=1)\n    self.llm.generate([])\n")
    with pytest.raises(AssertionError, match=r"LLM\(no_such=\)(.|\n)*sleep\(depth=\)"):
        test_calls_fit_the_snapshot("vllm")
