"""The hub's cache: where it is, and that no output goes there."""

from __future__ import annotations

import os
import runpy
from itertools import combinations
from pathlib import Path

import pytest
from places import accepted, refused

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.ids import cache_folder
from noisytune_cli.errors import OutputUnsafe
from noisytune_cli.output import destination as output_module
from noisytune_cli.output.destination import check_recipe, resolve_recipe


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_hubs_cache_is_refused_whatever_the_source(
    file: Checkpoint, folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    cache = tmp_path / "home/hub"
    (cache / "models--c--d/snapshots").mkdir(parents=True)
    (tmp_path / "alias").symlink_to("home/hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "alias"))
    for source in (file, folder):
        for out in ("x", "models--c--d/snapshots/q", "models--a--b", "../hub/x"):
            for spelling in (cache / out, tmp_path / "alias" / out):
                assert "the hub's cache" in refused(spelling, source, overwrite=overwrite)
    for out in (cache, cache / "models--c--d"):
        assert "the hub's cache" in refused(out, folder, overwrite=overwrite)
    if overwrite:
        assert "the hub's cache lies in it" in refused(tmp_path / "home", folder, overwrite=True)
    assert accepted(tmp_path / "home/hub-noisy", folder, overwrite=overwrite)


def test_the_hubs_cache_is_known_under_another_name(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "mounted").symlink_to("hub")  # left unresolved, as a bind mount cannot be
    monkeypatch.setattr(output_module, "cache_folder", lambda: tmp_path / "mounted")
    assert "the hub's cache" in refused(tmp_path / "hub/x", folder)


def test_a_hubs_cache_that_is_not_there_yet(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home/hub"))
    assert "the hub's cache" in refused(tmp_path / "home/hub", folder)
    assert "the hub's cache" in refused(tmp_path / "home/hub/x", folder)
    (tmp_path / "home").mkdir()
    assert accepted(tmp_path / "home", folder, overwrite=True)
    monkeypatch.setenv("HF_HUB_CACHE", "")
    monkeypatch.chdir(tmp_path)
    assert accepted("out", folder)


def test_a_recipe_does_not_go_into_the_hubs_cache(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OutputUnsafe, match="the hub's cache"):
        check_recipe(resolve_recipe(f"{tmp_path}/hub/r.json"), folder, overwrite=False)


_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "given", [set(found) for n in range(5) for found in combinations(_CACHE_VARIABLES, n)]
)
@pytest.mark.parametrize("value", ["/ca/{}", "~/{}", "$PLACE/{}", "here/{}"])
def test_the_cache_is_where_huggingface_hub_has_it(
    given: set[str], value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("PLACE", "~/place")
    for name in _CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, value.format(name))
    theirs = runpy.run_path(constants.__file__)["HF_HUB_CACHE"]
    assert cache_folder() == Path(os.path.realpath(theirs))
