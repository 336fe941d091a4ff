"""A chosen architecture → a folder that timm can load, with a card of its numbers; and such folders read back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from poolshare.space import Architecture, PoolshareError, RunError
from poolshare.space.data_kind import DataKind
from poolshare.space.files import check_folder, digest_of, remedy, sync, usual_permissions
from poolshare.supernet import Subnet, SuperNet, count_macs
from poolshare.supernet.heads.maps import tapped
from poolshare.supernet.tasks.task import Targets
from poolshare.supernet.training.checkpoint import on_cpu, read_weights, shapes_of

from ..config import SearchConfig, short_name
from ..job.dense import Tuned, load_dense, read_tuned
from ..job.folder import RunFolder, check_outside
from ..job.prepare import input_config, load_weights, make_supernet
from ..job.records import read_json, versions, write_json

FORMAT = 1
FILES = ("README.md", "config.json", "model.safetensors", "architecture.json")  # the last one says that all are there


Score = Annotated[float, Field(ge=-100, le=100)]


class DenseFacts(BaseModel):
    """The dense model of the run that an export comes from."""

    model_config = ConfigDict(extra="forbid", strict=True)

    architecture: str
    weights: str  # the file
    sha256: str
    teaches: bool  # an export of its run, when that is retrained and nothing is said of a teacher
    search_score: Score | None = None  # on the search-validation images
    test_score: Score | None = None


class Facts(BaseModel):
    """What architecture.json must hold; it may hold more."""

    model_config = ConfigDict(extra="allow", strict=True)

    architecture: str
    classes: list[str]
    macs: int = Field(gt=0)
    dense_macs: int = Field(gt=0)
    parameters: int = Field(gt=0)
    task: str
    targets: Targets
    ignore_index: int = 255  # of masks
    metric: str  # what the scores are called
    search_score: Score | None = None
    test_score: Score | None = None
    dense: DenseFacts | None = None
    data: str
    data_dir: str | None
    data_fingerprint: str
    search_data: str | None = None
    scale_16bit: bool = False
    unlabelled: bool = False  # whether the search's images had no labels
    seed: int = Field(ge=0, lt=2**32)
    batch_size: int = Field(ge=1)
    threads: int | None = Field(None, ge=1, le=1024)  # that the search was computed with
    pretrained: bool
    weights: str
    weights_sha256: str
    config_sha256: str


Side = Annotated[int, Field(ge=1, le=2**14)]


class DataConfig(BaseModel):
    """What an exported model takes for an image; part of timm's config.json."""

    model_config = ConfigDict(extra="ignore")

    input_size: tuple[Side, Side, Side]  # channels, height, width
    mean: list[Annotated[float, Field(ge=-1e3, le=1e3)]] = Field(min_length=1, max_length=3)
    std: list[Annotated[float, Field(gt=0, le=1e3)]] = Field(min_length=1, max_length=3)
    interpolation: str
    crop_pct: float = Field(gt=0, le=10)


@dataclass(frozen=True)
class Exported:
    """An exported folder: the model with its weights, and what is known about it."""

    path: Path
    model: Subnet
    facts: dict[str, Any]  # architecture.json
    data_config: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct
    digest: str  # of its weights

    @property
    def share(self) -> float:
        """Of the dense model's MACs, 0 to 1."""
        return float(self.facts["macs"] / self.facts["dense_macs"])


def load_supernet(folder: RunFolder, architecture: Architecture | None = None) -> SuperNet:
    """The trained supernet of a finished search, in evaluation mode. Raises RunError where it is missing or damaged.

    architecture: with the dense model's weights instead, where those are better for it, see `better_with_dense`.
    """
    config, summary = folder.config.without_weights, folder.read_summary()  # the weights come from the run
    supernet = make_supernet(config, summary["outputs"])
    if architecture is not None and better_with_dense(folder, architecture) is not None:
        load_dense(supernet, folder.dense)
    else:
        load_weights(supernet, folder.supernet)
    return supernet


def better_with_dense(folder: RunFolder, architecture: Architecture) -> float | None:
    """Its score on the search-validation images with the dense model's weights, where the supernet's are worse.

    None where they are not, or where it was not tried: a search tries its frontier.
    """
    summary, tuned = folder.read_summary(), read_tuned(folder)
    if tuned is None:
        return None
    if str(architecture) == summary["dense"]["architecture"]:
        return tuned.score
    found = summary.get("with_dense_weights", {}).get(str(architecture))
    candidates = folder.read_candidates()
    scored = candidates[candidates["architecture"] == str(architecture)][summary["task"]["column"]]
    return found if found is not None and len(scored) and found > scored.iloc[0] else None


