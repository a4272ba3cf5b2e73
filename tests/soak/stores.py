"""Outputs that go into an object store which fails at random: each is complete, or known not to be.

Whatever goes wrong, a run ends with one line that tells no secret, nothing is beside what a run writes, and
no manifest is there before all that it accounts for. The same command completes what was stopped.
"""

from __future__ import annotations

import random
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

from checkpoints import save_sharded, weights
from commands import Commands
from object_store import SECRET, Fault, ObjectStore, error, proxied, started

_MANIFEST, _CLAIM = "noisytune.json", ".noisytune/publishing"

#: What a request is for: parts of its path.
_PATHS = (
    "",
    "list-type",
    "delete",
    "publishing",
    "00001-of",
    "00002-of",
    "index",
    "config",
    f"{_MANIFEST}$",
)

_ANSWERS = (
    (500, "InternalError"),
    (503, "SlowDown"),
    (403, "AccessDenied"),
    (404, "NoSuchBucket"),
    (409, "Conflict"),
    (412, "PreconditionFailed"),
    (400, "Strange"),
)


class Stores:
    """A model, what a run makes of it here, and a bucket that it is sent to."""

    def __init__(self, store: ObjectStore, folder: Path, commands: Commands) -> None:
        """Make the model, and run once."""
        self._store, self._commands = store, commands
        shards = ({"a.weight": weights("F32", 40, 8)}, {"b.weight": weights("BF16", 40, 8)})
        self._model = save_sharded(folder / "model", *shards)
        (self._model / "config.json").write_text('{"model_type": "bert"}')
        if wrong := commands.run("perturb", self._model, "-o", folder / "out", "-q"):
            raise RuntimeError(wrong)
        self._expected = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}

    def try_case(self, seed: int) -> tuple[bool, list[str]]:
        """Try the faults of a seed; return whether any happened, and what does not hold."""
        key = f"out-{seed}"
        faults = random_faults(random.Random(seed))
        self._store.faults[:] = faults
        times = [fault.times for fault in faults]
        wrong = self._run(key)
        self._store.faults.clear()
        hit = times != [fault.times for fault in faults]
        found = [*self._breaches(key, wrong)]
        complete = _MANIFEST in self._sent(key)
        again = self._run(key)
        if again and not (complete and again.startswith("exit 5: ")):
            found.append(f"the same command again: {again}")
        if self._sent(key) != self._expected:
            found.append(f"it is not complete then: {sorted(self._sent(key))}")
        return hit, [f"{faults}: {breach}" for breach in found]

    def _run(self, key: str) -> str:
        return self._commands.run("perturb", self._model, "-o", f"{self._store.url}/{key}", "-q")

    def _sent(self, key: str) -> dict[str, bytes]:
        found = {}
        for name in self._store.keys(f"{key}/"):
            with suppress(urllib.error.HTTPError):  # a claim whose removal was still on its way
                found[name] = self._store.get(f"{key}/{name}")
        return found

    def _breaches(self, key: str, wrong: str) -> Iterator[str]:
        sent = self._sent(key)
        claimed = sent.pop(_CLAIM, None)
        if SECRET in wrong:
            yield "it tells the secret"
        if wrong and (wrong.split(":")[0] not in ("exit 5", "exit 6", "exit 7") or wrong.count("\n") != 1):
            yield wrong
        if not wrong and (sent != self._expected):
            yield f"it ended with 0, and there is {sorted(sent)}"
        if not sent.items() <= self._expected.items():
            yield f"what is there is not of its output: {sorted(sent)}"
        if _MANIFEST in sent and sent != self._expected:
            yield f"the manifest is there, and of the rest only {sorted(sent)}"
        if sent and _MANIFEST not in sent and claimed is None:
            yield f"there is no claim on {sorted(sent)}"


def random_faults(choose: random.Random) -> list[Fault]:
    """Return up to three things that go wrong, once, twice or for good."""
    found = []
    for _ in range(choose.choice((1, 1, 2, 3))):
        fault = Fault(choose.choice(("PUT", "PUT", "GET", "HEAD", "POST", "DELETE")), choose.choice(_PATHS))
        fault.times = choose.choice((1, 1, 2, 99))
        how = choose.choice(("status", "status", "reset", "lost", "cut", "damages"))
        if how == "status":
            fault.status, code = choose.choice(_ANSWERS)
            fault.body = error(code)
        elif how == "cut":
            fault.cut = 1
        else:
            setattr(fault, how, True)
        found.append(fault)
    return found


@contextmanager
def stores(folder: Path, commands: Commands) -> Iterator[Stores]:
    """Start a store that can fail, and prepare what is sent to it."""
    with started() as moto, proxied(moto) as (store, environment), patch.dict("os.environ", environment):
        yield Stores(store, folder, commands)
