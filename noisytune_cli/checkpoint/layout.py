"""Which files of a checkpoint are copied beside its weights, and which are left out.

One idea: everything is decided from names, so a folder on disk and a repository on the hub, of which nothing
has been fetched yet, get the same answer. `checkpoint/weights.py` chooses the weights in the same way. The
folder that holds them is their home; only there can another file be a twin of them, and of weights under
another name only their tensors tell (`checkpoint/twins.py`). Weights in other folders are other modules
(sentence-transformers' `2_Dense/`) and are copied; exports (ONNX, GGUF…) and trainer state are left out
wherever they lie. Every file that is left out is named, with the reason.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX

#: What the names of weight files end in: safetensors, which is taken where there is a choice, and pickles.
SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".th", ".ckpt")
WEIGHTS_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)

#: An index of shards: `model.safetensors.index.json`, of a variant `model.safetensors.index.fp16.json`.
_INDEX = re.compile(
    r"(?P<stem>.*)(?P<suffix>\.safetensors|\.bin)\.index(?P<variant>\.[\w-]+)?\.json", re.DOTALL
)

_NUMBER = re.compile(r"_\d+$")
_SHARD = re.compile(r"-\d{3,}-of-\d{3,}$")

#: The file that makes a folder a checkpoint of torch.distributed.checkpoint, which writes it last; and what
#: the names of the files with the weights end in.
METADATA = ".metadata"
CHUNKS_SUFFIX = ".distcp"

#: Why weights that were not chosen are left out.
OTHER_WEIGHTS = "other weights than those chosen (--weights chooses)"

#: Why folders are left out that can be checkpoints themselves.
TRAINER_CHECKPOINT = "a checkpoint of the trainer"
SHARDED_STATE = "the weights in another format (PyTorch)"
TRAINER_STATE = "optimizer and trainer state"

#: Folders that are left out whole.
_FOLDERS_LEFT_OUT = (
    (r"\.git", "version control"),
    (r"\.(cache|huggingface)", "a download cache"),
    (r"\.noisytune-.*", "left by an interrupted run of noisytune"),
    (r"checkpoint-\d+", TRAINER_CHECKPOINT),
    (r"global_step\d+|optimizer_\d+", TRAINER_STATE),
    (r"pytorch_model_fsdp_\d+", SHARDED_STATE),
    (r"__MACOSX", "left by macOS"),
    (r".*\.(mlpackage|mlmodelc)", "the weights in another format (Core ML)"),
)

#: Optimizer and trainer state, wherever it lies.
_TRAINER_STATE = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "training_args.bin"),
    *("trainer_state.json", "rng_state*.pth", "random_states_*.pkl"),
    # DeepSpeed's and Megatron's, which hold the weights once more in full precision.
    *("*_optim_states.pt", "distrib_optim.pt"),
)

_CHUNKED = "torch.distributed.checkpoint"

#: What is made from a model's weights, wherever it lies.
_EXPORTS = (
    ("GGUF", ("*.gguf", "*.ggml", "ggml-*.bin")),
    ("ONNX", ("*.onnx", "*.onnx_data*", "*.onnx.data*")),
    ("TensorFlow", ("*.h5", "*.h5.index.json", "*.keras", "saved_model.pb")),
    ("TensorFlow Lite", ("*.tflite",)),
    ("Flax", ("*.msgpack", "*.msgpack.index.json")),
    ("OpenVINO", ("openvino_*.xml", "openvino_*.bin")),
    ("Rust", ("rust_model.ot",)),
    ("Core ML", ("*.mlmodel",)),
    ("Paddle", ("*.pdparams",)),
    ("MLX", ("weights.npz", "weights.*.npz")),
    ("PyTorch", ("consolidated.*.pth", "pytorch_model_fsdp*.bin")),
)

#: What one model's weights are called by the loaders and programs that look for them by their names.
_TWIN_STEMS = (
    *("model", "pytorch_model", "diffusion_pytorch_model", "consolidated"),
    *("open_clip_model", "open_clip_pytorch_model"),
)


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


def is_safe(name: str) -> bool:
    """Tell whether a name of the hub's or a store's can be one in a folder here, and leads nowhere else."""
    try:
        parts = name.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    plain = all(part not in (b"", b".", b"..") and b"\0" not in part and len(part) <= 255 for part in parts)
    return plain and len(name) <= 2_000


def folders_among(names: Collection[str]) -> set[str]:
    """Return those of `names` that others lie below: elsewhere one name can be both, here it cannot."""
    above = (folder for name in names for folder in accumulate(name.split("/")[:-1], "{}/{}".format))
    return {folder for folder in above if folder in names}


def is_no_model(name: str) -> bool:
    """Tell whether a file that is named like weights is something else, such as an optimizer's state."""
    base = posixpath.basename(name)
    return _matches(base, _TRAINER_STATE) or export_format(base) is not None


def export_format(base: str) -> str | None:
    """Return the format of an export that a file's name tells, or None."""
    if _matches(base, ("*.ckpt.*", "*.ckpt-*")) and not base.endswith(WEIGHTS_SUFFIXES):
        return "TensorFlow"  # model.ckpt.meta, model.ckpt-1000.data-00000-of-00001
    return next((label for label, patterns in _EXPORTS if _matches(base, patterns)), None)


