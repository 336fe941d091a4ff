"""Exported models at work elsewhere: predicting single images, torch.export, ONNX."""

import copy
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import randomise
from PIL import Image
from reports import FACTS
from timm.data import create_transform, resolve_data_config
from timm.models import load_checkpoint, resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3

from poolshare.search import cli
from poolshare.search.exported.export import save_export
from poolshare.search.exported.predict import predict
from poolshare.space import OPERATORS, DataError
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
    out = tmp_path_factory.mktemp("exports") / "model"
    model = make_model()
    save_export(out, model, CLASSES, DATA, FACTS)
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


def test_files_of_a_folder_that_are_passed_over_are_said(export, photos, verb):
    Image.new("RGB", (8, 8)).save(photos / "b" / "c.gif")
    code, out, error = verb("predict", export[0], photos)
    assert code == 0
    assert "c.gif" not in out
    endings = ".png .jpg .jpeg .bmp .tif .tiff .webp"
    assert f"2 file(s) in '{photos}' were passed over (notes.txt, b/c.gif): images end in {endings}." in error
    code, _, error = verb("predict", export[0], photos / "b" / "c.gif")
    assert (code, error) == (0, "")  # named by itself, it is taken


def test_broken_images_are_named_and_the_others_predicted(export, photos, verb):
    whole = predict(export[0], [photos])
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    (photos / "b" / "empty.png").write_bytes(b"")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    found = predict(export[0], [photos])
    for one, before in zip([one for one in found if "error" not in one], whole, strict=True):
        assert one["image"] == before["image"]
        for now, then in zip(one["classes"], before["classes"], strict=True):
            assert now == {"class": then["class"], "probability": pytest.approx(then["probability"], rel=1e-4)}
    broken = [one for one in found if "error" in one]
    assert [Path(one["image"]).name for one in broken] == ["broken.jpg", "gone.png", "empty.png"]
    assert all("classes" not in one and one["image"] in one["error"] for one in broken)
    status, out, error = verb("predict", export[0], photos)
    assert status == 1
    assert len(out.splitlines()) == 3
    assert "3 of 6 images cannot be read" in error
    assert f"(a link to '{photos / 'nowhere.png'}', which is not there)" in error
    status, out, _ = verb("predict", export[0], photos, "--json")
    assert (status, json.loads(out)) == (1, found)


def test_images_that_are_not_there_are_refused(export, photos):
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
    model, images = make_model("16 9@tome 4@tome"), torch.randn(5, 3, 64, 64)  # sizes are carried too
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
    model = make_model(SCHEDULES[operator]).double().train()
    write_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.float().eval()
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for count in (2, 1, 5):
        images = torch.randn(count, 3, 64, 64, generator=generator)
        [found] = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-3, atol=1e-3)


# What timm's train.py gives create_model when no option is set (the script is in timm's repository, not in its wheel).
TRAIN = {
    "in_chans": 3, "num_classes": None, "drop_rate": 0.0, "drop_path_rate": None, "drop_block_rate": None,
    "global_pool": None, "bn_momentum": None, "bn_eps": None, "scriptable": False, "checkpoint_path": "",
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"num_classes": 4}, {"drop_rate": 0.1}, {"drop_path_rate": 0.2}], ids=str)
def test_timms_training_script_makes_the_exported_model(changes, export):
    out, model = export
    made = timm.create_model(f"local-dir:{out}", pretrained=True, **(TRAIN | changes))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.eval()(images), model(images))
    assert made.head_drop.p == changes.get("drop_rate", 0.0)
    assert getattr(made.blocks[-1].drop_path1, "drop_prob", 0.0) == pytest.approx(changes.get("drop_path_rate", 0.0))
    assert (
        resolve_data_config({}, model=made).items()
        >= (DATA | {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.6]}).items()
    )


