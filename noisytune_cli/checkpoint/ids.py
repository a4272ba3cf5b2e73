"""Hub ids, and where the hub's cache is: what can be told without the hub.

Of a SOURCE that is neither here nor an id it is told what it was meant to be. A browser shows an address,
other programs take NAME@REV or hf://NAME/FOLDER. Nothing of that is fetched; the error names the id and the
options that do the same.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from noisytune_cli.checkpoint.address import has_scheme
from noisytune_cli.checkpoint.layout import index_suffix, is_plain_name, is_weights
from noisytune_cli.errors import InputUnreadable

# Most sources are here, and need none of these patterns: `re` keeps what it has compiled.
_ID_PART = r"(?=.{1,96}$)\w(?:[\w.-]*\w)?"

_WHERE = r"(?:https?://[^/]+/|hf://)(?:models/)?"

#: What follows the id in an address: how the file is shown, and at which revision.
_VIEW = r"/(?:tree|blob|resolve|raw|commit)/(?P<revision>[^/]+)(?:/(?P<path>.*))?"

_CACHED = r"models--(?P<id>[^/]+)(?:/.*)?"


#: A name that ends so is a misspelt path, not a repository.
_FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".git")


def is_repo_id(text: str) -> bool:
    """Tell whether `text` looks like NAME or OWNER/NAME."""
    parts = text.split("/")
    return (
        len(parts) <= 2
        and all(
            re.fullmatch(_ID_PART, part, re.ASCII) and "--" not in part and ".." not in part for part in parts
        )
        and not text.endswith(_FILE_SUFFIXES)
    )


def cache_folder() -> Path | None:
    """Return where the hub's cache is, links resolved; None where the environment names nothing.

    It need not exist. huggingface_hub is not asked, for its import takes longer than a small run: the
    environment is read as its `constants` does it, and a test holds the two together.
    """
    home = os.path.join(os.getenv("XDG_CACHE_HOME", os.path.join("~", ".cache")), "huggingface")
    default = os.path.join(_expanded(os.getenv("HF_HOME", home)), "hub")
    folder = _expanded(os.getenv("HF_HUB_CACHE", os.getenv("HUGGINGFACE_HUB_CACHE", default)))
    return Path(os.path.realpath(folder)) if folder else None


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def no_source(source: str) -> InputUnreadable:
    """Return the error for a SOURCE that is nothing noisytune can take."""
    next_step = "Check the spelling; a hub id looks like NAME or OWNER/NAME"
    meant = _meant(source.replace("\\", "/"))
    if has_scheme(source) and not re.match(_WHERE, source):
        next_step = "Addresses begin with s3://, gs:// or az://; a file here needs none of it"
    elif meant is not None:
        next_step = f"If it is on the hub, give {meant}; else check the spelling"
    return InputUnreadable(
        "no such file",
        path=source,
        why="it is neither a file or folder here nor a hub id",
        next_step=next_step,
    )


def _meant(source: str) -> str | None:
    """Return the id that a text stands for, with options; None where there is none in it."""
    where = re.match(_WHERE, source)
    text = source[where.end() :] if where else source
    text = text.split("?")[0].split("#")[0].rstrip("/")
    if cached := re.fullmatch(_CACHED, text):
        text = cached["id"].replace("--", "/")
    text, at, ref = text.partition("@refs/")
    parts = text.split("/")
    for count in (2, 1):
        name, *rest = re.split(r"[@:]", "/".join(parts[:count]), maxsplit=1)
        path = "/".join(parts[count:])
        if not is_repo_id(name) or (count == 1 and path):
            continue
        revision = rest[0] if rest else f"refs/{ref}" if at else None
        if view := re.fullmatch(_VIEW, f"/{path}"):
            revision, path = view["revision"], view["path"] or ""
        if path and not is_plain_name(path):
            continue
        options = "" if revision is None else f" --revision={revision}"
        if path:
            is_file = is_weights(path) or index_suffix(path) is not None
            options += f" --weights={path if is_file else f'{path}/FILE'}"
        return name + options
    return None