class Arranged(NamedTuple):
    """Every file but the weights: `others` are to be copied, `left_out` are not, each with the reason.

    `weights` are other weight files (and their indexes) in the home of those chosen, each with why it is left
    out if it holds the same; `twins` are those of them whose names say so.
    """

    others: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    weights: Mapping[str, str]
    twins: frozenset[str]


def arrange(listing: Listing, chosen: str, weights: Collection[str]) -> Arranged:
    """Sort every file but `weights`.

    `chosen` is what `weights.choose_weights` returned; when it is an index it is among the files to copy.
    """
    home = posixpath.dirname(chosen)
    others: list[str] = []
    left_out = [*listing.special.items(), *listing.folders.items()]
    unsure: dict[str, str] = {}
    for name in listing.files:
        if name in weights:
            continue
        if name == chosen:
            others.append(name)
        elif (why := _why_left_out(name, home, chosen)) is not None:
            left_out.append((name, why))
        elif posixpath.dirname(name) == home and may_hold_weights(name) and not _is_numbered(name, chosen):
            unsure[name] = _why_twin(name, chosen)
        else:
            others.append(name)
    twins = frozenset(name for name in unsure if is_weights(name) and _is_named_twin(name, chosen))
    return Arranged(tuple(sorted(others)), tuple(sorted(left_out)), unsure, twins)


def manifests(listing: Listing) -> list[str]:
    """Return the names of noisytune's own manifests in the checkpoint's root."""
    return [name for name in listing.files if "/" not in name and _is_manifest(name)]


def index_suffix(name: str) -> str | None:
    """Return what the names of an index's shards end in, None where it is no index of such shards."""
    found = _INDEX.fullmatch(posixpath.basename(name))
    return None if found is None else found["suffix"]


def is_weights(name: str) -> bool:
    """Tell whether a file is named as weights that can be read, or as an index of them; hidden ones are not.

    What `._model.safetensors` or `.model.safetensors.part` holds was left by a file system or a download.
    """
    base = posixpath.basename(name)
    return not base.startswith(".") and (base.endswith(WEIGHTS_SUFFIXES) or index_suffix(base) is not None)


def may_hold_weights(name: str) -> bool:
    """Tell whether a file may hold weights by how its name ends, or ended before something was added."""
    base = posixpath.basename(name)
    added = any(f"{suffix}." in base for suffix in WEIGHTS_SUFFIXES) or base.endswith(".sft")
    return is_weights(name) or (added and not base.startswith("."))


def stem_of(name: str) -> str:
    """Return the name of weights, of a shard or an index without what tells these: `model`, `model.fp16`."""
    base = posixpath.basename(name)
    if base == METADATA:
        return ""
    if (found := _INDEX.fullmatch(base)) is not None:
        return found["stem"] + (found["variant"] or "")
    suffix = next((suffix for suffix in WEIGHTS_SUFFIXES if base.endswith(suffix)), "")
    return _SHARD.sub("", base.removesuffix(suffix))


def is_variant(stem: str, of: str) -> bool:
    """Tell whether weights are a variant of others, such as `model.fp16` of `model`."""
    return stem.startswith(f"{of}.")


def _why_left_out(name: str, home: str, chosen: str) -> str | None:
    base = posixpath.basename(name)
    if "/" not in name and _is_manifest(base):
        return "the manifest of an earlier run"
    if base.startswith("._"):
        return "left by macOS"
    if why := why_folder_left_out(base):
        return why
    if _matches(base, _TRAINER_STATE):
        return TRAINER_STATE
    if label := export_format(base):
        return f"the weights in another format ({label})"
    if posixpath.dirname(name) == home and (base == METADATA or base.endswith(CHUNKS_SUFFIX)):
        chunked = posixpath.basename(chosen) == METADATA
        return OTHER_WEIGHTS if chunked else f"the weights in another format ({_CHUNKED})"
    return None


def _why_twin(name: str, chosen: str) -> str:
    """Return why other weights are left out that hold what the chosen ones hold."""
    ours, theirs = _in_safetensors(chosen), _in_safetensors(name)
    if not is_weights(name) or (ours == theirs and posixpath.basename(chosen) != METADATA):
        return OTHER_WEIGHTS
    return f"the weights in another format ({'safetensors' if theirs else 'PyTorch'})"


def _in_safetensors(name: str) -> bool:
    return (index_suffix(name) or name).endswith(SAFETENSORS_SUFFIX)


def _is_named_twin(name: str, chosen: str) -> bool:
    """Tell whether a name alone makes weights a twin: that of the chosen ones, or one that stands for it."""
    stem, ours = stem_of(name), stem_of(chosen)
    usual = any(ours == one or is_variant(ours, one) for one in _TWIN_STEMS)
    stems = (ours, *_TWIN_STEMS) if usual or not ours else (ours,)
    return any(stem == one or is_variant(stem, one) for one in stems if one)


def _is_numbered(name: str, chosen: str) -> bool:
    """Tell whether weights are another model of one training, as accelerate saves them: `model_1`."""
    stem, ours = stem_of(name), stem_of(chosen)
    return stem != ours and _NUMBER.sub("", stem) == _NUMBER.sub("", ours)


def _is_manifest(base: str) -> bool:
    return base == MANIFEST or base.endswith(MANIFEST_SUFFIX)


def _matches(base: str, patterns: tuple[str, ...]) -> bool:
    return _pattern(patterns).match(base.lower()) is not None


@cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
