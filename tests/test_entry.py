"""The Python entry: searches on the user's own data and metric, compared with counting by hand and stopped half-way."""

import json
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from opened import open_data
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import save_for_hf
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import poolshare.search
from poolshare.search import Classification, SearchResult, search, work
from poolshare.search.exported.export import load_export
from poolshare.search.exported.predict import predict
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job.prepare import model_options
from poolshare.search.job.recipes import supernet_recipe
from poolshare.search.job.records import read_csv
from poolshare.space import (
    Architecture,
    ArchitectureError,
    ConfigError,
    DataError,
    ModelError,
    PoolshareError,
    RunError,
)
from poolshare.supernet.data.given import open_own
from poolshare.supernet.training.checkpoint import load_state_facts, load_tensors
from poolshare.supernet.training.loop import check_batches, train_model
from poolshare.supernet.training.recipe import Recipe

SMALL = {
    "model": "digits_vit",
    "model_args": {"depth": 3, "embed_dim": 16, "num_heads": 2},
    "levels": (64, 16, 4),
    "sampler": "evolution",
    "trials": 8,
    "epochs": 2,
    "batch_size": 20,
    "quiet": True,
}


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


class Noisy(Dataset):
    """Images with noise of the global generator; fails when it has been read `reads` times."""

    classes = tuple(f"digit {digit}" for digit in range(10))

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, reads: float = float("inf")):
        self.images, self.labels, self.left = images, labels, reads

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise MemoryError("no more")
        return self.images[index] + 0.1 * torch.randn(1, 8, 8), int(self.labels[index])


@pytest.fixture
def parts(digits):
    """Training data that can be made anew, to fail after so many reads, and validation images."""
    images, labels = digits
    return lambda reads=float("inf"): (
        Noisy(images[:200], labels[:200], reads),
        TensorDataset(images[200:300], labels[200:300]),
    )


def top3(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.topk(3).indices == labels[:, None]).any(dim=1)


