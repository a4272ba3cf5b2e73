"""Which files of a checkpoint are copied beside its weights, and which are left out.

One idea: everything is decided from names, so a folder on disk and a repository on the hub, of which nothing
has been fetched yet, get the same answer. `checkpoint/weights.py` chooses the weights in the same way. The
folder that holds them is their home; only there can another file be a twin of them. Weights in other folders
are other modules (sentence-transformers' `2_Dense/`) and are copied; exports (ONNX, GGUF…) and trainer state
are left out wherever they lie. Every file that is left out is named, with the reason.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from functools import cache

from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX

#: What the names of weight files end in: safetensors, which is taken where there is a choice, and pickles.
SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".th", ".ckpt")
WEIGHTS_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)

#: What the name of an index ends in, and the shards' names with it.
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")

#: The file that makes a folder a checkpoint of torch.distributed.checkpoint, which writes it last; and what
#: the names of the files with the weights end in.
METADATA = ".metadata"
CHUNKS_SUFFIX = ".distcp"

#: Why weights that were not chosen are left out.
OTHER_WEIGHTS = "other weights than those chosen (--weights chooses)"

#: Why folders are left out that can be checkpoints themselves.
TRAINER_CHECKPOINT = "a checkpoint of the trainer"
SHARDED_STATE = "the weights in another format (PyTorch)"

#: Folders that are left out whole.
_FOLDERS_LEFT_OUT = (
    (r"\.git", "version control"),
    (r"\.(cache|huggingface)", "a download cache"),
    (r"\.noisytune-.*", "left by an interrupted run of noisytune"),
    (r"checkpoint-\d+", TRAINER_CHECKPOINT),
    (r"global_step\d+|optimizer_\d+", "optimizer and trainer state"),
    (r"pytorch_model_fsdp_\d+", SHARDED_STATE),
    (r".*\.(mlpackage|mlmodelc)", "the weights in another format (Core ML)"),
)

#: Optimizer and trainer state, wherever it lies.
_TRAINER_STATE = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "training_args.bin"),
    *("trainer_state.json", "rng_state*.pth", "random_states_*.pkl"),
)

_CHUNKED = "torch.distributed.checkpoint"

#: What is made from a model's weights, wherever it lies.
_EXPORTS = (
    ("GGUF", ("*.gguf", "*.ggml", "ggml-*.bin")),
    ("ONNX", ("*.onnx", "*.onnx_data*", "*.onnx.data*")),
    ("TensorFlow", ("*.h5", "*.h5.index.json", "*.keras", "saved_model.pb", "*.ckpt.*", "*.ckpt-*")),
    ("TensorFlow Lite", ("*.tflite",)),
    ("Flax", ("*.msgpack", "*.msgpack.index.json")),
    ("OpenVINO", ("openvino_*.xml", "openvino_*.bin")),
    ("Rust", ("rust_model.ot",)),
    ("Core ML", ("*.mlmodel",)),
    ("Paddle", ("*.pdparams",)),
    ("PyTorch", ("consolidated.*.pth", "pytorch_model_fsdp*.bin")),
)

#: The weights as a pickle, in the weights' home only.
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index*.json", "*.ckpt")
_TWIN_SUFFIXES = (*PICKLE_SUFFIXES, ".pkl", ".bin.index.json")
_PICKLE_STEMS = ("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model", "consolidated")


@dataclass(frozen=True)
class Listing:
    """The names in a checkpoint's folder, relative to it and with `/`.

    `files` are regular files; `special` maps what is there but is none (a FIFO, a broken link) to what it
    is; `folders` maps folders that are left out whole, written `NAME/`, to the reason.
    """

    files: tuple[str, ...]
    special: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)


def list_names(names: Iterable[str]) -> Listing:
    """Make the listing of a repository from the names of all its files."""
    files: list[str] = []
    folders: dict[str, str] = {}
    for name in sorted(names):
        parts = name.split("/")
        for depth, part in enumerate(parts[:-1], start=1):
            if why := why_folder_left_out(part):
                folders["/".join(parts[:depth]) + "/"] = why
                break
        else:
            files.append(name)
    return Listing(tuple(files), {}, folders)


def why_folder_left_out(name: str) -> str | None:
    """Return why a folder of this name is left out whole, or None when it is copied."""
    return next((why for pattern, why in _FOLDERS_LEFT_OUT if re.fullmatch(pattern, name)), None)


def is_plain_name(name: str) -> bool:
    """Tell whether `name` is a relative, printable path that cannot leave the folder it is relative to."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and name.isprintable()


