"""What a SOURCE was meant to be that is neither here nor a hub id: how to say it to noisytune.

A browser shows an address, other programs take NAME@REV or hf://NAME/FOLDER. Nothing of that is fetched; the
error names the id and the options that do the same.
"""

from __future__ import annotations

import re

from noisytune_cli.checkpoint.hub import is_repo_id
from noisytune_cli.checkpoint.layout import index_suffix, is_plain_name, is_weights
from noisytune_cli.errors import InputUnreadable

_WHERE = re.compile(r"(?:https?://[^/]+/|hf://)(?:models/)?")

#: What follows the id in an address: how the file is shown, and at which revision.
_VIEW = re.compile(r"/(?:tree|blob|resolve|raw|commit)/(?P<revision>[^/]+)(?:/(?P<path>.*))?")

_CACHED = re.compile(r"models--(?P<id>[^/]+)(?:/.*)?")


def no_source(source: str) -> InputUnreadable:
    """Return the error for a SOURCE that is nothing noisytune can take."""
    next_step = "Check the spelling; a hub id looks like NAME or OWNER/NAME"
    meant = _meant(source.replace("\\", "/"))
    if meant is not None:
        next_step = f"If it is on the hub, give {meant}; else check the spelling"
    return InputUnreadable(
        "no such file",
        path=source,
        why="it is neither a file or folder here nor a hub id",
        next_step=next_step,
    )


def _meant(source: str) -> str | None:
    """Return the id that a text stands for, with options; None where there is none in it."""
    where = _WHERE.match(source)
    text = source[where.end() :] if where else source
    text = text.split("?")[0].split("#")[0].rstrip("/")
    if cached := _CACHED.fullmatch(text):
        text = cached["id"].replace("--", "/")
    text, at, ref = text.partition("@refs/")
    parts = text.split("/")
    for count in (2, 1):
        name, *rest = re.split(r"[@:]", "/".join(parts[:count]), maxsplit=1)
        path = "/".join(parts[count:])
        if not is_repo_id(name) or (count == 1 and path):
            continue
        revision = rest[0] if rest else f"refs/{ref}" if at else None
        if view := _VIEW.fullmatch(f"/{path}"):
            revision, path = view["revision"], view["path"] or ""
        if path and not is_plain_name(path):
            continue
        options = "" if revision is None else f" --revision {revision}"
        if path:
            is_file = is_weights(path) or index_suffix(path) is not None
            options += f" --weights {path if is_file else f'{path}/FILE'}"
        return name + options
    return None
