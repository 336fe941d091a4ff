"""Images and grids that are not square: shapes, spaces, models against timm, and the verbs from search to prediction."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import call, one_of_each, randomise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset

from poolshare.search import search
from poolshare.search.config import checked_config
from poolshare.search.exported.export import save_export
from poolshare.space import Architecture, ConfigError, SearchSpace, SpaceError
from poolshare.space.operators import grid_of, grid_stride, grids
from poolshare.space.presets import default_levels, even_levels, space_for
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.base import cropped, outline
from poolshare.supernet.onnx import write_onnx
from poolshare.supernet.operators.pooling import avg2d, max2d
from poolshare.supernet.operators.rotary import rotation
from poolshare.supernet.tokens import grid_places, grid_sources

WIDE = (4, 6)  # the grid of these tests: images of 4 × 6 patches


# Shapes


def test_grids_of_a_small_one_are_those_of_hand_arithmetic():
    found = [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5), (4, 6)]
    assert list(grids(WIDE).items()) == [(rows * columns, (rows, columns)) for rows, columns in found]
    assert grid_of(12, WIDE) == (3, 4)
    assert grid_of(9, WIDE) is None  # a square is no grid of this shape


@given(st.integers(1, 40), st.integers(1, 40))
def test_grids_are_all_that_scaling_both_sides_gives_and_each_fits_into_the_next(rows, columns):
    found = grids((rows, columns))
    assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(found.values()))
    assert list(found) == sorted(found) == [a * b for a, b in found.values()]
    scales = (np.arange(1, 20001) - 0.5) / 20000
    brute = {(max(1, int(rows * s + 0.5)), max(1, int(columns * s + 0.5))) for s in scales}
    assert set(found.values()) == brute
    if rows == columns:
        assert list(found) == [side * side for side in range(1, rows + 1)]


def test_levels_of_a_wide_grid_are_grids_of_its_shape():
    assert default_levels(300, ("max2d",), (15, 20)) == (300, 154, 70)  # 11 × 14 and 7 × 10
    assert space_for("vit_tiny_patch16_224", 12, 300, grid=(15, 20)) == SearchSpace(
        12, (300, 154, 70), ("max2d",), 3, None, (15, 20)
    )
    warm = space_for("vit_tiny_patch16_224", 12, 300, warm=True, grid=(15, 20))
    assert "avg2d" in warm.operators
    assert warm.levels == even_levels(300, 10, (15, 20))
    assert sum(level in grids((15, 20)) for level in warm.levels) > 5
    # As many patches as 14 × 14, which have levels of their own: those are not of this shape.
    assert space_for("vit_tiny_patch16_224", 12, 196, grid=(7, 28)).levels == (196, 100, 42)
    assert space_for("vit_tiny_patch16_224", 12, 196, grid=(14, 14)) == space_for("vit_tiny_patch16_224", 12, 196)


def test_a_space_of_a_wide_grid_holds_what_a_rule_about_tuples_does():
    space = SearchSpace(3, (24, 12, 9, 6), ("max2d", "topk"), 1, None, WIDE)
    found = {str(architecture) for architecture in space}
    assert {"24 12@max2d 6@max2d", "24 9@topk 6@topk", "24 12@topk 6@topk"} <= found
    assert not any("9@max2d" in text or "topk 6@max2d" in text for text in found)  # 9 is no grid, topk keeps none
    assert [space[rank] for rank in range(space.size)] == list(space)
    assert SearchSpace(**json.loads(json.dumps(space.to_json()))) == space
    assert SearchSpace(3, (16, 9), grid=(4, 4)) == SearchSpace(3, (16, 9))
    for levels, grid, fragment in (
        ((24, 9), WIDE, "9 is not a grid of the shape of 4×6, which 2-D pooling needs; the nearest is 8 (2×4)"),
        ((24, 12), (5, 6), "grid is (5, 6); it must be the rows and columns of the 24 patches"),
        ((24, 12), "wide", "grid is 'wide'"),
    ):
        with pytest.raises(SpaceError) as refused:
            SearchSpace(3, levels, ("max2d",), 1, None, grid)
        assert fragment in str(refused.value)


@pytest.mark.parametrize("before", [(4, 6), (7, 9), (15, 20)])
def test_a_stride_leads_to_the_grid_that_the_convolution_makes(before):
    whole = before[0] * before[1]
    for after, shape in grids(before).items():
        stride = grid_stride(whole, after, before)
        if stride is None:
            continue
        conv = torch.nn.Conv2d(1, 1, stride + 1, stride, padding=stride // 2)
        assert conv(torch.zeros(1, 1, *before)).shape[-2:] == shape
        seen = torch.zeros(1, 1, *before, requires_grad=True)
        F.conv2d(seen, torch.ones(1, 1, stride + 1, stride + 1), None, stride, stride // 2).sum().backward()
        assert (seen.grad > 0).all()  # no patch is left out
    assert grid_stride(24, 6, WIDE) == 2


# Tokens


def test_cells_of_a_wide_grid_lie_where_hand_arithmetic_puts_them():
    # 4 × 6 patches as 2 × 3 cells of 2 × 2.
    assert grid_places(6, WIDE).tolist() == [[r, c] for r in (0.5, 2.5) for c in (0.5, 2.5, 4.5)]
    assert grid_sources(6, WIDE).unflatten(0, WIDE).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    for count, shape in grids((15, 20)).items():
        cells = torch.arange(count, dtype=torch.float32).reshape(1, 1, *shape)
        nearest = F.interpolate(cells, (15, 20), mode="nearest-exact").flatten().long()
        assert torch.equal(grid_sources(count, (15, 20)), nearest)


def test_pooling_a_wide_grid_is_that_of_its_blocks():
    patches = torch.randn(2, 24, 5)
    blocks = patches.unflatten(1, WIDE).unflatten(2, (3, 2)).unflatten(1, (2, 2))  # (B, 2, 2, 3, 2, C)
    torch.testing.assert_close(avg2d(patches, 6, WIDE), blocks.mean(dim=(2, 4)).flatten(1, 2))
    assert torch.equal(max2d(patches, 6, WIDE), blocks.amax(dim=(2, 4)).flatten(1, 2))


# Models

NAMES = {
    "cls": "deit_tiny_patch16_224",
    "no cls": "vit_base_patch16_gap_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "hybrid": "vit_small_resnet50d_s16_224",
    "dynamic size": "vit_intern300m_patch14_448",
    "rotary, dinov3": "vit_small_patch16_dinov3",
    "rotary, cat": "eva02_base_patch14_224",
    "rotary, mixed": "vit_small_patch16_rope_mixed_ape_224",
}
MIXED = ("max2d", "avg2d", "pit", "mstm", "tome_prop", "topk", "max1d")
SPACE = SearchSpace(4, (24, 12, 6), MIXED, 2, None, WIDE)


def options_of(name):
    patch = 14 if "patch14" in name else 16
    return {"img_size": (4 * patch, 6 * patch), "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}


def make(kind):
    return randomise(SuperNet.from_timm(NAMES[kind], SPACE, **options_of(NAMES[kind]))).eval()


def images_for(net, count=2):
    return torch.randn(count, 3, *net.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", one_of_each(NAMES, "cls", "rotary, dinov3"))
def test_a_model_of_wide_images_keeps_all_equalities(kind, tmp_path):
    net = make(kind)
    images, table = images_for(net), measure_macs(net)
    unmodified = timm.create_model(NAMES[kind], **options_of(NAMES[kind])).eval()
    unmodified.load_state_dict({k: value for k, value in net.state_dict().items() if not k.startswith("poolings.")})
    population = [SPACE[0], *(SPACE.sample(random.Random(seed)) for seed in range(3))]
    population += [Architecture.parse(f"24 6@{name}*2 6") for name in ("max2d", "pit", "mstm")]
    with torch.no_grad():
        found = net(images, population)
        assert torch.equal(found[0], unmodified(images))  # timm's, bit for bit
        for architecture, logits in zip(population, found, strict=True):
            assert torch.equal(net(images, [architecture])[0], logits)
            model = Subnet.from_supernet(net, architecture)
            assert torch.equal(model(images), logits)
            assert table.total(architecture) == count_macs(model, (images[:1],))
        assert [tuple(m.shape[-2:]) for m in model.forward_intermediates(images, intermediates_only=True)] == [WIDE] * 4
    facts = {"macs": 1, "dense_macs": 2, "parameters": 3, "data": "photos", "weights": "a test"}
    config = {"input_size": (3, *net.patch_embed.img_size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    save_export(tmp_path / "model", model, tuple("abcde"), config | {"interpolation": "bicubic"}, facts)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("kind", [kind for kind in NAMES if kind.startswith("rotary")])
def test_tokens_of_a_wide_grid_are_rotated_by_timms_table_where_nothing_was_pooled(kind):
    net = make(kind)
    tokens = net.embed(images_for(net))
    placed = tokens._replace(places=grid_places(24, WIDE).expand(2, -1, -1))
    _, table = net._pos_embed(net.patch_embed(images_for(net)))
    for index in range(4):
        timms = table[index] if net.rope_mixed else table
        found = rotation(net, index, placed)
        torch.testing.assert_close(found, timms.expand(2, *found.shape[1:]), rtol=1e-5, atol=1e-6)


def test_reduced_maps_have_the_shape_of_the_grid_that_is_left():
    net = make("cls")
    model, images = Subnet.from_supernet(net, Architecture.parse("24 12@max2d 6@avg2d 6")), images_for(net)
    maps = model.forward_intermediates(images, intermediates_only=True, maps="reduced")
    assert [tuple(one.shape[-2:]) for one in maps] == [WIDE, (3, 4), (2, 3), (2, 3)]
    smooth = model.forward_intermediates(images, intermediates_only=True, maps="bilinear")[-1]
    torch.testing.assert_close(smooth, F.interpolate(maps[-1], size=WIDE, mode="bilinear", align_corners=False))


@pytest.mark.slow
def test_onnx_of_wide_images_gives_the_same_logits(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra: pip install '.[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install '.[onnx]'")
    for kind, text in (("cls", "24 12@max2d 6@tome_prop 6"), ("rotary, dinov3", "24 12@mstm 6@mstm*2")):
        net = make(kind)
        model = Subnet.from_supernet(net, Architecture.parse(text))
        write_onnx(model, tmp_path / "model.onnx")
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        images = images_for(net, 3)
        [found] = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-3, atol=1e-3)


def test_a_space_of_another_shape_is_refused():
    options = {**options_of("patch16"), "img_size": (32, 128)}  # 2 × 8 patches are not 4 × 4
    with pytest.raises(SpaceError, match=r"are a grid of 2×8: give the space grid=\(2, 8\)"):
        SuperNet.from_timm("vit_tiny_patch16_224", SearchSpace(4, (16, 9, 4)), **options)
    with pytest.raises(SpaceError, match="level 9 cannot be reached"):
        Subnet.from_base("vit_tiny_patch16_224", "16 9@max2d*3", **options)
    [note] = cropped(outline("vit_tiny_patch16_224", {**options, "img_size": (70, 96)}))
    assert "do not divide images of 70×96: the last 6 rows and 0 columns of pixels" in note
    assert "64×96 or 80×96 would use all" in note


# From the command line to a prediction


@pytest.mark.parametrize(
    ("given", "kept"), [(224, 224), ((240, 320), (240, 320)), ([240, 320], (240, 320)), ((96, 96), 96), (None, None)]
)
def test_a_size_is_kept_in_one_spelling(given, kept):
    config = checked_config(data="photos", img_size=given)
    assert config.img_size == kept
    assert checked_config(**json.loads(config.model_dump_json())).img_size == kept


@pytest.mark.parametrize("given", [0, (240, 0), (240,), (1, 2, 3), "240x320", 3.5, True])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ConfigError, match=r"--img-size .*a size in pixels is a number such as 224"):
        checked_config(data="photos", img_size=given)


@pytest.mark.parametrize("text", ["240x", "x320", "240X320", "240*320", "240x320x3", "-1", "wide"])
def test_a_text_that_is_no_size_is_refused(text):
    status, _, error = call("space", "--img-size", text)
    assert status == 2
    assert f"--img-size '{text}' is not a size in pixels; write 224, or height and width as in 240x320" in error


def test_the_space_of_wide_images_is_counted_before_a_search():
    status, out, error = call("space", "--img-size", "240x320", "--json")
    assert status == 0, error
    facts = json.loads(out)
    assert (facts["levels"], facts["grid"]) == ([300, 154, 70], [15, 20])
    assert facts["size"] == SearchSpace(12, (300, 154, 70), ("max2d",), 3, None, (15, 20)).size


SMALL = ("--model-args", "depth=2,embed_dim=16,num_heads=2,patch_size=8", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that differ in their right half, so that a square crop of the left would know nothing."""
    root, rng = tmp_path_factory.mktemp("wide") / "photos", np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, value in (("dark", 40), ("light", 210)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 48, 3))
                pixels[:, 24:] = value
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def test_wide_photos_go_from_search_to_prediction(photos, tmp_path):
    run, export = tmp_path / "run", tmp_path / "export"
    arguments = ("search", "--data", photos, "--model", "vit_tiny_patch16_224", "--img-size", "32x48", "--out", run)
    arguments += ("--epochs", 1, "--batch-size", 8, "--levels", "24,12,6", *SMALL)
    for _ in range(2):  # the second call continues the first
        status, _, error = call(*arguments)
        assert status == 0, error
    assert json.loads((run / "config.json").read_text())["search"]["img_size"] == [32, 48]
    status, _, error = call(*arguments[:5], "--img-size", 48, *arguments[7:])
    assert status == 1
    assert "img_size: (32, 48) there, 48 now" in error
    for words in (
        ("export", run, "--architecture", "24 6@max2d", "--out", export),
        ("retrain", export, "--epochs", 1, "--device", "cpu", "--quiet"),
        ("evaluate", f"{export}-retrained", "--device", "cpu", "--quiet"),
        ("predict", f"{export}-retrained", photos / "test", "--device", "cpu"),
    ):
        status, out, error = call(*words)
        assert status == 0, error
    assert len(out.splitlines()) == 8
    assert json.loads((export / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 48]


def test_latency_of_wide_images_is_measured(photos, tmp_path):
    status, _, error = call(
        "search", "--data", photos, "--model", "vit_tiny_patch16_224", "--img-size", "32x48", "--out", tmp_path / "run",
        "--epochs", 0, "--objective", "latency", "--levels", "24,6", *SMALL,
    )  # fmt: skip
    assert status == 0, error
    assert (tmp_path / "run" / "latency.json").exists()


def test_own_data_may_be_wide(tmp_path):
    images = torch.randn(16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(16) % 2)
    found = search(
        (data, data), out=tmp_path / "run", model="digits_vit", epochs=1, quiet=True, device="cpu",
        model_args={"depth": 2, "embed_dim": 16, "num_heads": 2}, levels=(24, 12, 6),
    )  # fmt: skip
    assert found.run.config.img_size == (4, 6)
    assert found.report.space.grid == (4, 6)
    assert found.model("24 12@max2d")(images).shape == (16, 2)
