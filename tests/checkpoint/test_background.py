"""A call in a thread of its own: what comes of it, and where there is no thread to be had."""

from __future__ import annotations

import threading
from typing import NoReturn

import pytest

from noisytune_cli.checkpoint.background import begin
from noisytune_cli.checkpoint.remote import wait_for
from noisytune_cli.errors import ResourceExhausted


def test_a_call_is_made_elsewhere_and_its_result_is_kept() -> None:
    assert begin(threading.get_ident).result(20) != threading.get_ident()


@pytest.mark.parametrize("error", [OSError("no"), SystemExit(3)], ids=["an error", "an exit"])
def test_whatever_is_raised_is_kept(error: BaseException) -> None:
    def fails() -> NoReturn:
        raise error

    assert begin(fails).exception(20) is error


def test_without_a_thread_a_remote_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with pytest.raises(ResourceExhausted, match="cannot start a thread"):
        wait_for(lambda: None)