def is_no_model(name: str) -> bool:
    """Tell whether a file that is named like weights is something else, such as an optimizer's state."""
    base = posixpath.basename(name)
    return _matches(base, _TRAINER_STATE) or export_format(base) is not None


def export_format(base: str) -> str | None:
    """Return the format of an export that a file's name tells, or None."""
    return next((label for label, patterns in _EXPORTS if _matches(base, patterns)), None)


def arrange(
    listing: Listing, chosen: str, weights: Collection[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Sort every file but `weights` into those to copy and those left out, with the reason.

    `chosen` is what `weights.choose_weights` returned; when it is an index it is among the files to copy.
    """
    home = posixpath.dirname(chosen)
    others: list[str] = []
    left_out = [*listing.special.items(), *listing.folders.items()]
    for name in listing.files:
        if name in weights:
            continue
        why = None if name == chosen else _why_left_out(name, home, posixpath.basename(chosen))
        if why is None:
            others.append(name)
        else:
            left_out.append((name, why))
    return sorted(others), sorted(left_out)


def manifests(listing: Listing) -> list[str]:
    """Return the names of noisytune's own manifests in the checkpoint's root."""
    return [name for name in listing.files if "/" not in name and _is_manifest(name)]


def _why_left_out(name: str, home: str, chosen: str) -> str | None:
    base = posixpath.basename(name)
    at_home = posixpath.dirname(name) == home
    if "/" not in name and _is_manifest(base):
        return "the manifest of an earlier run"
    if why := why_folder_left_out(base):
        return why
    if _matches(base, _TRAINER_STATE):
        return "optimizer and trainer state"
    if label := export_format(base):
        return f"the weights in another format ({label})"
    if at_home and (base == METADATA or base.endswith(CHUNKS_SUFFIX)):
        return OTHER_WEIGHTS if chosen == METADATA else f"the weights in another format ({_CHUNKED})"
    in_safetensors = chosen.endswith((SAFETENSORS_SUFFIX, INDEX_SUFFIXES[0]))
    in_pickles = chosen != METADATA and not in_safetensors
    if at_home and _is_pickled_twin(base, _stem(chosen)):
        return OTHER_WEIGHTS if in_pickles else "the weights in another format (PyTorch)"
    if at_home and (base.endswith(SAFETENSORS_SUFFIX) or fnmatchcase(base, "*.safetensors.index*.json")):
        return OTHER_WEIGHTS if in_safetensors else "the weights in another format (safetensors)"
    return None


def _stem(chosen: str) -> str:
    """Return the name of the weights or their index without what it ends in."""
    if chosen == METADATA:
        return ""
    suffix = next(s for s in (*INDEX_SUFFIXES, *WEIGHTS_SUFFIXES) if chosen.endswith(s))
    return chosen.removesuffix(suffix)


def _is_manifest(base: str) -> bool:
    return base == MANIFEST or base.endswith(MANIFEST_SUFFIX)


def _is_pickled_twin(base: str, stem: str) -> bool:
    if _matches(base, _PICKLES):
        return True
    return any(base == name + suffix for name in (*_PICKLE_STEMS, stem) for suffix in _TWIN_SUFFIXES)


def _matches(base: str, patterns: tuple[str, ...]) -> bool:
    return _pattern(patterns).match(base.lower()) is not None


@cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
