"""Pictures of what becomes one token: which parts they are, how they are drawn, the verb, and what a run keeps for its page."""

import base64
import json
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from browser import LAPTOP, PHONE, Opened
from conftest import randomise
from PIL import Image
from reports import FACTS, candidates, make_report
from safetensors.torch import save_file

from poolshare.search import SearchResult, draw_regions
from poolshare.search.exported.export import save_export
from poolshare.search.job import regions as kept
from poolshare.search.job.prepare import load_weights, prepare
from poolshare.search.job.regions import photos as photos_of
from poolshare.search.job.regions import trace
from poolshare.search.report.page import page_data, write_html
from poolshare.search.report.sheet import DROPPED, GAP, HATCH, HEADING, PANEL, Step, coloured, sheet
from poolshare.space import (
    OPERATORS,
    Architecture,
    ArchitectureError,
    BrokenDataError,
    ConfigError,
    ModelError,
    RunError,
    SearchSpace,
)
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.data import ImageFormat
from poolshare.supernet.model import run_layers
from poolshare.supernet.tokens import Carry

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 128, "embed_dim": 32, "num_heads": 2, "num_classes": 4, "depth": 4}
MERGING = tuple(name for name in OPERATORS if not OPERATORS[name].needs_grid)


def net_of(operators=tuple(OPERATORS), levels=(64, 32, 16, 4)):
    return randomise(SuperNet.from_timm(NAME, SearchSpace(4, levels, operators), **TINY)).eval()


def images_for(count=2):
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(1))


# Which parts are one token


def test_regions_hold_as_many_patches_as_their_tokens_stand_for_after_any_path():
    net, images, lost = net_of(MERGING), images_for(), 0
    for seed in range(16):
        architecture = net.space.sample(random.Random(seed))
        steps = {step.layer: step for step in trace(net, architecture, images)}
        with torch.no_grad():
            outputs = run_layers(net, architecture.layers, images, Carry.SOURCES)
        for index, (layer, tokens) in enumerate(zip(architecture.layers, outputs, strict=True)):
            if layer.operator is None:
                assert index not in steps
                continue
            step = steps[index]
            assert (step.operator, step.tokens) == (layer.operator, layer.tokens)
            assert step.regions.shape == (2, 8, 8)
            for image in range(2):
                here = step.regions[image]
                counts = np.bincount(here[here >= 0], minlength=layer.tokens)
                assert counts.tolist() == tokens.sizes[image].round().int().tolist()
                lost += (here < 0).sum()
    assert lost > 0


def test_what_topk_keeps_are_the_patches_whose_tokens_are_left():
    net, images = net_of(("topk",)), images_for()
    [step] = trace(net, Architecture.parse("64 16@topk 16 16"), images)
    with torch.no_grad():
        before, attended = net.run_layer(0, net.space[0].layers[0], net.embed(images), None)
        after = net.poolings["topk_64_16"].pool(before, attended).features[:, 1:]
    for image in range(2):
        kept = np.flatnonzero(step.regions[image].ravel() >= 0)
        assert torch.equal(before.features[image, 1:][torch.from_numpy(kept)], after[image])
        assert step.regions[image].ravel()[kept].tolist() == list(range(16))


def test_cells_of_a_grid_are_drawn_as_cells():
    [step] = trace(net_of(("max2d",), (64, 25)), Architecture.parse("64 25@max2d 25 25"), images_for())
    assert step.regions.tolist() == [np.arange(25).reshape(5, 5).tolist()] * 2


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_says_whether_it_looks_at_what_tokens_hold(operator):
    after = 32 if operator.startswith("max1d") else 16
    net = net_of((operator,), (64, after))
    [step] = trace(net, Architecture.parse(f"64 {after}@{operator} {after} {after}"), images_for(3))
    assert (step.regions != step.regions[0]).any() == OPERATORS[operator].chooses


# How they are drawn


def test_regions_have_their_mean_colour_and_edges_and_what_was_dropped_is_hatched():
    photo = np.zeros((40, 60, 3), dtype=np.uint8)
    photo[:, :15], photo[:, 15:30] = (200, 0, 0), (100, 0, 0)
    bright = coloured(np.full((4, 8, 3), 200, dtype=np.uint8), np.array([[0, 1]]))
    assert bright[0, :, 0].tolist() == [200] * 3 + [140] + [200] * 4  # a dark edge
    found = coloured(photo, np.array([[0, 1, -1]]))  # 20 columns each
    assert found.shape == photo.shape
    # A quarter of region 0 is (100, 0, 0), half of region 1 is black; edges are the last column before a change.
    assert (found[:, :19] == (175, 0, 0)).all()
    assert (found[:, 20:39] == (50, 0, 0)).all()
    assert (found[:, 19] == (219, 140, 140)).all()
    hatched = {tuple(pixel) for pixel in found[:, 40:].reshape(-1, 3).tolist()}
    assert hatched == {DROPPED, HATCH}


