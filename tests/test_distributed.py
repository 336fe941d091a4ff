"""Two real processes under torchrun against one: gradients, training continued by another number, and the command."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest
import timm
import torch
from conftest import DIGITS, Forked, call, one_of_each
from opened import open_data
from safetensors.torch import load_file, save_file

from poolshare.search.config import SearchConfig
from poolshare.search.job import job
from poolshare.search.job.job import run_job
from poolshare.space import SearchSpace
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import load_tensors
from poolshare.supernet.training.loop import train_model, train_supernet
from poolshare.supernet.training.recipe import Recipe

SPACE = SearchSpace(depth=3, levels=(64, 16, 4), operators=("max2d_conv",))  # one that learns
RECIPES = {
    "within": Recipe(epochs=3, batch_size=128, within=0.6),
    "plain": Recipe(epochs=1, batch_size=256, clip_grad=None),
    "mixed in parts": Recipe(epochs=1, batch_size=256, clip_grad=None, mixup=0.8, cutmix=1.0, accumulate=3),
    "averaged": Recipe(epochs=3, batch_size=128, ema=0.9),
}


class Stopped(Exception):
    pass


def make_net(seed):
    torch.manual_seed(seed)
    return SuperNet.from_timm("digits_vit", SPACE, depth=3, embed_dim=16, num_heads=2, mlp_ratio=1.0)


def gradients(name, data, seed):
    """Of the first step of a supernet."""
    net, found = make_net(seed), {}

    def take(step, loss):
        found.update({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        found["loss"] = torch.tensor(loss)
        raise Stopped

    with pytest.raises(Stopped):
        train_supernet(net, data, measure_macs(net), RECIPES[name], seed=3, progress=take)
    return found


def train(data, seed, state=None, stop_at=None):
    net, losses = make_net(seed), []

    def progress(step, loss):
        losses.append(loss)
        if step == stop_at:
            raise Stopped

    with contextlib.suppress(Stopped):
        train_supernet(
            net, data, measure_macs(net), RECIPES["averaged"], seed=3, state=state, save_seconds=0, progress=progress
        )
    return net, losses


def digits():
    return open_data("digits", img_size=8, in_chans=1, mean=(0.5,), std=(0.5,))


def in_each_process(folder):
    """With the environment that torchrun sets. The second process begins with other weights: the first one's count."""
    data = digits()
    with distributed.joined(torch.device("cpu")):
        rank = distributed.rank()
        for name in ("plain", "mixed in parts", "within"):
            save_file(gradients(name, data, seed=rank), folder / f"{name}-{rank}.safetensors")
        train(data, rank, folder / "stopped.safetensors" if rank == 0 else None, stop_at=5)
        state = folder / "state.safetensors" if rank == 0 else None
        if rank == 0:
            shutil.copy(folder / "stopped.safetensors", state)
        net, _ = train(data, 50 + rank, state)
        model = make_net(rank)
        train_model(model, data.full, Recipe(epochs=1, batch_size=256, drop_path=0.3), seed=3)
        save_file(net.state_dict() | {"alone": model.head.weight.data.clone()}, folder / f"end-{rank}.safetensors")


def torchrun(*words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=300, check=False, **options
    )


