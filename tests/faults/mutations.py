"""The ways in which `prove.py` breaks the product: each takes away one thing that a promise rests on.

`old` stands in the file exactly once; `suite` is what pytest is given: the tests that must fail then.
"""

from __future__ import annotations

from dataclasses import dataclass

_INJECTED = "tests/faults/test_injected_faults.py"
_ORDER = (f"{_INJECTED}::test_everything_is_flushed_in_order",)
_FAULTS = (f"{_INJECTED}::test_promises_hold_after_a_fault",)
_MACHINE = "tests/faults/test_machine.py"
_DIRECT = ("tests/checkpoint/test_direct.py",)


@dataclass(frozen=True)
class Mutation:
    """One thing taken away, and the tests that guard it."""

    name: str
    file: str
    old: str
    new: str
    suite: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "weights are not flushed",
        "checkpoint/formats/_file.py",
        "                os.fsync(fd)\n",
        "                pass\n",
        _ORDER,
    ),
    Mutation(
        "manifest and copied files are not flushed",
        "output/publish.py",
        "                os.fsync(file.fileno())\n",
        "                pass\n",
        _ORDER,
    ),
    Mutation(
        "staging directories are not flushed",
        "output/publish.py",
        "                    sync_directory(Path(folder))\n",
        "                    pass\n",
        _ORDER,
    ),
    Mutation(
        "parents that were made are not flushed",
        "output/publish.py",
        "                    sync_directory(parent.parent)\n",
        "                    pass\n",
        _ORDER,
    ),
    Mutation(
        "the folder of a new directory is not flushed",
        "output/publish.py",
        "            self._require_arrived()\n            sync_directory(self.output.parent)\n",
        "            self._require_arrived()\n",
        _ORDER,
    ),
    Mutation(
        "replaced weights are not flushed before the manifest",
        "output/publish.py",
        "self._require_seen(staged, self._seen)\n            sync_directory(self.output.parent)\n",
        "self._require_seen(staged, self._seen)\n",
        _ORDER,
    ),
    Mutation(
        "a filled directory is not flushed before the manifest",
        "output/publish.py",
        "            sync_directory(self.output)\n",
        "",
        _ORDER,
    ),
    Mutation(
        "a manifest's name is not flushed",
        "output/publish.py",
        "        sync_directory(self.output if self._in_place else self.output.parent)\n",
        "",
        _ORDER,
    ),
    Mutation(
        "the announcement of moves is not flushed",
        "output/staging.py",
        "        os.fsync(file.fileno())\n",
        "",
        _ORDER,
    ),
    Mutation(
        "the manifest is published among the others",
        "output/publish.py",
        "if name != MANIFEST]",
        "]",
        _ORDER,
    ),
    Mutation(
        "a failed flush is passed over",
        "checkpoint/formats/_file.py",
        "                os.fsync(fd)\n",
        "                with contextlib.suppress(OSError):\n                    os.fsync(fd)\n",
        (f"{_INJECTED}::test_a_failed_flush_is_never_published",),
    ),
    Mutation(
        "a flush that failed beside the writing is forgotten",
        "checkpoint/formats/_file.py",
        "                self._flushed.result()\n            fd, self._fd",
        "                pass\n            fd, self._fd",
        ("tests/checkpoint/test_safetensors.py::test_a_flush_that_failed_meanwhile_fails_the_file",),
    ),
    Mutation(
        "moves are not announced",
        "output/staging.py",
        '"names": names, "moved": moved}, file)',
        '"names": [], "moved": moved}, file)',
        _FAULTS,
    ),
    Mutation(
        "what a failed run has made is not removed",
        "output/publish.py",
        "                    _empty(self._lock)\n",
        "                    pass\n",
        _FAULTS,
    ),
    Mutation(
        "a rename is not undone when its flush fails",
        "output/publish.py",
        "        undo.append(partial(rename_back, target, source))\n",
        "",
        _FAULTS,
    ),
    Mutation(
        "what a killed run left is not removed",
        "output/staging.py",
        "        elif not _remove_dead(place / name, output, keep=left is not None):\n",
        "        elif False:\n",
        ("tests/faults/test_stopped_runs.py::test_killed_at_random_moments",),
    ),
    Mutation(
        "a plain rename, which replaces",
        "checkpoint/formats/_system.py",
        "_rename(source, target, _RENAME_NOREPLACE)",
        "_rename(source, target, 0)",
        (f"{_INJECTED}::test_what_appears_at_the_last_moment_is_not_replaced",),
    ),
    Mutation(
        "no lock",
        "output/staging.py",
        "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        # Eight runs that take a moment each need not meet; two in one process do.
        ("tests/output/test_staging.py", f"{_MACHINE}::test_eight_writers_of_one_output"),
    ),
    Mutation(
        "an old output is not locked",
        "output/publish.py",
        "                self._old_lock = staging.hold(self.output, self.output, replaced=True)\n",
        "                self._old_lock = os.open(self.output, os.O_RDONLY)\n",
        ("tests/output/test_publish_stage.py::test_a_second_run_takes_no_old_output_for_a_killed_runs",),
    ),
    Mutation(
        "signals are not waited out while cleaning up",
        "output/signals.py",
        "    _deferring += 1\n",
        "    _deferring += 0\n",
        ("tests/output/test_publish.py", "tests/faults/test_stopped_runs.py"),
    ),
    Mutation(
        "a changed input goes unnoticed",
        "checkpoint/formats/__init__.py",
        "        source.check_unchanged()\n",
        "        pass\n",
        (f"{_MACHINE}::test_an_input_that_changes_while_it_is_read",),
    ),
    Mutation(
        "the rest of a short write is forgotten",
        "checkpoint/formats/_file.py",
        "            done += wrote\n",
        "            done = len(view)\n",
        ("tests/checkpoint/test_safetensors.py",),
    ),
    Mutation(
        "a chunk is written both ways at once",
        "checkpoint/formats/_direct.py",
        "                room.change.wait_for(lambda: index not in self._leaving)\n",
        "",
        _DIRECT,
    ),
    Mutation(
        "a chunk leaves while a thread makes a part of it",
        "checkpoint/formats/_direct.py",
        "return self.users == 0 and self.runs",
        "return self.runs",
        _DIRECT,
    ),
    Mutation(
        "what a thread of its own could not write is not told",
        "checkpoint/formats/_direct.py",
        "            self.write_chunk(chunk)\n        self._check()\n",
        "            self.write_chunk(chunk)\n",
        _DIRECT,
    ),
    Mutation(
        "names are printed as they are",
        "escape.py",
        '"".join(map(_escape_character, shown))',
        "shown",
        (f"{_MACHINE}::test_names_from_files_are_printed_escaped",),
    ),
    Mutation(
        "verify does not compare the tensors' digests",
        "commands/verify.py",
        "        if receipt.digest != recorded[receipt.step.tensor.name].digest\n",
        "        if False\n",
        ("tests/commands/test_verify.py",),
    ),
    Mutation(
        "verify does not compare the digests of headers",
        "commands/differences.py",
        "    if source.header_digest != record.header_digest:\n",
        "    if False:\n",
        ("tests/commands/test_verify.py",),
    ),
    Mutation(
        "verify does not compare the digests of copied files",
        "commands/verify.py",
        "    return [] if found == digest else [",
        "    return [] if True else [",
        ("tests/commands/test_verify.py",),
    ),
    Mutation(
        "replay takes a base of other bytes",
        "commands/differences.py",
        "        if receipt.source_digest != expected.source_digest:\n",
        "        if False:\n",
        ("tests/commands/test_replay.py", "tests/commands/test_verify.py"),
    ),
    Mutation(
        "weights are not flushed, and the power is cut",
        "checkpoint/formats/_file.py",
        "                os.fsync(fd)\n",
        "                pass\n",
        (f"{_MACHINE}::test_a_power_cut_leaves_the_old_state_or_the_new",),
    ),
    Mutation(
        "a pickle's checksums are not checked",
        "checkpoint/formats/torch/storages.py",
        "            if read and self._sums.over(",
        "            if False and self._sums.over(",
        ("tests/checkpoint/test_torch_format.py", "tests/checkpoint/test_corpus.py"),
    ),
    Mutation(
        "a stage that was lost is not noticed",
        "output/publish.py",
        "                self._require_whole()\n",
        "",
        ("tests/output/test_publish_stage.py::test_a_stage_that_is_lost_is_not_made_again",),
    ),
    Mutation(
        "what was replaced is not looked at again",
        "output/publish.py",
        "        if look(path) != seen:\n",
        "        if False:\n",
        ("tests/output/test_publish_stage.py::test_what_changed_since_it_was_looked_at_is_not_replaced",),
    ),
    Mutation(
        "what another user planted is cleared",
        "output/staging.py",
        "    if status.st_uid != os.geteuid():\n        return",
        "    if False:\n        return",
        ("tests/output/test_publish_stage.py::test_what_another_user_planted_is_refused_and_named",),
    ),
    Mutation(
        "a killed run's file is known by its inode alone",
        "output/staging.py",
        "        if [status.st_ino, status.st_size, status.st_mtime_ns] != kept:\n",
        "        if status.st_ino != kept[0]:\n",
        (
            "tests/output/test_publish_stage.py::test_what_was_moved_is_known_and_what_was_changed_since_is_kept",
        ),
    ),
)
