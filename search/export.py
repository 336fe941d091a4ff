"""A chosen architecture → a folder that timm can load, with a card of its numbers; and such folders read back."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file

from poolshare.space import Architecture, PoolshareError, RunError
from poolshare.supernet import Subnet, SuperNet, measure_macs, measure_parameters

from .job import input_config, load_weights, make_supernet, model_options
from .run import RunFolder, versions

FORMAT = 1
FACTS = {"architecture", "macs", "dense_macs", "parameters", "data", "data_dir", "data_fingerprint", "seed"}
FACTS |= {"batch_size", "pretrained", "weights", "classes"}  # what architecture.json must hold


@dataclass(frozen=True)
class Exported:
    """An exported folder: the model with its weights, and what is known about it."""

    path: Path
    model: Subnet
    facts: dict[str, Any]  # architecture.json
    data_config: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct
    digest: str  # of its weights


def load_supernet(folder: RunFolder) -> SuperNet:
    """The trained supernet of a finished search, in evaluation mode. Raises RunError where it is missing or damaged."""
    config = folder.config.without_weights  # the weights come from the run
    supernet = make_supernet(config, model_options(config) | {"num_classes": len(folder.read_summary()["classes"])})
    load_weights(supernet, folder.supernet)
    return supernet


def export_architecture(folder: RunFolder, architecture: Architecture, out: Path) -> dict[str, Any]:
    """Export one architecture of a finished search with the supernet's weights; returns what is known about it."""
    config, summary = folder.config, folder.read_summary()
    classes = tuple(summary["classes"])
    supernet = load_supernet(folder)
    supernet.space.check(architecture)
    candidates = folder.read_candidates()
    scored = candidates[candidates["architecture"] == str(architecture)]
    facts = {
        "macs": measure_macs(supernet).total(architecture),
        "dense_macs": summary["dense"]["macs"],
        "parameters": measure_parameters(supernet).total(architecture),
        **({"search_top1": float(scored["top1"].iloc[0])} if len(scored) else {}),
        "data": _absolute(config.data, config.data_dir),
        "data_dir": config.data_dir and str(Path(config.data_dir).resolve()),
        "data_fingerprint": folder.data_fingerprint,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "pretrained": config.warm,
        "weights": f"the supernet, trained for {config.epochs} epochs on {config.data}",
    }
    model = Subnet.from_supernet(supernet, architecture)
    save_export(out, model, classes, input_config(config.model, model_options(config)), facts)
    return facts


def _absolute(data: str, data_dir: str | None) -> str:
    """A folder of images by a path that holds from anywhere; other data by their name."""
    path = Path(data_dir or "", data).expanduser()
    return str(path.resolve()) if data != "digits" and path.is_dir() else data


def save_export(
    out: Path, model: Subnet, classes: tuple[str, ...], data_config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the folder `out`: config.json and model.safetensors for timm, architecture.json, and a README.md card.

    data_config: input_size, mean, std, interpolation, crop_pct the model was trained with. facts: JSON values;
    `macs`, `dense_macs`, `parameters`, `data` and accuracies are shown on the card.
    Raises RunError where `out` exists and is not empty; the folder appears whole or not at all.
    """
    check_new(out)
    base, options = model.base
    options = {key: value for key, value in options.items() if key != "num_classes"}
    config = {
        "architecture": "poolshare_vit",
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": list(classes),
        "model_args": {"base": base, "architecture": str(model.architecture), **options},
        "pretrained_cfg": {
            **{key: _plain(value) for key, value in data_config.items()},
            "num_classes": model.num_classes,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    try:
        config_text = json.dumps(config, indent=2)
    except TypeError as error:
        raise RunError(
            f"the model was built with an option that JSON cannot hold ({error}); build it from plain values"
        ) from None
    record = {"format": FORMAT, "architecture": str(model.architecture), **model.architecture.to_json(), **facts}
    record |= {"classes": list(classes), "versions": versions()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(
            {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()},
            temporary / "model.safetensors",
        )
        record["weights_sha256"] = _digest(temporary / "model.safetensors")
        (temporary / "config.json").write_text(config_text + "\n", encoding="utf-8")
        (temporary / "architecture.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(out, record, config), encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written ({error}); free some space, or choose another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(out: Path) -> None:
    """Raise RunError where something stands at `out` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; choose another --out, nothing is ever overwritten")


def load_export(path: str | Path) -> Exported:
    """Read an exported folder. Raises RunError where it is none, or damaged."""
    path = Path(path)
    for name in ("config.json", "model.safetensors", "architecture.json"):
        if not (path / name).is_file():
            raise RunError(
                f"{path} is no exported folder: it holds no {name}; `poolshare export RUN --out {path}` makes one"
            )
    try:
        facts = json.loads((path / "architecture.json").read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise RunError(f"{path} has format version {facts['format']!r}, this poolshare reads {FORMAT}")
        missing = FACTS - set(facts)
        if missing:
            raise RunError(f"{path / 'architecture.json'} lacks {', '.join(sorted(missing))}; export it again")
        if json.loads((path / "config.json").read_text(encoding="utf-8"))["architecture"] != "poolshare_vit":
            raise RunError(f"{path / 'config.json'} is of another model than poolshare_vit")
        digest = _digest(path / "model.safetensors")
        if facts.get("weights_sha256", digest) != digest:
            raise RunError(f"{path / 'model.safetensors'} is not what was written there; export it again")
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
        if Architecture.from_json(facts) != model.architecture or str(model.architecture) != facts["architecture"]:
            raise RunError(
                f"config.json of {path} holds '{model.architecture}', architecture.json '{facts['architecture']}': "
                "one of them was edited; export it again"
            )
        if len(facts["classes"]) != model.num_classes:
            raise RunError(
                f"{path} names {len(facts['classes'])} classes, but its head has {model.num_classes}; export it again"
            )
    except PoolshareError:
        raise
    except Exception as error:  # damage shows as anything from OSError to RuntimeError inside timm and safetensors
        raise RunError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); export it again") from None
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return Exported(path, model, facts, {key: model.pretrained_cfg[key] for key in keys}, digest)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _card(out: Path, record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """README.md of an exported folder."""
    numbers = [
        f"| MACs per image | {record['macs']:,} ({record['macs'] / record['dense_macs']:.1%} of the dense model's) |"
    ]
    numbers.append(f"| parameters | {record['parameters']:,} |")
    for key, label in (("search_top1", "top-1 in the supernet, search-validation"), ("test_top1", "top-1, test")):
        if key in record:
            numbers.append(f"| {label} | {record[key]:.2f} % |")
    height, width = config["pretrained_cfg"]["input_size"][1:]
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
poolshare retrain {shlex.quote(out.name)}
poolshare evaluate {shlex.quote(out.name + "-retrained")}
```

Data: {record["data"]}. Its weights come from {record["weights"]}.
"""
