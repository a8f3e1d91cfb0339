"""Two processes on a CPU (gloo): each takes half of the groups, and together they give the gradient of the whole batch.

The path is the one of training: accelerate's Accelerator, `grpo.Trainer`, trl's token mean over all processes, packs with a
shared prefix. The processes have different numbers of packs, which is where a gradient exchange at each backward pass hangs.
"""

import os
import socket
import sys

import pytest
import torch
import torch.multiprocessing as mp

WORLD = 2
LENGTHS = [(9, [5, 3, 8, 2]), (14, [4, 7, 1, 6]), (11, [2, 9, 5, 3]), (6, [8, 8, 2, 4])]  # prompt, its completions
BUDGET = 40  # tokens: the first process makes other packs than the second


def batch(groups, items: int) -> dict:
    """trl's padded batch of some of the groups; `items`: completion tokens of all processes, by which the token mean divides."""
    rows = [(g, k, prompt, n) for g, (prompt, members) in groups for k, n in enumerate(members)]
    width, depth = max(p for _, _, p, _ in rows), max(n for *_, n in rows)
    out = {k: torch.zeros(len(rows), n, dtype=torch.long) for k, n in (("prompt_ids", width), ("prompt_mask", width), ("completion_ids", depth),
                                                                       ("completion_mask", depth))}  # fmt: skip
    for i, (g, k, prompt, n) in enumerate(rows):
        out["prompt_ids"][i, width - prompt :] = torch.arange(prompt) * 7 + 100 * g + 3
        out["prompt_mask"][i, width - prompt :] = 1
        out["completion_ids"][i, :n] = torch.arange(n) * 11 + 50 * g + 5 * k + 9
        out["completion_mask"][i, :n] = 1
    out["advantages"] = torch.tensor([((g * 4 + k) * 7 % 11 - 5) / 4 for g, k, *_ in rows])
    out["num_items_in_batch"] = torch.tensor(items)
    return out


def trainer(folder):
    import tiny
    from datasets import Dataset

    from rmnlhf import grpo

    settings = tiny.settings(**{"grpo.token_budget": BUDGET, "grpo.prompts": WORLD})
    pairs = tiny.pairs(2)
    rows = [{"prompt": p.id, "pair_id": p.id, "swap": 0} for p in pairs]
    out = grpo.Trainer(
        tiny.model(lora=True), grpo.RewardFunction("outcome", settings, pairs), grpo.arguments(settings, folder, 1), Dataset.from_list(rows),
        processing_class=tiny.tokenizer(), encoded={}, engine=None, run=folder, params=settings, beta=0.04, seed=1,
    )  # fmt: skip
    out.current_gradient_accumulation_steps = 1
    out._prepare_inputs = lambda inputs: inputs
    assert out.packed, "the tiny model does not take the shared-prefix update: this test would test something else"
    return out


def gradient(train, inputs) -> torch.Tensor:
    model = train.accelerator.unwrap_model(train.model)
    model.zero_grad(set_to_none=True)
    train.training_step(train.model, inputs, None)
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])