def test_a_sheet_has_a_line_for_each_photo_and_more_for_many_steps():
    photos = np.full((2, 30, 60, 3), 128, dtype=np.uint8)
    step = Step(1, "tome", 2, np.zeros((2, 3, 6), dtype=int))
    assert sheet(photos, [step]).size == (GAP + 2 * (PANEL + GAP), 2 * (HEADING + PANEL // 2) + GAP)
    assert sheet(photos, [step] * 7).size == (GAP + 6 * (PANEL + GAP), 4 * (HEADING + PANEL // 2) + GAP)
    gone = step._replace(regions=step.regions - 1)
    assert sheet(photos, [gone]).size[1] > sheet(photos, [step]).size[1]  # a line says what hatching means


def test_photos_are_the_part_of_the_image_that_patches_cover_as_it_came():
    model = Subnet.from_base(NAME, "16 4@max2d*3", **TINY | {"img_size": 70})
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    shown = ImageFormat(70, 3, (0.2, 0.4, 0.6), (0.3, 0.5, 0.7))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in shown.statistics)
    images = ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]
    assert np.array_equal(photos_of(model, images, shown)[0], pixels[:64, :64])
    unknown = photos_of(model, images, None)
    assert (unknown.min(), unknown.max()) == (0, 255)


# The verb

DATA = {"input_size": (3, 128, 128), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An exported model, and its weights as a file of the dense one."""
    root = tmp_path_factory.mktemp("regions")
    net = net_of(("tome", "topk"))
    model = Subnet.from_supernet(net, Architecture.parse("64 32@tome 16@topk 16"))
    save_export(root / "model", model, tuple("abcd"), DATA, FACTS)
    save_file(net.state_dict(), root / "weights.safetensors")
    return root / "model"


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    smooth = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((200, 150), Image.Resampling.BICUBIC).save(path)
    return path


def test_an_export_and_its_architecture_with_the_same_weights_are_drawn_alike(export, photo, tmp_path, verb):
    status, out, error = verb("show", export, "--image", photo, "--image", photo, "--out", tmp_path / "drawn.png")
    assert status == 0, error
    assert f"written: {tmp_path / 'drawn.png'}" in out
    drawn = Image.open(tmp_path / "drawn.png")
    assert drawn.size[0] == GAP + 3 * (PANEL + GAP)
    assert np.array_equal(draw_regions(export, [photo, photo]), drawn)
    args = {"model_args": {name: TINY[name] for name in ("embed_dim", "num_heads", "depth")}, "img_size": 128}
    text = "64 32@tome 16@topk 16"
    same = draw_regions(text, [photo, photo], model=NAME, weights=str(export.parent / "weights.safetensors"), **args)
    assert np.array_equal(same, drawn)
    status, out, error = verb(
        "show", "64 16@max2d*3", "--image", photo, "--img-size", "128", "--model-args", "depth=4,embed_dim=32,num_heads=2",
        "--out", tmp_path / "cells.png", "--json",
    )  # fmt: skip
    assert status == 0, error  # fixed cells need no weights
    assert json.loads(out)["regions"] == str(tmp_path / "cells.png")


def test_what_cannot_be_drawn_is_refused_before_anything_is_written(export, photo, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    small = {"img_size": 128, "model_args": {"depth": 4, "embed_dim": 32, "num_heads": 2}}
    before = sorted(tmp_path.iterdir())
    for kind, says, what, images, out, model in (
        (ArchitectureError, "'64*4' keeps all tokens", "64*4", [photo], "new.png", small),
        (ArchitectureError, "run 2 of the architecture is '16@'", "64 16@", [photo], "new.png", small),
        (RunError, "photo.png exists already", export, [photo], "photo.png", {}),
        (RunError, "there is no folder", export, [photo], "none/new.png", {}),
        (ConfigError, "new.jpg does not end in .png", export, [photo], "new.jpg", {}),
        (ConfigError, "give at least one file", export, [], "new.png", {}),
        (ConfigError, "--model goes with an architecture", export, [photo], "new.png", {"model": NAME}),
        (ModelError, "tome chooses tokens by their contents", "64 32@tome*3", [photo], "new.png", small),
        (BrokenDataError, "notes.png", export, [photo, tmp_path / "notes.png"], "new.png", {}),
        (BrokenDataError, "none.png", export, [tmp_path / "none.png"], "new.png", {}),
        (RunError, "is not an exported folder", tmp_path, [photo], "new.png", {}),
    ):
        with pytest.raises(kind) as refused:
            draw_regions(what, images, tmp_path / out, **model)
        assert says in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_a_picture_need_an_image(export, verb):
    for words in (("--out", "x.png"), ("--model", NAME), ("--img-size", "128"), ("--pretrained",)):
        status, _, error = verb("show", export, *words)
        assert status == 2
        assert words[0] in error
        assert "goes with --image FILE" in error


# What a run keeps, and its page


def test_a_run_keeps_images_and_the_tokens_of_its_frontier_for_a_small_page(digits_run):
    found = SearchResult(digits_run.folder)
    record = found.run.read_regions()
    assert len(record["images"]) == len(set(record["names"])) == 3
    assert [Image.open(BytesIO(base64.b64decode(text))).size for text in record["images"]] == [(8, 8)] * 3
    frontier = list(found.frontier["architecture"])
    drawn = [text for text in frontier if "@" in text]
    assert set(record["architectures"]) == set(drawn)
    assert {pick.architecture for pick in found.report.picks()} & set(drawn)
    for text, steps in record["architectures"].items():
        layers = Architecture.parse(text).layers
        for step in steps:
            assert (layers[step["layer"]].operator, layers[step["layer"]].tokens) == (step["operator"], step["tokens"])
            for regions in step["regions"]:
                assert regions == " ".join(map(str, range(step["tokens"])))  # cells of a grid
    assert (digits_run.folder / "report.html").stat().st_size < 1_000_000


def test_of_much_to_keep_the_picks_are_kept(digits_run, monkeypatch):
    folder = SearchResult(digits_run.folder).run
    whole = folder.read_regions()
    job = prepare(folder.config.without_weights, classes=folder.classes)
    load_weights(job.supernet, folder.supernet)
    sizes = {
        text: sum(len(regions) for step in steps for regions in step["regions"])
        for text, steps in whole["architectures"].items()
    }
    first = next(iter(sizes))
    assert first in {pick.architecture for pick in SearchResult(digits_run.folder).report.picks()}
    monkeypatch.setattr(kept, "LIMIT", sizes[first])
    kept.write_regions(job, folder)
    assert list(folder.read_regions()["architectures"]) == [first]
    monkeypatch.undo()
    kept.write_regions(job, folder)
    assert folder.read_regions() == whole


def test_a_run_without_pictures_has_a_page_without_them(digits_run, verb):
    page, record = digits_run.folder / "report.html", digits_run.folder / "regions.json"
    verb("pareto", digits_run.folder, "--refresh")  # in this copy of the run
    whole, text = page.read_text(), record.read_text()
    record.write_text(text.replace('"max2d"', '"avg2d"', 1))
    status, _, error = verb("pareto", digits_run.folder)
    assert status == 1
    assert "regions.json is damaged" in error
    assert "move it away, and the page shows no images" in error
    record.unlink()
    status, _, error = verb("pareto", digits_run.folder, "--refresh")
    assert status == 0, error
    assert '"regions":null' in page.read_text()
    record.write_text(text)
    assert verb("pareto", digits_run.folder, "--refresh")[0] == 0
    assert page.read_text() == whole


def pictured():
    """A report whose cheapest candidate is drawn for two images: left and right half, and one that was dropped."""
    rows = candidates()
    red = Image.new("RGB", (80, 80), (200, 40, 40))
    red.paste((40, 40, 200), (40, 0, 80, 80))
    file = BytesIO()
    red.save(file, "PNG")
    step = {"layer": 1, "operator": "max2d", "tokens": 2, "rows": 2, "columns": 2, "regions": ["0 1 0 1", "0 -1 0 -1"]}
    architectures = {rows["architecture"][0]: [step], "64*8": [step]}  # the other is none of the candidates
    images = [base64.b64encode(file.getvalue()).decode()] * 2
    return make_report(rows, regions={"names": ["cat <b>", "dog"], "images": images, "architectures": architectures})


def test_the_page_knows_regions_by_row():
    assert page_data(make_report())["regions"] is None
    found = page_data(pictured())["regions"]
    assert found["names"] == ["cat <b>", "dog"]
    assert list(found["steps"]) == [0]


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_the_page_draws_each_region_in_its_colour(browser, tmp_path, viewport):
    write_html(pictured(), tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html", viewport)
    opened.page.evaluate("select(5)")
    assert opened.text("#regions-words") == "Pictures are kept of 1 point of the frontier, and not of this one."
    assert opened.page.locator("#regions canvas").count() == 0
    opened.page.evaluate("select(0)")
    opened.page.locator("#regions canvas").nth(3).wait_for()
    assert opened.texts("#regions figcaption") == [
        "cat <b>",
        "layer 1: 2 tokens max2d",
        "dog",
        "layer 1: 2 tokens max2d",
    ]
    assert "Hatched: dropped." in opened.text("#regions-words")

    def pixel(canvas, x, y):
        script = f"canvas => [...canvas.getContext('2d').getImageData({x}, {y}, 1, 1).data.slice(0, 3)]"
        return tuple(opened.page.locator("#regions canvas").nth(canvas).evaluate(script))

    assert (pixel(0, 50, 50), pixel(0, 270, 50)) == ((200, 40, 40), (40, 40, 200))
    for canvas in (1, 3):
        assert np.abs(np.subtract(pixel(canvas, 50, 50), (200, 40, 40))).max() <= 3  # the enlarged border is soft
    assert np.abs(np.subtract(pixel(1, 270, 50), (40, 40, 200))).max() <= 3
    assert pixel(3, 270, 50) in (DROPPED, HATCH)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert opened.requests == [opened.address]
    assert opened.problems == []
    opened.context.close()