def export_architecture(folder: RunFolder, architecture: Architecture, out: Path) -> dict[str, Any]:
    """Export one architecture of a finished search with the supernet's weights; returns what is known about it."""
    out = Path(out).resolve()
    check_new(out)
    check_outside(out, folder.config.data)
    config, summary = folder.config, folder.read_summary()
    classes = tuple(summary["classes"])
    supernet, by_dense = load_supernet(folder, architecture), better_with_dense(folder, architecture)
    tuned = read_tuned(folder)
    supernet.space.check(architecture)
    candidates = folder.read_candidates()
    scored = candidates[candidates["architecture"] == str(architecture)]
    task = summary["task"]
    score = [by_dense] if by_dense is not None else scored[task["column"]].tolist()
    model = Subnet.from_supernet(supernet, architecture)
    data_config = input_config(config)
    facts = {
        "architecture": str(architecture),
        "macs": count_macs(model, (torch.zeros(1, *data_config["input_size"]),)),
        "dense_macs": summary["dense"]["macs"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "task": config.task,
        "targets": task["targets"],
        "ignore_index": config.ignore_index,
        "metric": task["metric"],
        **({"search_score": float(score[0])} if score and summary.get("labelled", True) else {}),
        **_loss_facts(summary, scored),
        "data": config.data,
        "data_dir": config.data_dir,
        "data_fingerprint": folder.data_fingerprint,
        "search_data": config.search_data and str(Path(config.search_data).expanduser().resolve()),
        "scale_16bit": config.scale_16bit,
        "unlabelled": config.unlabelled,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "pretrained": config.warm,
        "threads": config.threads,
        "weights": _origin(config, by_dense is not None or (tuned is not None and not config.epochs)),
        **({"dense": _dense_facts(folder, tuned)} if tuned or not config.training else {}),
    }
    save_export(out, model, classes, data_config, facts)
    return facts


def _origin(config: SearchConfig, dense: bool) -> str:
    """Where an export's weights come from. dense: from the dense model, if any was tuned."""
    if not config.training:
        return f"{short_name(config.weights or config.model)}, not trained any further"
    if dense:
        return f"the dense model, tuned for {config.tune_epochs} epochs on {short_name(config.data)}"
    return f"the supernet, trained for {config.epochs} epochs on {short_name(config.data)}"


def _loss_facts(summary: Mapping[str, Any], scored: pd.DataFrame) -> dict[str, Any]:
    """The loss of an architecture that was compared by it, and what it is."""
    if "loss" not in scored or scored.empty:
        return {}
    task = summary["task"]
    return {"search_loss": float(scored["loss"].iloc[0]), "loss": task[summary["score"]], "unit": task["unit"]}


def _dense_facts(folder: RunFolder, tuned: Tuned | None) -> dict[str, Any]:
    """What an export knows about the run's dense model.

    tuned: None: nothing was trained, so the supernet's weights are the dense model's.
    """
    summary, file = folder.read_summary(), folder.dense if tuned else folder.supernet
    return {
        "architecture": summary["dense"]["architecture"],
        "weights": str(file.resolve()),
        "sha256": digest_of(file),
        "teaches": folder.config.teaches,
        **({"search_score": summary["dense"][summary["task"]["column"]]} if summary.get("labelled", True) else {}),
    }


def save_export(
    out: Path, model: Subnet, classes: tuple[str, ...], data_config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the folder `out`: config.json and model.safetensors for timm, architecture.json, and a README.md card.

    data_config: input_size, mean, std, interpolation, crop_pct the model was trained with. facts: JSON values;
    `macs`, `dense_macs`, `parameters`, `data` and accuracies are shown on the card.
    Raises RunError where `out` exists and is not empty; the folder appears whole or not at all. One that is there is
    filled, for it may be where a shell stands or a disk is mounted.
    """
    out = Path(out).resolve()
    check_new(out)
    config = _timm_config(model, classes, data_config)
    try:
        config_text = json.dumps(config, indent=2)
    except TypeError as error:
        raise RunError(
            f"the model was built with an option that JSON cannot hold ({error}); build it from plain values"
        ) from None
    record = {"format": FORMAT, "architecture": str(model.architecture), **model.architecture.to_json(), **facts}
    record |= {"classes": list(classes), "versions": versions()}
    fills = out.exists()
    temporary = (out / f".{os.getpid()}.tmp") if fills else out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with usual_permissions(temporary / "model.safetensors"):
            save_file(on_cpu(model.state_dict()), temporary / "model.safetensors")
        (temporary / "config.json").write_text(config_text + "\n", encoding="utf-8")
        record["weights_sha256"] = digest_of(temporary / "model.safetensors")
        record["config_sha256"] = digest_of(temporary / "config.json")
        write_json(temporary / "architecture.json", record)
        (temporary / "README.md").write_text(_card(out, record, config), encoding="utf-8", errors="backslashreplace")
        for file in temporary.iterdir():  # the state of a retraining goes once this is done
            sync(file)
        sync(temporary)
        if fills:
            for name in FILES:
                os.replace(temporary / name, out / name)
            sync(out)
        else:
            os.replace(temporary, out)
            sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written ({error}); free some space, or choose another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _timm_config(model: Subnet, classes: tuple[str, ...], data_config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as timm has it."""
    base, options = model.base
    options = {key: value for key, value in options.items() if key != "num_classes"}
    return {
        "architecture": "poolshare_vit",
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": list(classes),
        "model_args": {"base": base, "architecture": str(model.architecture), "sharing": model.sharing, **options},
        "pretrained_cfg": {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()},
            "num_classes": model.num_classes,
            "fixed_input_size": True,
            "first_conv": model.pretrained_cfg["first_conv"],  # type: ignore[index]
            # what timm makes anew for another number of classes
            "classifier": "head.classify" if tapped(model) else model.pretrained_cfg["classifier"],  # type: ignore[index]
        },
    }


def check_new(out: Path) -> None:
    """Raise RunError where something stands at `out` already; an empty folder, but for hidden names, does not."""
    check_folder(out)
    if out.exists() and any(not one.name.startswith(".") for one in out.iterdir()):
        raise RunError(f"{out} exists already; choose another --out, nothing is ever overwritten")


def load_export(path: str | Path) -> Exported:
    """Read an exported folder. Raises RunError where it is none, or damaged."""
    path = Path(path)
    for name in ("config.json", "model.safetensors", "architecture.json"):
        if not (path / name).is_file():
            raise RunError(
                f"{path} is not an exported folder: it has no {name}; `poolshare export RUN --out {path}` makes one"
            )
    try:
        facts = read_json(path / "architecture.json")
        if facts["format"] != FORMAT:
            raise RunError(f"{path} has format version {facts['format']!r:.40}, this poolshare reads {FORMAT}")
        Facts(**facts)
        for name, key in (("config.json", "config_sha256"), ("model.safetensors", "weights_sha256")):
            if digest_of(path / name) != facts[key]:
                raise RunError(f"{path / name} is not what was written there; export it again")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config["architecture"] != "poolshare_vit":
            raise RunError(f"{path / 'config.json'} is of another model than poolshare_vit")
        data_config = DataConfig(**config["pretrained_cfg"]).model_dump()
        with torch.device("meta"):  # nothing is allocated before the file is known to hold as much
            shapes = shapes_of(timm.create_model(f"local-dir:{path}"))
        weights = read_weights(path / "model.safetensors", shapes)
        model: Any = timm.create_model(f"local-dir:{path}")
        model.load_state_dict(weights)
        if Architecture.from_json(facts) != model.architecture or str(model.architecture) != facts["architecture"]:
            raise RunError(
                f"config.json of {path} holds '{model.architecture}', architecture.json '{facts['architecture']}': "
                "one of them was edited; export it again"
            )
        if facts["task"] == "classification" and len(facts["classes"]) != model.num_classes:
            raise RunError(
                f"{path} names {len(facts['classes'])} classes, but its head has {model.num_classes}; export it again"
            )
    except PoolshareError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise RunError(f"{path} was not written by poolshare, or is damaged ({where}: {problem['msg']})") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error}); {remedy(error)}") from None
    except Exception as error:  # damage shows as anything up to a RuntimeError inside timm and safetensors
        raise RunError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); export it again") from None
    return Exported(path, model, facts, data_config, facts["weights_sha256"])