class Top3(Classification):
    name = "top3"
    metric = "top-3"

    def contributions(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return top3(outputs, targets)


TOP3 = Top3()


def test_scores_are_what_the_models_answer_by_the_users_metric(parts, digits, tmp_path):
    found = search(parts(), out=tmp_path / "run", name="mine", task=TOP3, budget="80%", **SMALL)
    assert found.folder == tmp_path / "run"
    config = found.run.config
    assert (config.data, config.task, config.img_size, config.in_chans) == ("python/mine", "top3", 8, 1)
    assert found.run.read_summary()["classes"] == list(Noisy.classes)
    assert len(found.candidates) == 8
    images, labels = (part[200:300] for part in digits)
    for row in found.candidates.itertuples():
        with torch.inference_mode():
            logits = found.model(row.architecture)(images)
        assert (row.correct, row.total) == (int(top3(logits, labels).sum()), 100)
    dense = found.report.dense
    with torch.inference_mode():
        assert dense["top3"] == int(top3(found.model("dense")(images), labels).sum())  # of 100 images
    assert (found.frontier["macs"] <= 0.8 * dense["macs"]).all()
    choice = found.pick()
    assert (choice.how, choice.architecture) == ("budget", found.frontier["architecture"].iloc[-1])
    facts = found.export(choice, tmp_path / "export")
    assert (facts["architecture"], facts["data"]) == (choice.architecture, "python/mine")
    assert "--data FOLDER" in (tmp_path / "export" / "README.md").read_text()
    assert str(found.model(Architecture.parse(choice.architecture)).architecture) == choice.architecture
    with pytest.raises(ArchitectureError):
        found.model("64*2 36@max2d")

    again = search(parts(), out=tmp_path / "run", name="mine", task=TOP3, budget="80%", **SMALL | {"trials": 10})
    assert list(again.candidates["architecture"][:8]) == list(found.candidates["architecture"])
    assert SearchResult(str(tmp_path / "run")).candidates.equals(again.candidates)


def test_finalists_are_trained_on_the_users_data_and_judged_by_the_users_metric(parts, digits, tmp_path):
    options = SMALL | {"out": tmp_path / "run", "name": "mine", "task": TOP3}
    found = search(parts(), **options)
    with pytest.raises(RunError, match="no finalist within the budget was trained yet"):
        found.pick("finalist")
    rows = found.finalists(2, epochs=1, quiet=True)
    assert found.pick("finalist").architecture == rows["architecture"][0]
    assert (rows["total"] == 100).all()

    # By hand: the same model, images and seed.
    images, labels = (part[200:300] for part in digits)
    config = found.run.config
    data, recipe = found.data, Recipe(epochs=1, batch_size=20, lr=1e-3, weight_decay=config.weight_decay)
    for row in rows.itertuples():
        torch.manual_seed(config.seed)
        model = found.model(row.architecture)
        train_model(model, data, recipe, seed=config.seed)
        with torch.inference_mode():
            assert row.score == int(top3(model(images), labels).sum())  # of 100 images

    opened = SearchResult(tmp_path / "run")  # knows neither
    assert opened == found
    assert opened.pick("finalist") == found.pick("finalist")
    with pytest.raises(PoolshareError, match="given in Python"):
        opened.finalists(3, epochs=1, quiet=True)


def test_trust_is_measured_on_the_users_data_by_the_users_metric(parts, digits, tmp_path):
    found = search(parts(), out=tmp_path / "run", name="mine", task=TOP3, **SMALL)
    assert found.report.trust is None
    measured = found.trust(4, twice=2, bands=2, epochs=1, quiet=True)
    assert (measured["n"], measured["twice"], measured["images"], measured["recipe"]["epochs"]) == (4, 2, 100, 1)
    assert found.report.trust["tau"] == measured["tau"]

    # By hand: scores, and a training alone of the same seed.
    images, labels = (part[200:300] for part in digits)
    rows = read_csv(tmp_path / "run" / "trust.csv")
    for row in rows.itertuples():
        with torch.inference_mode():
            right = top3(found.model(row.architecture)(images), labels)
        assert row.supernet_score == int(right.sum())
    row = rows[rows["repeat"] == 1].iloc[-1]
    seed = random.Random("alone 0 1 1").getrandbits(31)
    torch.manual_seed(seed)
    base, options = found._supernet.base
    model = timm.create_model("poolshare_vit", base=base, architecture=row["architecture"], **options)
    recipe = supernet_recipe(found.run.config).model_copy(update={"epochs": 1})
    train_model(model, found.data, recipe, seed=seed)
    with torch.inference_mode():
        assert row["score"] == int(top3(model(images), labels).sum())

    with pytest.raises(PoolshareError, match="given in Python"):
        SearchResult(tmp_path / "run").trust(4, twice=2, bands=2, epochs=1, quiet=True)


def test_a_worker_on_the_users_data_scores_what_the_search_left(parts, tmp_path):
    options = SMALL | {"name": "mine", "trials": 40}
    alone = search(parts(), out=tmp_path / "alone", task=TOP3, **options)

    class Failing(Top3):
        def contributions(self, outputs, targets):
            if len(targets) == 100:  # not the few that a task is tried on at first
                raise MemoryError("no more")
            return top3(outputs, targets)

    run = tmp_path / "run"
    with pytest.raises(MemoryError):
        search(parts(), out=run, task=Failing(), **options)
    assert (run / "supernet.safetensors").exists()
    count = len(alone.candidates)  # the whole space
    assert work(run, parts(), task=TOP3, quiet=True) == {"run": str(run), "scored": count, "candidates": count}
    found = search(parts(), out=run, task=TOP3, **options)
    assert found.candidates.equals(alone.candidates)


def test_a_worker_is_refused_other_data_or_another_metric_than_the_searchs(parts, digits, tmp_path):
    run = tmp_path / "run"
    search(parts(), out=run, task=TOP3, **SMALL | {"epochs": 0})
    (train, validation), (images, labels) = parts(), digits
    swapped = TensorDataset(images[201:301], labels[201:301])
    small = [TensorDataset(part[:, :, 2:, 2:], labels[: len(part)]) for part in (images[:200], images[:100])]
    for data, options, says in [
        ((train, swapped), {"task": TOP3}, "not those"),
        ((train, validation), {}, "task 'top3' is unknown"),
        ((train, validation), {"task": TOP3, "classes": list("abcdefghij")}, "not those"),
        (small, {"task": TOP3}, "1×6×6 here, and 1×8×8 in the search"),
        (None, {"task": TOP3}, "`poolshare.search.work`"),
        ("digits", {"task": TOP3}, "not those"),
        ((train, validation), {"task": partial(top3)}, "is not a task"),
    ]:
        with pytest.raises(PoolshareError, match=re.escape(says)):
            work(run, data, quiet=True, **options)
    named = search("digits", out=tmp_path / "named", **SMALL | {"epochs": 0, "trials": 4})
    with pytest.raises(ConfigError, match="leave data out"):
        work(named.folder, (train, validation), quiet=True)
    assert work(named.folder, quiet=True)["scored"] == 0


@pytest.mark.parametrize("loaders", ["", "shuffled", "sampled"])
def test_a_search_that_fails_in_training_continues_to_the_same_bits(loaders, parts, tmp_path):
    def data(reads=float("inf")):
        train, validation = parts(reads)
        if not loaders:
            return train, validation
        generator = torch.Generator()
        if loaders == "shuffled":
            return DataLoader(train, 20, shuffle=True, generator=generator), DataLoader(validation, 64)
        generator.seed()
        batches = BatchSampler(RandomSampler(train, generator=generator), 20, drop_last=True)
        return DataLoader(train, batch_sampler=batches), DataLoader(validation, 64)

    options = SMALL | ({"batch_size": None} if loaders else {})
    whole = search(data(), out=tmp_path / "whole", **options)
    torch.manual_seed(5)  # nothing hangs on the global generator
    with pytest.raises(MemoryError):
        search(data(200 + 20 + 200 + 50), out=tmp_path / "cut", **options)  # read once, calibrated, 1 epoch, a part
    assert not (tmp_path / "cut" / "supernet.safetensors").exists()
    cut = search(data(), out=tmp_path / "cut", **options)
    weights = [load_tensors(one.run.supernet)[0] for one in (whole, cut)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert cut.candidates.equals(whole.candidates)
    assert cut.run.config.batch_size == 20


def test_generators_of_a_users_loaders_are_left_where_they_were(digits):
    train, validation = (TensorDataset(*(part[where] for part in digits)) for where in (slice(200), slice(200, 300)))
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    loaders = DataLoader(train, 20, shuffle=True, generator=generator), DataLoader(validation, 64, generator=generator)
    data = open_own(loaders, "mine")
    first, again = (torch.cat([labels for _, labels in data.train_loader(0, 20)]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(generator.get_state(), before)


def test_images_of_doubles_are_those_of_floats(digits, tmp_path):
    images, labels = digits
    small = SMALL | {"epochs": 1, "trials": 4}
    for kind in (torch.float32, torch.float64):
        both = [TensorDataset(images[part].to(kind), labels[part]) for part in (slice(200), slice(200, 300))]
        search(both, out=tmp_path / str(kind), **small | {"classes": np.array(Noisy.classes)})
        loaders = [DataLoader(part, 20) for part in both]
        search(loaders, out=tmp_path / f"{kind} loaders", **small | {"batch_size": None})
    for what in ("", " loaders"):
        one, other = (SearchResult(tmp_path / f"{kind}{what}") for kind in (torch.float32, torch.float64))
        weights = [load_tensors(found.run.supernet)[0] for found in (one, other)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        assert one.candidates.equals(other.candidates)
    assert SearchResult(tmp_path / "torch.float64").run.read_summary()["classes"] == list(Noisy.classes)


def test_loaders_whose_batches_cannot_be_mixed_or_shared_are_refused(digits, tmp_path):
    images, labels = digits
    loaders = [DataLoader(TensorDataset(images[:65], labels[:65]), 20) for _ in range(2)]  # the last batch has 5
    with pytest.raises(ConfigError, match=r"5 of them in a step: .* loader with drop_last=True .* multiple of 2"):
        search(loaders, out=tmp_path / "run", **SMALL | {"batch_size": None, "recipe": {"mixup": 0.2}})
    assert list(tmp_path.iterdir()) == []
    own = open_own(loaders, "mine")
    with pytest.raises(DataError, match="a batch of 5 images cannot be shared equally among 2 processes"):
        check_batches(own, Recipe(), 2)
    check_batches(own, Recipe(), 5)


def test_more_epochs_that_were_begun_cannot_be_cut_short_but_what_was_finished_is_still_there(parts, tmp_path):
    def ask(epochs, reads=float("inf")):
        return search(parts(reads), out=tmp_path / "run", **SMALL | {"epochs": epochs})

    first = ask(1)
    weights = first.run.supernet.read_bytes()
    seconds = first.run.read_summary()["seconds"]["training"]
    assert seconds > 0
    with pytest.raises(MemoryError):
        ask(6, 200 + 20 + 3 * 200 + 50)  # read once, calibrated, epochs 2 to 4, a part of the fifth
    with pytest.raises(RunError, match="was trained for 4 epochs already"):
        ask(2)
    again = ask(1)
    assert again.run.supernet.read_bytes() == weights
    assert again.candidates.equals(first.candidates)
    assert again.run.read_summary()["seconds"]["training"] == seconds
    last = ask(6)
    assert last.run.supernet.read_bytes() != weights
    assert (tmp_path / "run" / "candidates-1-epochs.csv").exists()
    facts = load_state_facts(last.run.training)
    assert (facts["epochs"], last.run.read_summary()["seconds"]["training"]) == (6, round(facts["seconds"], 3))


def test_a_latency_budget_can_be_looked_at_while_its_search_goes_on(tmp_path):
    options = {key: value for key, value in SMALL.items() if key != "batch_size"} | {"epochs": 0}
    options |= {"model_args": {"depth": 5, "embed_dim": 16, "num_heads": 2}, "budget": "1000ms"}

    class Top5(Classification):
        name, calls, allowed = "top5", 0, float("inf")

        def contributions(self, outputs, targets):
            self.calls += 1
            if self.calls > self.allowed:
                raise MemoryError("no more")
            return (outputs.topk(5).indices == targets[:, None]).any(dim=1)

    top5 = Top5()
    found = search("digits", out=tmp_path / "run", task=top5, **options)
    assert len(found.candidates) == 8
    assert "latency_ms" in found.candidates
    for calls in (20, 60, 120):  # in later and later generations
        top5.calls, top5.allowed = 0, calls
        with pytest.raises(MemoryError):
            search("digits", out=tmp_path / "run", task=top5, **options | {"trials": 100})
        opened = SearchResult(tmp_path / "run")
        assert opened.candidates["latency_ms"].notna().all()
        assert opened.pick("budget").how == "budget"
    assert len(opened.candidates) > 8


def test_finalists_of_loaders_keep_their_batches(parts, tmp_path):
    train, validation = parts()
    loaders = DataLoader(train, 20, shuffle=True, generator=torch.Generator()), DataLoader(validation, 64)
    found = search(loaders, out=tmp_path / "run", **SMALL | {"batch_size": None})
    with pytest.raises(ConfigError, match="the training loader gives 20"):
        found.finalists(1, batch_size=40, quiet=True)
    assert found.finalists(1, epochs=1, quiet=True)["batch_size"].tolist() == [20]


def test_other_images_another_name_or_another_metric_are_not_taken_for_the_same_run(parts, digits, verb, tmp_path):
    train, validation = parts()
    options = SMALL | {"epochs": 0, "out": tmp_path / "run"}
    search((train, validation), **options)
    swapped = TensorDataset(digits[0][201:301], digits[1][201:301])
    with pytest.raises(RunError, match=r"not those .* was begun with"):
        search((train, swapped), **options)
    with pytest.raises(RunError, match=r"python/data.* there, 'python/other"):
        search((train, validation), name="other", **options)
    with pytest.raises(RunError, match="task: 'classification' there, 'top3' now"):
        search((train, validation), task=TOP3, **options)
    for words in (["worker", tmp_path / "run"], ["trust", tmp_path / "run"]):
        status, _, err = verb(*words, "-q")
        assert (status, "given in Python" in err) == (2, True), err


def test_a_named_data_set_takes_a_metric_too_and_other_verbs_ask_for_it(verb, tmp_path):
    options = {key: value for key, value in SMALL.items() if key != "batch_size"} | {"epochs": 0, "trials": 4}
    found = search("digits", out=tmp_path / "run", task=TOP3, **options)
    assert (found.run.config.task, found.candidates["total"].iloc[0]) == ("top3", 377)
    assert found.report.title.endswith(", top3")
    status, _, err = verb("trust", tmp_path / "run", "-q")
    assert (status, "top3" in err) == (2, True), err


def one_image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


LABELS = torch.arange(8) % 2
IMAGES = TensorDataset(one_image(8, 1, 8, 8), LABELS)


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


class Pictures(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Image.new("L", (8, 8)), 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (IMAGES, "two torch Datasets"),
        ((IMAGES, IMAGES, IMAGES), "test images are yours to keep"),
        ((IMAGES, DataLoader(IMAGES)), "two Datasets, or two DataLoaders"),
        ((IMAGES, Streamed()), "with a length"),
        ((DataLoader(Streamed()), DataLoader(IMAGES)), "streams"),
        ((Pictures(), IMAGES), "end its transform in a tensor"),
        ((TensorDataset(one_image(8, 1, 8, 8, dtype=torch.uint8), LABELS), IMAGES), "uint8 tensor of shape"),
        ((TensorDataset(one_image(8, 8, 8), LABELS), IMAGES), "(channels, H, W)"),
        ((TensorDataset(one_image(8, 1, 8, 8) / 0, LABELS), IMAGES), "not finite"),
        ((TensorDataset(one_image(8, 1, 8, 8), LABELS / 2), IMAGES), "class index"),
        ((TensorDataset(one_image(8, 1, 8, 8), -LABELS), IMAGES), "class index"),
        (
            (TensorDataset(one_image(8, 4, 8, 0), LABELS), TensorDataset(one_image(8, 4, 8, 0), LABELS)),
            "4×8×0: give ones of at least one channel and one pixel",
        ),
        ((TensorDataset(one_image(8, 1, 16, 16), LABELS), IMAGES), "differ in size"),
        ((IMAGES, TensorDataset(one_image(8, 1, 8, 8), LABELS + 1)), "none to train on"),
        ((TensorDataset(one_image(0, 1, 8, 8), LABELS[:0]), IMAGES), "empty"),
        (
            (Noisy(one_image(8, 1, 8, 8), LABELS, 3), IMAGES),
            "item 3 of the train data cannot be used (MemoryError: no more)",
        ),
        ((DataLoader(IMAGES, 4, num_workers=1, persistent_workers=True), DataLoader(IMAGES)), "persistent_workers"),
    ],
)
def test_data_that_cannot_be_used_are_refused_before_anything_is_written(data, says, tmp_path):
    with pytest.raises(DataError) as refused:
        search(data, out=tmp_path / "run", **SMALL)
    assert says in str(refused.value)
    assert list(tmp_path.iterdir()) == []


class SameName(Classification):
    pass


class ByTheBatch(Classification):
    name = "by_the_batch"

    def contributions(self, outputs, targets):
        return outputs[:, 0] >= outputs[:, 0].mean()


class AShare(Classification):
    name = "a_share"

    def contributions(self, outputs, targets):
        return (outputs.argmax(-1) == targets).float().mean()


class Minus(Classification):
    name = "minus"

    def number(self, sums, images):
        return -1 - sums[..., 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epoch": 3}, "did you mean epochs"),
        ({"epochs": -1}, "--epochs -1"),
        ({"img_size": 8}, "leave it out, the data given in Python decide it"),
        ({"recipe": {"hflip": 0}}, "the transforms of the data"),
        ({"recipe": {"epochs": 1}}, "leave it out, --epochs decides it"),
        (
            {"batch_size": 5, "recipe": {"mixup": 0.2}},
            "5 of them in a step: give a --batch-size whose share is even, such as 6",
        ),
        ({"recipe": {"cutmix": 0.2}, "batch_size": 7}, "such as 8"),
        ({"storage": "postgresql://127.0.0.1:1/searches"}, "cannot be reached"),
        ({"classes": "ab"}, "give a list of names"),
        ({"name": ""}, "is not a name"),
        ({"classes": ["only"]}, "name 2 classes or more"),
        ({"task": top3}, "is not a task"),
        ({"task": "segments"}, "task 'segments' is unknown: there are classification"),
        ({"task": Top3}, "task Top3 is not a task: give its name, or an instance"),
        ({"task": SameName()}, "is called classification, as one of poolshare's"),
        ({"task": ByTheBatch()}, "by others in its batch"),
        ({"task": AShare()}, "return a bool tensor"),
        ({"task": Minus()}, "number gave -"),
        ({"seed": -1}, "seed=-1"),
        ({"budget": "1%"}, "this space reaches from"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(options, says, tmp_path):
    with pytest.raises(PoolshareError) as refused:
        search((IMAGES, IMAGES), out=tmp_path / "run", **SMALL | options)
    assert says in str(refused.value)
    assert list(tmp_path.iterdir()) == []


class Named(Dataset):
    """Samples as Hugging Face data sets give them."""

    def __init__(self, images, labels, keys=("pixel_values", "labels")):
        self.images, self.labels, self.keys = images, labels, keys
        self.features = {keys[1]: SimpleNamespace(names=[f"digit {digit}" for digit in range(10)])}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return dict(zip(self.keys, (self.images[index], self.labels[index]), strict=True))


def test_numbers_that_cannot_be_are_refused_at_once(digits_run, tmp_path):
    run, out = SearchResult(digits_run.folder), tmp_path / "export"
    run.export("dense", out)
    for call, says in (
        (lambda: predict(out, [tmp_path], top=0), "top=0: give a whole number from 1"),
        (lambda: predict(out, [tmp_path], threads=0), "threads=0: give a whole number from 1"),
        (lambda: evaluate(out, workers=-1), "workers=-1: give a whole number from 0"),
        (lambda: retrain(out, tmp_path / "new", threads=True), "threads=True: give a whole number from 1"),
        (lambda: retrain(out, tmp_path / "new", seed=-1), "seed=-1: give a whole number from 0"),
        (lambda: run.trust(workers=-1), "workers=-1"),
        (lambda: run.finalists(0), "count=0"),
        (lambda: run.finalists(2, threads=0), "threads=0"),
        (lambda: work(digits_run.folder, workers=1.5), "workers=1.5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("keys", [("pixel_values", "labels"), ("image", "label")])
def test_samples_and_batches_that_are_dictionaries_are_those_of_pairs(keys, digits):
    images, labels = (part[:60] for part in digits)
    pairs, named = TensorDataset(images, labels), Named(images, labels, keys)
    for load in (lambda part: part, lambda part: DataLoader(part, 20)):
        one, other = (open_own((load(part), load(part)), "mine", classes=Noisy.classes) for part in (pairs, named))
        assert one.fingerprint == other.fingerprint
        for mine, theirs in zip(one.train_loader(1, 20), other.train_loader(1, 20), strict=True):
            assert all(map(torch.equal, mine, theirs))
    assert open_own((named, named), "mine").classes == Noisy.classes


@pytest.mark.parametrize("load", [lambda part: part, lambda part: DataLoader(part, 20, shuffle=True)])
def test_own_data_under_a_models_classes_have_its_labels(load, digits):
    images, labels = (part[:60] for part in digits)
    own = open_own((load(TensorDataset(images, labels)),) * 2, "mine")
    indices = [3, 1, 4, 11, 5, 9, 2, 6, 8, 7]
    moved = own.relabelled([f"class {index}" for index in range(12)], indices)
    assert len(moved.classes) == 12
    assert moved.fingerprint != own.fingerprint
    for loader in (lambda data: data.train_loader(0, 20), lambda data: data.eval_loader("search", 20)):
        for (one, before), (other, after) in zip(loader(own), loader(moved), strict=True):
            assert torch.equal(one, other)
            assert after.tolist() == [indices[label] for label in before]
    assert sorted(moved.split("train").labels) == sorted(indices[label] for label in labels)


def test_the_number_of_classes_can_be_given(digits):
    images, labels = digits[0][:8], torch.tensor([0, 1, 2, 3] * 2)
    data = TensorDataset(images, labels)
    assert open_own((data, data), "mine").classes == ("0", "1", "2", "3")
    assert open_own((data, data), "mine", classes=6).classes == ("0", "1", "2", "3", "4", "5")


def batches(images, labels, collate, size=4):
    return DataLoader(TensorDataset(images, labels), size, collate_fn=collate)


def stacked(samples):
    return torch.utils.data.default_collate(samples)


GOOD = one_image(8, 1, 8, 8)


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (batches(one_image(8, 1, 8, 8, dtype=torch.uint8), LABELS, stacked), "uint8 tensor of shape (4, 1, 8, 8)"),
        (batches(GOOD, LABELS / 2 + 0.19, stacked), "float32 tensor of shape (4,), and must be class indices"),
        (
            batches(GOOD, LABELS, lambda s: {"pixels": 1, "label": 2}),
            "a dictionary of 'pixels', 'label', and must have",
        ),
        (batches(GOOD, LABELS, lambda s: (*stacked(s), s)), "a tuple of 3, and must be (image tensor, label)"),
        (batches(GOOD, LABELS, lambda s: s), "a list of 4, and must be"),
        (batches(GOOD, LABELS, lambda s: [part.numpy() for part in stacked(s)]), "a NumPy array of float32 and shape"),
        (batches(GOOD, LABELS, lambda s: (stacked(s)[0], [0, 1, 0, 1])), "its labels are a list of 4"),
        (batches(GOOD, LABELS, lambda s: None), "it is a NoneType"),
        (batches(GOOD, LABELS, lambda s: (stacked(s)[0], stacked(s)[1][:2])), "class indices of shape (4,)"),
        (DataLoader(TensorDataset(GOOD, LABELS), None), "give the loader a batch_size"),
        (batches(GOOD / 0, LABELS, stacked), "not finite"),
        (batches(GOOD, -LABELS, stacked), "gives label -1"),
    ],
)
def test_loaders_are_checked_like_data_sets_before_anything_is_converted(loader, says):
    with pytest.raises(DataError) as refused:
        open_own((loader, DataLoader(IMAGES, 4)), "mine")
    assert says in str(refused.value)


def saved_model(folder, names, head):
    """timm's folder of a small model whose head has these names; `head` is its bias: what it answers."""
    torch.manual_seed(0)
    model = timm.create_model("digits_vit", num_classes=len(names), **SMALL["model_args"])
    torch.nn.init.constant_(model.head.bias, 0)
    model.head.bias.data += torch.tensor(head)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.25,), std=(0.4,), interpolation="nearest", crop_pct=1.0)
    save_for_hf(
        model, folder, model_config={"label_names": names}, model_args=SMALL["model_args"], safe_serialization=True
    )
    return model.eval()


def test_a_users_own_model_is_searched_without_training_with_its_names_and_its_input(digits, verb, tmp_path):
    """Class folders are three of its five classes, in another order; the classes it has stay, through every verb."""
    names = ["six", "nought", "nine", "three", "never"]
    model = saved_model(tmp_path / "own", names, [0.3, 0.1, 0.2, 0.0, 0.0])
    for index, label in enumerate(digits[1][:120].tolist()):
        if label in (0, 3, 6):
            folder = tmp_path / "photos" / {0: "nought", 3: "three", 6: "six"}[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits[0][index, 0] * 255).byte().numpy()).save(folder / f"{index}.png")
    options = {"levels": (64, 16), "sampler": "random", "trials": 2, "epochs": 0, "quiet": True}
    options |= {"out": tmp_path / "run", "model": f"local-dir:{tmp_path / 'own'}"}
    found = search(str(tmp_path / "photos"), **options)
    config = found.run.config
    assert (config.model, config.img_size, config.in_chans) == ("digits_vit", 8, 1)
    assert (config.preprocessing["mean"], config.preprocessing["std"]) == ([0.25], [0.4])
    assert found.run.classes == tuple(names)
    notes = " ".join(found.report.notes)
    assert "3 of the 5 outputs" in notes
    assert "'nought' is output 1, 'six' is output 0, 'three' is output 3" in notes
    found.export("dense", tmp_path / "export")
    tested = evaluate(tmp_path / "export")
    data = open_data(
        str(tmp_path / "photos"), img_size=8, in_chans=1, mean=[0.25], std=[0.4], interpolation="nearest", crop_pct=1
    )
    [(images, labels)] = data.eval_loader("test", 1000)
    with torch.inference_mode():
        answers = [names[index] for index in model(images).argmax(dim=-1)]
    truth = [data.classes[label] for label in labels]
    assert tested["details"]["correct"] == sum(map(str.__eq__, answers, truth))
    assert [one["class"] for one in tested["details"]["per_class"]] == ["six", "nought", "three"]  # in the head's order
    assert search(str(tmp_path / "photos"), **options | {"trials": 3}).report.notes == found.report.notes

    status, out, err = verb("space", "--model", f"local-dir:{tmp_path / 'own'}", "--levels", "64,16", "--json")
    assert status == 0, err
    shape = json.loads(out)
    assert (shape["model"], shape["depth"]) == ("digits_vit", 3)
    head = 16 * (10 - 5)  # it counts the ten classes of timm's digits_vit, the run its own five
    assert shape["dense_macs"] == found.report.dense["macs"] + head

    (tmp_path / "photos" / "six").rename(tmp_path / "photos" / "seven")
    with pytest.raises(
        ModelError, match=r"5 classes, the data 3, 1 of them not among the names of .*config.json: 'seven'"
    ):
        search(str(tmp_path / "photos"), **options | {"out": tmp_path / "other"})
    wrong = {"out": tmp_path / "other", "model": "vit_tiny_patch16_224", "weights": tmp_path / "own"}
    with pytest.raises(ModelError, match="are of digits_vit, as its card says, and --model is vit_tiny"):
        search(str(tmp_path / "photos"), **options | wrong)
    assert not (tmp_path / "other").exists()


def test_loaders_say_the_batch_size_and_names_belong_to_own_data(tmp_path):
    loaders = DataLoader(IMAGES, 4), DataLoader(IMAGES, 4)
    with pytest.raises(ConfigError, match="the training loader gives 4"):
        search(loaders, out=tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match="belong to data given in Python"):
        search("digits", out=tmp_path / "run", name="mine", **SMALL)


def test_the_example_of_the_readme_works_as_written(digits, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "search" / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- own data -->\n```python\n")[1].split("```")[0]
    for index in range(90):
        label = int(digits[1][index])
        folder = tmp_path / "photos" / ("val" if index % 3 == 0 else "train") / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        grey = (digits[0][index, 0] * 255).byte().numpy()
        Image.fromarray(grey).resize((40, 40)).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    found, validation = names["found"], DataLoader(names["validation"], 100)
    images, labels = next(iter(validation))
    row = found.candidates.set_index("architecture").loc[names["choice"].architecture]
    with torch.inference_mode():
        assert int(names["Top2"]().contributions(names["model"](images), labels).sum()) == row["correct"]
    assert (tmp_path / "exports" / "mine" / "model.safetensors").exists()


def test_importing_the_package_loads_no_torch():
    program = "import sys, poolshare.search; print('torch' in sys.modules, poolshare.search.__all__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"False {poolshare.search.__all__}\n"
    assert {"Classification", "SearchResult", "Task", "search", "work"} <= {*poolshare.search.__all__}
    with pytest.raises(AttributeError, match="no attribute 'find'"):
        _ = poolshare.search.find


def test_images_of_any_number_of_channels_are_searched_exported_and_loaded(digits, tmp_path, verb):
    images, labels = digits
    wide = images.repeat(1, 12, 1, 1)  # a satellite's bands
    parts = TensorDataset(wide[:100], labels[:100]), TensorDataset(wide[100:140], labels[100:140])
    found = search(parts, out=tmp_path / "run", **{**SMALL, "epochs": 0})
    assert found.run.config.in_chans == 12
    model_args = ",".join(f"{name}={value}" for name, value in found.run.config.model_args.items())
    status, out, err = verb("space", "--model", "digits_vit", "--model-args", f"in_chans=12,{model_args}", "--json")
    assert status == 0, err
    assert json.loads(out)["dense_macs"] == found.report.dense["macs"]
    said_twice = found.run.config.changed(model_args={**SMALL["model_args"], "in_chans": 12})
    assert model_options(said_twice) == model_options(found.run.config)
    found.export("dense", tmp_path / "export")
    exported = load_export(tmp_path / "export")
    assert exported.data_config["input_size"] == (12, 8, 8)
    with torch.inference_mode():
        assert torch.equal(exported.model.eval()(wide[:2]), found.model("dense")(wide[:2]))
