"""Read weights from a file or a folder, without running code in it, and load them into a base model.

Everything must fit, except for what timm adapts as well. A card beside the weights (timm's config.json) says which model they
are of, what its classes are called and what images it takes.
"""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, clean_state_dict

from poolshare.space import ModelError

from .classes import Head, Names, names_of
from .data.listing import some

HEADS = ("head", "head_dist")  # a distilled DeiT has two
SOURCES = ("local-dir:", "hf-hub:", "hf_hub:")  # timm's, before the name of a model
CARD = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")  # as timm and transformers name them, the best first
ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct")
# Where training scripts keep a model's weights; moving averages come first, as in timm.
AVERAGES = ("state_dict_ema", "model_ema")
HOLDERS = (*AVERAGES, "state_dict", "model", "model_state_dict", "net", "network", "weights")
NAMED_BY = ("label_names", "class_names", "classes", "class_to_idx", "id2label")


@dataclass(frozen=True)
class Card:
    """What config.json beside weights says.

    model: timm's name. model_args: its options. img_size, in_chans, preprocessing (timm's mean, std, interpolation and
    crop_pct): what images it takes. names: its classes in the order of the head, where it names them.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int | tuple[int, int] | None = None
    in_chans: int | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    names: Names | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Weights that were read. name: what the user called them. tensors: by timm's names, as far as is known."""

    name: str
    tensors: dict[str, torch.Tensor]
    names: Names | None = None
    said_by: str = ""
    notes: tuple[str, ...] = ()

    @property
    def head(self) -> Head | None:
        """The classifier among them; None where there is none."""
        return self._head(f"{HEADS[0]}.weight", 2)

    @property
    def map_head(self) -> Head | None:
        """The head for every pixel among them; None where there is none."""
        return self._head(f"{HEADS[0]}.classify.weight", 4)

    def _head(self, key: str, dimensions: int) -> Head | None:
        weight = self.tensors.get(key)
        if weight is None or weight.ndim != dimensions or not len(weight):
            return None
        names = self.names if self.names is not None and len(self.names) == len(weight) else None
        return Head(len(weight), self.name, names, self.said_by if names else "")


def has_card(name: str) -> bool:
    """Whether a model or weights are called by a folder or a repository, in which timm keeps a card beside them."""
    return name.startswith(SOURCES) or Path(name).expanduser().is_dir()


def read_card(name: str, option: str = "--weights") -> Card:
    """The card of `local-dir:FOLDER`, `hf-hub:NAME` or a folder. option: what it was given as, for messages.

    Raises ModelError where there is none, or it is not one of a timm model.
    """
    path = file_of(name, option, CARD)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "architecture" not in found:
            kind = (
                f" of transformers ({found['model_type']})" if isinstance(found, dict) and "model_type" in found else ""
            )
            raise ValueError(f"it names no timm architecture{kind}")
        given = found.get("pretrained_cfg", found)
        options = {key: value for key, value in found.get("model_args", {}).items() if key != "num_classes"}
        model = found["architecture"]
        if model == "poolshare_vit":  # one that was searched: what it was made from
            model = options.pop("base")
            for key in ("architecture", "sharing"):
                options.pop(key, None)
        size = options.pop("img_size", None) or given.get("input_size", (None,) * 3)[1:]
        size = [size, size] if isinstance(size, int) else size
        names = found.get("label_names") or given.get("label_names")
        chans = options.pop("in_chans", None) or given.get("input_size", (None,))[0]
        return Card(
            str(model),
            options,
            size[0] if size[0] == size[1] else (size[0], size[1]),
            chans,
            {key: given[key] for key in PREPROCESSING if given.get(key) is not None},
            names_of(names) if names else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(
            f"{option} {name}: {path} is not the card of a timm model ({error}); give the weights' file as --weights and the "
            "timm model they were made for as --model"
        ) from None


def read_checkpoint(name: str) -> Checkpoint:
    """Read weights from a file, a folder with a card, `local-dir:FOLDER` or `hf-hub:NAME`; nothing in them is executed.

    Files are safetensors, or what torch.save wrote (.pth, .pt, .bin, .ckpt, .pth.tar), read with weights_only. A state dict may lie
    inside a training state, and its names begin with `module.`, `_orig_mod.` or the name of a wrapper's attribute.

    Raises ModelError for what cannot be read, holds pickled code, no weights, or values that are not finite.
    """
    folder, what = has_card(name), f"--weights {name}"
    path = file_of(name, "--weights") if folder else Path(name).expanduser()
    content = _read(path, what)
    notes: list[str] = []
    inner: Any = content
    holder = next((key for key in HOLDERS if isinstance(content.get(key), Mapping)), None)
    if holder is not None:
        inner = content[holder]
        if holder in AVERAGES:
            notes.append(f"{path.name}: the moving average of its weights ({holder}) is taken, as in timm")
    tensors = {str(key): value for key, value in inner.items() if isinstance(value, torch.Tensor)}
    tensors = _unwrapped(tensors, path, notes)
    _refuse(tensors, what)
    names, said_by = _names_in(content), path.name
    if folder and (card := read_card(name)).names:
        names, said_by = card.names, f"{name.rstrip('/')}/{CARD}"
    return Checkpoint(name if folder else path.name, tensors, names, said_by, tuple(notes))


def load_base_weights(
    model: Any, found: Checkpoint | str | Path, name: str, fresh_head: bool = False
) -> tuple[str, ...]:
    """Put weights into a timm ViT or a supernet over one; poolings keep theirs.

    As in timm, the position embedding is resampled to another grid, patches to another size, and the patch embedding to
    other channels. Returns what was adapted, as notes. name: of the model, for messages. fresh_head: keep the head that
    the model was made with, or none, instead of the checkpoint's.

    Raises ModelError listing what is missing, unknown or of another shape; the model is then as it was.
    """
    found = found if isinstance(found, Checkpoint) else read_checkpoint(str(found))
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("poolings.")}
    adapted, notes = _adapt(model, found)
    if fresh_head:
        old = (*(f"{head}." for head in HEADS), *(("attn_pool.",) if model.attn_pool is None else ()))
        adapted = {key: value for key, value in adapted.items() if not key.startswith(old)}
        adapted |= {key: value for key, value in wanted.items() if key.startswith(old)}
    has, needs = ({key: tuple(value.shape) for key, value in one.items()} for one in (adapted, wanted))
    _compare(found.name, name, has, needs)
    model.load_state_dict(adapted, strict=False)  # only poolings can be missing
    return (*found.notes, *notes)


