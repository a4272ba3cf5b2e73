"""Errors are the same in another process."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Iterator

import pytest

from noisytune_cli import errors
from noisytune_cli.errors import NoisytuneError, PackageMissing, Stopped, lacking


def _kinds(base: type[BaseException]) -> Iterator[type[BaseException]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


def _made(kind: type[BaseException]) -> BaseException:
    if issubclass(kind, NoisytuneError):
        return kind("cannot read", why="it is\nodd.", next_step="Look", path="a/\x1bb", tensor="w")
    if issubclass(kind, Stopped):
        return kind(signal.SIGTERM) if kind is Stopped else kind()
    return kind("said")


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BaseException) and kind.__module__ == errors.__name__
]


def test_all_are_here() -> None:
    known = {*_kinds(NoisytuneError), *_kinds(Stopped)}
    assert {kind for kind in known if kind.__module__.startswith("noisytune_cli.")} <= {*KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_an_error_survives_pickling(kind: type[BaseException], protocol: int) -> None:
    error = _made(kind)
    if isinstance(error, Stopped):
        error.left = "a folder"
    error.add_note("met by the third share")
    for found in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(found) is kind
        assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
        for field in ("what", "why", "next_step", "path", "tensor", "signum", "left", "exit_code"):
            assert getattr(found, field, None) == getattr(error, field, None)
        if isinstance(error, NoisytuneError):
            assert found.line() == error.line()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_keeps_its_place(kind: type[BaseException]) -> None:
    error = _made(kind)
    if isinstance(error, NoisytuneError):
        assert error.path == "a/\x1bb"
        assert error.line() == str(error)
        error.move("a", "there")
        assert 'cannot read: there/\\x1bb: tensor "w"' in error.line()


def test_a_missing_package_is_called_as_pip_calls_it() -> None:
    for module, package in (("yaml", "pyyaml"), ("torch", "torch")):
        found = lacking(ModuleNotFoundError(name=module))
        assert found is not None
        assert found.line().endswith(f"Install it: pip install {package}.")


def test_one_without_a_place_too() -> None:
    error = PackageMissing("this needs torch", why="it is not installed", next_step="Install it")
    found = pickle.loads(pickle.dumps(error))
    assert (found.path, found.tensor) == (None, None)
    assert found.line() == error.line() == str(found)