def test_timms_distillation_makes_the_exported_teacher(export):
    """Its teacher is made where, and in the precision in which, the student is trained."""
    out, model = export
    asked = {"num_classes": 4, "in_chans": 3, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    teacher = timm.create_model(model_name=f"local-dir:{out}", pretrained=True, **asked)
    weights = teacher.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in model.state_dict().items())
    meta = timm.create_model(f"local-dir:{out}", device="meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("asked", [{}, {"img_size": 64}, {"input_size": [3, 64, 64]}], ids=str)
@pytest.mark.parametrize("classes", [None, 4])
def test_timms_validation_script_makes_the_exported_model(asked, classes, export):
    """It lets timm resolve the folder first, so the entry point is called by its own name."""
    out, model = export
    asked = {"in_chans": None, "img_size": None, "input_size": None} | asked
    options = {"pretrained": True, "num_classes": classes, "global_pool": None, "scriptable": False}
    made = timm.create_model(**resolve_model_input_args(f"local-dir:{out}", asked, **options))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.eval()(images), model(images))


def test_timms_averages_and_checkpoints_carry_the_exported_model(export, tmp_path):
    out, model = export
    made = timm.create_model(f"local-dir:{out}", pretrained=True, **TRAIN)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(made), ModelEmaV2(made).module, ModelEmaV3(made).module):
        assert torch.equal(twin.eval()(images), model(images))
    optimizer = create_optimizer_v2(made, opt="adamw", lr=1e-3, layer_decay=0.75)
    saver = CheckpointSaver(
        made, optimizer, Namespace(model="x"), checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    begun = timm.create_model(f"local-dir:{out}", pretrained=False, **(TRAIN | {"checkpoint_path": path}))
    loaded = timm.create_model(f"local-dir:{out}", pretrained=False, **TRAIN)
    assert not torch.equal(loaded.eval()(images), model(images))  # nothing was loaded yet
    load_checkpoint(loaded, path)
    for twin in (begun, loaded):
        assert torch.equal(twin.eval()(images), model(images))


def test_timms_tasks_stop_and_continue_an_exported_model(export, tmp_path):
    """What train.py does since it has tasks: a step, a moving average, a checkpoint of both, --resume."""
    tasks = pytest.importorskip("timm.task", reason="this timm's train.py has no tasks yet")
    out, model = export
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def begin(pretrained):
        made = timm.create_model(f"local-dir:{out}", pretrained=pretrained, **(TRAIN | {"drop_path_rate": 0.1}))
        task = tasks.ClassificationTask(made, torch.nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
        return task, create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-3, layer_decay=0.75)

    task, optimizer = begin(True)
    task.setup_ema(decay=0.5)
    task.get_trainable_module().train()
    with torch.autocast("cpu", torch.bfloat16):
        task(images, torch.arange(6) % 4)["loss"].backward()
    optimizer.step()
    task.update_ema(step=1)
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, Namespace(model="x"), task=task, **folders)
    saver.save_checkpoint(0, metric=1.0)

    path = str(tmp_path / "last.pth.tar")
    again, its_optimizer = begin(False)
    assert tasks.resume_task_checkpoint(again, path, its_optimizer, log_info=False) == 1  # the epoch to continue with
    again.setup_ema(decay=0.5)
    tasks.load_task_ema_checkpoint(again, path)
    for ema in (False, True):
        ended, resumed = (each.get_trainable_module(ema=ema).eval() for each in (task, again))
        assert torch.equal(resumed(images), ended(images))
        assert not torch.equal(ended(images), model(images))
        begun = timm.create_model(f"local-dir:{out}", **TRAIN)
        load_checkpoint(begun, path, use_ema=ema)
        assert torch.equal(begun.eval()(images), ended(images))
    assert its_optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_the_readmes_launcher_runs_a_script_that_knows_no_plugins(export, tmp_path):
    out, model = export
    readme = (Path(__file__).parents[1] / "supernet" / "README.md").read_text(encoding="utf-8")
    [launcher] = re.findall(r"`with_poolshare\.py`:\n\n```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "with_poolshare.py").write_text(launcher)
    (tmp_path / "script.py").write_text(
        "import sys, timm, torch\n"
        "if __name__ == '__main__':\n"
        "    model = timm.create_model(sys.argv[1], pretrained=True).eval()\n"
        "    torch.save(model(torch.ones(1, 3, 64, 64)), sys.argv[2])\n"
    )
    words = [sys.executable, "with_poolshare.py", "script.py", f"local-dir:{out}", "logits.pt"]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.ones(1, 3, 64, 64)))