# Reading


def file_of(name: str, option: str, wanted: str | None = None) -> Path:
    """A file of a folder or repository: `wanted`, or that of the weights."""
    source = next((one for one in SOURCES if name.startswith(one)), "")
    if source.startswith("hf"):
        return _from_hub(name.removeprefix(source), f"{option} {name}", (wanted,) if wanted else FILES)
    folder = Path(name.removeprefix(source)).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{option} {name}: there is no folder {folder}; give one that holds {CARD} and weights")
    here = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    if wanted is None:
        wanted = next((file for file in FILES if file in here), None)
        others = [file for file in here if file.lower().endswith(ENDINGS)]
        if wanted is None and len(others) == 1:
            wanted = others[0]
        if wanted is None and others:
            raise ModelError(f"{option} {name} holds {', '.join(others[:5])}: give one of these files as --weights")
    if wanted not in here:
        raise ModelError(
            f"{option} {name} holds no {wanted or ' or '.join(FILES)}: give the weights' file as --weights and a timm "
            "model as --model, or a folder as timm's save_for_hf or `poolshare export` writes it"
        )
    return folder / wanted


def _from_hub(repository: str, what: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    problem: Exception | None = None
    for file in files:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except EntryNotFoundError as error:
            problem = problem or error
        except Exception as error:  # whatever a network, a cache or a name that is none raises
            problem = error
            break
    reason = str(problem).strip().partition("\n")[0]
    raise ModelError(
        f"{what} could not be fetched ({type(problem).__name__}: {reason:.200}); download its folder, and give that as "
        "local-dir:FOLDER"
    )


def _read(path: Path, what: str) -> dict[str, Any]:
    """What a file holds, by name."""
    if path.suffix.lower() in (".npz", ".npy"):
        raise ModelError(f"{what} is a NumPy archive; give these weights as timm keeps them, in a safetensors file")
    try:
        if path.suffix.lower() == ".safetensors":
            return dict(load_file(path))  # takes no more memory than the file has bytes
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm and DeiT keep their options in one
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(_pickled(path, what, error)) from None
    except Exception as error:  # an untrusted file: torch may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{what} cannot be read ({type(error).__name__}: {reason:.200}); give a safetensors file such as timm's "
            "model.safetensors, or what torch.save(model.state_dict(), FILE) wrote"
        ) from None
    if not isinstance(found, Mapping):
        raise ModelError(f"{what} holds a {type(found).__name__}, not weights by name; save model.state_dict()")
    return dict(found)


def _pickled(path: Path, what: str, error: Exception) -> str:
    try:
        code = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not what torch.save wrote since 1.6
        code = []
    if not code and "GLOBAL" not in str(error) and not _calls_code(path):
        return f"{what} cannot be read ({str(error).partition(chr(10))[0]:.100}); give what torch.save wrote"
    named = f" ({', '.join(sorted(code)[:3])})" if code else ""
    return (
        f"{what} holds pickled code{named}, which is not run here. If you trust the file, load it yourself with "
        "torch.load(FILE, weights_only=False), and save its weights alone: torch.save(model.state_dict(), 'weights.pth')"
    )


