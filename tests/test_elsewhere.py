"""Exported models at work elsewhere: predicting single images, torch.export, ONNX."""

import json

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from timm.data import create_transform

from poolshare.search import cli
from poolshare.search.export import save_export
from poolshare.search.predict import predict
from poolshare.space import OPERATORS, BrokenDataError, DataError
from poolshare.supernet import Subnet
from poolshare.supernet.onnx import write_onnx

NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64, "num_classes": 4}
DATA = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 0.6), "interpolation": "bicubic"}
DATA["crop_pct"] = 0.9
CLASSES = ("forest", "lake [red]", "river", "town")


def make_model(architecture="16 4@max2d*2", seed=0):
    torch.manual_seed(seed)
    return randomise(Subnet.from_base(NAME, architecture, **SMALL), seed).eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    facts = {
        "macs": 1, "dense_macs": 2, "parameters": 3, "data": "photos", "data_dir": None, "data_fingerprint": "x",
        "seed": 0, "batch_size": 64, "pretrained": False, "weights": "a test",
    }  # fmt: skip
    out = tmp_path_factory.mktemp("exports") / "model"
    model = make_model()
    save_export(out, model, CLASSES, DATA, facts)
    return out, model


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, mode in (("b/10.png", "RGB"), ("b/9.jpg", "RGB"), ("a.png", "L")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (70, 90, 3) if mode == "RGB" else (70, 90)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_probabilities_are_the_models_on_timms_transform_in_natural_order(export, photos):
    out, model = export
    found = predict(out, [photos, photos / "a.png"], top=2)
    assert [one["image"] for one in found] == [str(photos / name) for name in ("a.png", "b/9.jpg", "b/10.png", "a.png")]
    transform = create_transform(**DATA)
    for one in found:
        with torch.inference_mode():
            row = model(transform(Image.open(one["image"]).convert("RGB"))[None])[0].softmax(-1)
        order = row.argsort(descending=True)[:2].tolist()
        assert [each["class"] for each in one["classes"]] == [CLASSES[index] for index in order]
        torch.testing.assert_close(torch.tensor([each["probability"] for each in one["classes"]]), row[order])
    assert len(predict(out, [photos / "a.png"], top=99)[0]["classes"]) == 4


def test_images_that_are_none_are_all_named(export, photos):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    (photos / "b" / "empty.png").write_bytes(b"")
    with pytest.raises(BrokenDataError, match=r"2 of 5 images .*(?s:broken\.jpg.*empty\.png|empty\.png.*broken\.jpg)"):
        predict(export[0], [photos])
    with pytest.raises(DataError, match="no image and no folder at"):
        predict(export[0], [photos / "none.jpg"])
    (photos / "void").mkdir()
    with pytest.raises(DataError, match="no image"):
        predict(export[0], [photos / "void"])


def test_the_verb_prints_names_and_json(export, photos, monkeypatch, capsys):
    def printed(*words):
        monkeypatch.setattr("sys.argv", ["poolshare", "predict", *map(str, words)])
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code
        else:
            status = 0
        assert not status
        return capsys.readouterr().out

    [one] = json.loads(printed(export[0], photos / "a.png", "--json"))
    assert one == predict(export[0], [photos / "a.png"])[0]
    likely = one["classes"][0]
    text = printed(export[0], photos / "a.png", "--top", "1")
    assert text == f"{photos / 'a.png'}: {likely['class']} {likely['probability']:.1%}\n"


SCHEDULES = {  # one for each operator; max1d and pit have reductions of their own
    name: f"16 {8 if name.startswith('max1d') else 4}@{name}*2" for name in OPERATORS
}


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export_gives_the_same_logits(dynamic):
    model, images = make_model(), torch.randn(5, 3, 64, 64)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    for count in (5, 2) if dynamic else (5,):
        torch.testing.assert_close(program.module()(images[:count]), model(images[:count]))


@pytest.mark.parametrize(
    "operator", [name if name == "max2d" else pytest.param(name, marks=pytest.mark.slow) for name in OPERATORS]
)
def test_onnx_gives_the_same_logits(operator, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra: pip install '.[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install '.[onnx]'")
    model = make_model(SCHEDULES[operator])
    write_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for count in (2, 1, 5):
        images = torch.randn(count, 3, 64, 64, generator=generator)
        [found] = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-3, atol=1e-3)