def _card(out: Path, record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """README.md of an exported folder."""
    numbers = [
        f"| MACs per image | {record['macs']:,} ({record['macs'] / record['dense_macs']:.1%} of the dense model's) |",
        f"| parameters | {record['parameters']:,} |",
    ]
    dense = record.get("dense") or {}
    if "search_loss" in record:
        numbers.append(f"| {record['loss']} | {record['search_loss']:.4f} {record['unit']} |")
    for key, label in (("search_score", "before retraining, search-validation"), ("test_score", "test")):
        if key in record:
            beside = f" (dense model: {dense[key]:.2f} %)" if key in dense else ""
            numbers.append(f"| {record['metric']}, {label} | {record[key]:.2f} %{beside} |")
    height, width = config["pretrained_cfg"]["input_size"][1:]
    given = DataKind.of(record["data"]) is DataKind.GIVEN or record.get("unlabelled")
    where = " --data FOLDER" if given else ""
    return f"""# {config["model_args"]["base"]}, searched by poolshare

`{record["architecture"]}`: runs of tokens[@operator][*length]; a run is one attention map and the blocks that use it.

| | |
|---|---|
{chr(10).join(numbers)}
| input | {height}×{width}, {len(record["classes"])} classes |

```python
import timm, poolshare.supernet  # the import registers "poolshare_vit"
model = timm.create_model("local-dir:{out.name}", pretrained=True)
```

Retrain it, then measure it:

```
poolshare retrain {shlex.quote(out.name)}{where}
poolshare evaluate {shlex.quote(out.name + "-retrained")}{where}
```

Data: {short_name(record["data"])}. Its weights come from {record["weights"]}.
"""