def _calls_code(path: Path) -> bool:
    """Whether a file that pickle wrote by itself, without torch, names anything to import; nothing of it is run."""
    try:
        return any(operation.name.endswith("GLOBAL") for operation, _, _ in pickletools.genops(path.read_bytes()))
    except Exception:  # not a pickle
        return False


def _names_in(content: Mapping[str, Any]) -> Names | None:
    for key in NAMED_BY:
        try:
            return names_of(content.get(key))
        except (ValueError, TypeError):
            continue
    return None


def _unwrapped(tensors: dict[str, torch.Tensor], path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """The same by the model's own names: without the prefixes of DDP, torch.compile and a wrapper's attribute."""
    tensors = clean_state_dict(tensors)
    tensors.pop("n_averaged", None)  # of torch's AveragedModel
    stem = "patch_embed.proj.weight"
    prefixes = [key.removesuffix(stem) for key in tensors if key.endswith(f".{stem}")]
    if stem in tensors or len(prefixes) != 1 or "visual." in prefixes[0]:  # the last are CLIP's, which timm reads
        return tensors
    inside = {key.removeprefix(prefixes[0]): v for key, v in tensors.items() if key.startswith(prefixes[0])}
    outside = sorted(key for key in tensors if not key.startswith(prefixes[0]))
    note = f"{path.name}: the weights below {prefixes[0].rstrip('.')!r} are taken"
    notes.append(note + (f", {', '.join(outside[:3])}{', …' if len(outside) > 3 else ''} left aside" * bool(outside)))
    return clean_state_dict(inside)


def _refuse(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise ModelError for weights that are none of a timm model, or not finite."""
    if not tensors:
        raise ModelError(f"{what} holds no tensors by name; save model.state_dict()")
    for mark, problem in (
        (".embeddings.patch_embeddings.", "its names are those of transformers' own ViT, not timm's; fine-tune timm's "
         "model (transformers loads it as TimmWrapperForImageClassification), or give weights by timm's names"),
        ("lora_A.", "it holds LoRA adapters; merge them into the model (peft's merge_and_unload) and save that"),
        (".attn.v.", "it is a searched model in which layers share attention, so it lacks queries and keys of its own; "
         "search from the weights it came from, or from an export of --architecture dense"),
    ):  # fmt: skip
        if any(mark in key for key in tensors):
            raise ModelError(f"{what} cannot begin a search: {problem}")
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"{what}: {key} holds values that are not finite (NaN or inf), so every answer would be meaningless; "
                "take a checkpoint from before its training failed"
            )


# Fitting


def _adapt(model: Any, found: Checkpoint) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What timm makes of a checkpoint: names of other releases, grid, patch size, channels; and notes of it."""
    tensors = {key: value for key, value in found.tensors.items() if not key.startswith("poolings.")}
    stem = f"{model.pretrained_cfg['first_conv']}.weight"  # where the image's channels come in
    notes, weight, positions = [], tensors.get(stem), tensors.get("pos_embed")
    try:
        kind = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("timm."))
        adapted = import_module(kind.__module__).checkpoint_filter_fn(dict(tensors), model)
        if weight is not None and weight.ndim == 4 and weight.shape[1] != model.in_chans:
            adapted[stem] = adapt_input_conv(model.in_chans, adapted[stem])
            notes.append(
                f"{found.name} takes {weight.shape[1]} channels, the model {model.in_chans}: adapted as in timm"
            )
    except Exception as error:  # untrusted tensors: timm's functions may raise anything
        raise ModelError(
            f"--weights {found.name} cannot be adapted to this model ({type(error).__name__}: {str(error)[:100]}); give "
            "the --model it was made for"
        ) from None
    after = adapted.get("pos_embed")
    if positions is not None and after is not None and positions.shape != after.shape:
        notes.append(
            f"{found.name} has positions for {positions.shape[1]} tokens, the model {after.shape[1]}: resampled as in timm"
        )
    return adapted, notes


def _compare(source: str, name: str, has: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    others = [f"{key} {has[key]}, not {wanted[key]}" for key in wanted if key in has and has[key] != wanted[key]]
    complaints = {"lacks": sorted(wanted.keys() - has.keys()), "has besides": sorted(has.keys() - wanted.keys())}
    differences = [
        f"it {what} {some(items, 3)}"
        for what, items in (complaints | {"has in another shape": others}).items()
        if items
    ]
    if differences:
        raise ModelError(
            f"--weights {source} does not fit {name}: {'; '.join(differences)}; give the --model it was made for"
        )