def process(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
                   "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    sys.path.insert(0, os.path.dirname(__file__))
    torch.set_num_threads(1)
    import tiny
    from accelerate import PartialState
    from accelerate.utils import gather

    from rmnlhf import rollout

    train = trainer(f"{folder}/{rank}")
    state = PartialState()
    assert (state.num_processes, state.process_index, state.backend) == (WORLD, rank, "gloo")
    mine = list(enumerate(LENGTHS))[:3] if rank == 0 else list(enumerate(LENGTHS))[3:]
    tokens = gather(torch.tensor([sum(sum(m) for _, (_, m) in mine)])).sum().item()
    inputs = batch(mine, tokens)
    packs = gather(torch.tensor([len(train.packs(inputs))]))
    found = gradient(train, inputs)
    everyone = gather(found[None])
    with pytest.raises(RuntimeError) as refused:
        rollout.engine(train.model, None, tiny.settings(**{"rollout.engine": "vllm"}))
    torch.save({"gradient": found, "all": everyone, "packs": packs, "tokens": tokens, "refused": str(refused.value)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def launch(what, folder: str, processes: int = WORLD):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(what, args=(port, folder), nprocs=processes, start_method="spawn")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two"))
    launch(process, folder)
    return folder, [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_the_processes_split_the_batch_unevenly(found):
    _, (first, second) = found
    assert first["packs"].tolist() == second["packs"].tolist() and first["packs"][0] != first["packs"][1]
    assert first["tokens"] == second["tokens"] == sum(sum(m) for _, m in LENGTHS)


def test_two_processes_give_the_gradient_of_one(found):
    folder, results = found
    whole = gradient(trainer(f"{folder}/one"), batch(list(enumerate(LENGTHS)), results[0]["tokens"]))
    for got in results[0]["all"]:
        assert whole.norm() > 0 and (got - whole).norm() / whole.norm() < 1e-5


def test_vllm_inside_several_processes_is_refused(found):
    for result in found[1]:
        assert "inside each of 2 processes" in result["refused"] and "rollout.engine: server" in result["refused"]


def train(folder: str):
    """An online arm of the tiny policy; (MetaRM's weights, run folder)."""
    import tiny

    from rmnlhf import grpo, rewards

    grpo.grm.parse_judgement, rewards.process_rewards = tiny.read_anything, tiny.compare_anything
    torch.set_num_threads(1)
    metarm = tiny.Linear()
    run = grpo.train("online", tiny.settings(), splits=tiny.splits(), metarm=metarm, model=(tiny.model(lora=True), tiny.tokenizer()), run=folder)
    return metarm.weights, run


def trained(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
                   "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    sys.path.insert(0, os.path.dirname(__file__))
    torch.save(train(f"{folder}/both")[0], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def alone(rank: int, port: int, folder: str):
    sys.path.insert(0, os.path.dirname(__file__))
    torch.save(train(f"{folder}/one")[0], f"{folder}/one.pt")


def test_two_processes_train_the_policy_that_one_trains(tmp_path):
    """The same rollouts, rewards, losses and weights; MetaRM the same in both; whole checkpoints."""
    from safetensors.torch import load_file

    from rmnlhf import grpo
    from rmnlhf.pairs import read_rows

    launch(trained, str(tmp_path))
    launch(alone, str(tmp_path), 1)
    found = {}
    for name in ("one", "both"):
        run = tmp_path / name
        rows = sorted(read_rows(run / "rollouts.jsonl"), key=lambda r: (r["step"], r["pair_id"], r["swap"], r["text"]))
        found[name] = rows, list(read_rows(run / "metrics.jsonl")), load_file(run / "adapter" / "adapter_model.safetensors")
        assert not list(run.rglob("*.part")) and len(grpo.checkpoints(run)) == grpo.KEPT
    (rows, metrics, weights), (other_rows, other_metrics, other_weights) = found.values()
    for key in ("step", "pair_id", "text"):
        assert [r[key] for r in rows] == [r[key] for r in other_rows]
    for key in ("reward", "metarm", "advantage"):
        assert [r[key] for r in rows] == pytest.approx([r[key] for r in other_rows], abs=1e-5)
    assert [m["reward"] for m in metrics] == pytest.approx([m["reward"] for m in other_metrics], abs=1e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx([m["grad_norm"] for m in other_metrics], rel=1e-3)
    moved = max((weights[n] - tiny_start()[n]).abs().max().item() for n in weights)
    apart = max((weights[n] - other_weights[n]).abs().max().item() for n in weights)
    assert moved > 0 and apart < 0.02 * moved
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", 0, 1))
    assert torch.equal(first, second) and first.abs().sum() > 0
    torch.testing.assert_close(one, first)


def tiny_start() -> dict:
    import tiny
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(tiny.model(lora=True))


def test_a_launcher_that_fails_is_told(tmp_path, monkeypatch):
    import tiny

    from rmnlhf import grpo

    monkeypatch.setenv("RMNLHF_LAUNCH", f"{sys.executable} -c 'raise SystemExit(3)'")
    with pytest.raises(RuntimeError, match="rmnlhf.grpo outcome .* ended with status 3"):
        grpo.train("outcome", tiny.settings(), run=tmp_path / "outcome")


def test_a_launcher_of_two_processes_trains_a_run(tmp_path, monkeypatch):
    """RMNLHF_LAUNCH as a user sets it, from files alone, one step. With torch's launcher: accelerate's would start one process on a CPU."""
    import tiny

    from rmnlhf import grpo, splits
    from rmnlhf.pairs import read_rows

    tiny.model(hidden=32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    settings = tiny.settings(**{"policy.model": tmp_path / "base", "cold_start.enabled": "false", "grpo.steps": 1, "policy.rank": 2})
    splits.save(tiny.splits(), tmp_path / "results" / "splits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logs = tmp_path / "logs"
    monkeypatch.setenv("RMNLHF_LAUNCH", f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node {WORLD} --log-dir {logs} --redirects 3")
    run = grpo.train("outcome", settings)
    (line,) = read_rows(run / "metrics.jsonl")
    assert len(list(logs.rglob("stderr.log"))) == WORLD
    assert line["step"] == 1 and (run / "adapter" / "adapter_model.safetensors").exists()
    assert len(list(read_rows(run / "rollouts.jsonl"))) == settings.grpo.prompts * settings.grpo.group
    assert not (tmp_path / "results" / "runs" / "outcome.params.yaml").exists()