def environments(count=2):
    """What torchrun tells each of so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    told |= {"TORCHELASTIC_RUN_ID": "none"}
    return [told | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def in_two_processes(act, folder):
    """What torchrun does, without its imports."""
    both = [Forked(act, folder, **told) for told in environments()]
    for status, _, err in [process.wait() for process in both]:
        assert status == 0, err


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    in_two_processes(in_each_process, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed():
    """The supernet and its losses that one process trains, without a stop."""
    return train(digits(), seed=0)


@pytest.mark.parametrize("name", ["plain", "mixed in parts", "within"])
def test_two_processes_give_the_gradients_of_one(name, together):
    alone = gradients(name, digits(), seed=0)
    first, second = (load_file(together / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert alone.keys() == first.keys() == second.keys()
    assert any("poolings" in key for key in alone)
    for key, gradient in alone.items():
        torch.testing.assert_close(first[key], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[key], second[key]), key


def test_both_processes_end_with_the_same_weights(together, undisturbed):
    first, second = (load_file(together / f"end-{rank}.safetensors") for rank in (0, 1))
    # Their own, and the moving averages that they continued.
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    del first["alone"]
    assert load_tensors(together / "state.safetensors")[1]["step"] == 3 * 7
    for name, value in undisturbed[0].state_dict().items():
        assert (first[name] - value).norm() < 0.02 * value.norm() + 1e-2, name


def test_training_continues_with_another_number_of_processes(together, undisturbed, tmp_path):
    """Two processes stopped after 5 steps, one goes on: its losses are those of one process from the start."""
    assert load_tensors(together / "stopped.safetensors")[1]["step"] == 5
    shutil.copy(together / "stopped.safetensors", tmp_path)
    losses = undisturbed[1]
    _, continued = train(digits(), seed=9, state=tmp_path / "stopped.safetensors")
    assert len(continued) == 1 + len(losses) - 5  # the first call tells how many steps are done
    torch.testing.assert_close(continued[1:], losses[5:], rtol=2e-3, atol=2e-3)


def search_from_weights(folder):
    """A search from pretrained weights; what each process has after it trained the supernet lies in the folder."""
    rank, train_there = distributed.rank(), job.train_supernet

    def train_and_show(supernet, *args, teacher, **options):
        train_there(supernet, *args, teacher=teacher, **options)
        names = {f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()}
        save_file(supernet.state_dict() | names, folder / f"guided-{rank}.safetensors")
        (folder / f"space-{rank}.json").write_text(json.dumps(supernet.space.to_json()))

    job.train_supernet = train_and_show
    small = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    given = {
        "data": "digits",
        "model_args": small,
        "batch_size": 128,
        "device": "cpu",
        "sampler": "random",
        "trials": 4,
    }
    weights, levels = str(folder / "start.safetensors"), (64, 36, 16)
    run_job(SearchConfig(**given, weights=weights, levels=levels, tune_epochs=1, epochs=1), folder / "run")


def test_two_processes_tune_a_dense_model_and_a_supernet_learns_from_it_in_the_space_that_the_first_one_chose(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("digits_vit", num_classes=5, depth=3, embed_dim=16, num_heads=2)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    in_two_processes(search_from_weights, tmp_path)
    first, second = (load_file(tmp_path / f"guided-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    dense = load_file(tmp_path / "run" / "dense.safetensors")
    assert all(torch.equal(first[f"teacher.{name}"], tensor) for name, tensor in dense.items())
    assert any(not torch.equal(first[name], tensor) for name, tensor in dense.items())
    spaces = [json.loads((tmp_path / f"space-{rank}.json").read_text()) for rank in (0, 1)]
    chosen = json.loads((tmp_path / "run" / "config.json").read_text())["search"]
    assert spaces[0] == spaces[1]
    assert spaces[0]["operators"] == chosen["operators"]
    assert len(chosen["operators"]) < 5


def test_the_command_trains_in_two_processes_of_which_one_writes_and_prints(tmp_path):
    words = ["search", "--data", "digits", "--model-args", "depth=3,embed_dim=16,num_heads=2", "--batch-size", "128"]
    words += ["--sampler", "random", "--trials", "10", "--device", "cpu", "--json", "--out", str(tmp_path / "run")]
    both = [Forked.verb(*words, "--epochs", "2", **told) for told in environments()]
    (status, out, err), (other_status, *said) = (process.wait() for process in both)
    assert (status, other_status) == (0, 0), (err, said)
    assert "training the supernet: 100%" in err
    assert said == ["", ""]
    json.loads(out)
    assert load_tensors(tmp_path / "run" / "training.safetensors")[1]["epochs"] == 2
    assert len(pd.read_csv(tmp_path / "run" / "candidates.csv")) == 10
    status, _, err = call(*words, "--epochs", "3")
    assert status == 0, err
    assert "training the supernet for 1 epochs" in err


@pytest.mark.slow
def test_what_one_of_two_processes_refuses_ends_both(digits_run):
    words = ["search", "--data", "digits", "--model-args", "depth=3,embed_dim=16,num_heads=2", "--batch-size", "128"]
    words += ["--device", "cpu", "--out", str(digits_run.folder)]
    refused = torchrun("-m", "poolshare.search.cli", *words, "--epochs", "3", "--lr", "0.5")
    assert refused.returncode != 0
    assert "lr: 0.002 there, 0.5 now" in refused.stderr


# Scoring


def images_scored(folder):
    """Of every architecture that was scored: right answers and images."""
    rows = pd.read_csv(folder / "candidates.csv").itertuples()
    return {row.architecture: (row.correct, row.total) for row in rows}


@pytest.mark.parametrize("sampler", ["exhaustive", "evolution"])
@pytest.mark.parametrize("count", one_of_each([2, 4], 2))
def test_processes_score_what_one_scores_to_the_last_image(sampler, count, digits_run, tmp_path):
    words = ["search", *DIGITS[1:], "--sampler", sampler, "--trials", "40", "--threads", "1", "-q"]
    found = []
    for name, told in (("one", environments(1)), ("several", environments(count))):
        folder = shutil.copytree(digits_run.folder, tmp_path / name)
        for old in ("candidates.csv", "study.journal", "summary.json"):
            (folder / old).unlink(missing_ok=True)
        processes = [Forked.verb(*words, "--out", folder, **environment) for environment in told]
        for status, _, err in [process.wait() for process in processes]:
            assert status == 0, err
        found.append(images_scored(folder))
    assert found[0] == found[1]
    assert {total for _, total in found[0].values()} == {377}


def test_a_worker_of_two_processes_is_one_worker(digits_run, tmp_path):
    folder = shutil.copytree(digits_run.folder, tmp_path / "run")
    whole = images_scored(folder)
    for old in ("candidates.csv", "study.journal", "summary.json"):
        (folder / old).unlink(missing_ok=True)
    both = [Forked.verb("worker", folder, "--device", "cpu", "--json", "-q", **told) for told in environments()]
    (status, out, err), (other, *said) = (process.wait() for process in both)
    assert (status, other, said) == (0, 0, ["", ""]), err
    assert json.loads(out)["scored"] == len(whole)
    assert call("search", *DIGITS[1:], "--out", folder, "-q")[0] == 0
    assert images_scored(folder) == whole


def test_a_process_killed_while_scoring_ends_the_search_clearly_and_the_same_command_goes_on(digits_run, tmp_path):
    folder = shutil.copytree(digits_run.folder, tmp_path / "run")
    whole = images_scored(folder)
    for old in ("candidates.csv", "study.journal", "summary.json"):
        (folder / old).unlink(missing_ok=True)
    words = ["search", *DIGITS[1:], "--out", folder]
    first, second = (Forked.verb(*words, **told) for told in environments())
    first.wait_for("scoring the whole space")
    second.send(signal.SIGKILL)
    status, _, err = first.wait()
    assert second.wait()[0] == -signal.SIGKILL
    assert (status, "processes that torchrun started has ended" in " ".join(err.split())) == (1, True), err
    assert call(*words, "-q")[0] == 0
    assert images_scored(folder) == whole
