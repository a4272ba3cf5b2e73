"""What must hold after every fault; each breach is one sentence.

The source is as it was. The output is absent or whole (where it replaces another: the old one or the new one,
never a mix). Exit 0 means that it is whole and that nothing which makes it durable failed. Otherwise the exit
code is one of those for the fault, and stderr holds one line. A left-over of the staging stays only where the
run was killed, or where removing it was what failed; the next run removes and names it, and succeeds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from scenarios import JOB, LEFT_OVER, Expected, Scenario, Tree, has_plan, left_overs, tree
from strace import Call
from warm import Ended, Warm

#: Exit codes for a failed system call: cannot read, unsafe output, cannot write.
_FAILED = {4, 5, 6}

#: What removing the staging directory does, and nothing else in these scenarios.
_REMOVING = {"unlink", "unlinkat", "rmdir"}

#: What looking through the staging directory does, among others.
_LOOKING = {"openat", "newfstatat", "fstat", "getdents64", "lseek", "close", "flock"}

_RENAMING = {"rename", "renameat", "renameat2", "link", "linkat"}

_KILLED = -9

#: What a share of a job leaves, or is about to.
_OF_A_SHARE = re.compile(f"{JOB}[0-9a-f]+/[0-9a-f]{{32}}")

#: The end of the name that an old output bears while it is replaced where names cannot be exchanged.
ASIDE = "-replaced"


@dataclass(frozen=True)
class Fault:
    """One fault: which call of which name fails, how, and whether all that follow fail too."""

    call: str
    number: int
    kind: str
    sticky: bool = False

    @property
    def injection(self) -> str:
        """The fault as strace takes it; EINTR ends after three, since Python repeats such a call for ever."""
        action = {"KILL": "signal=KILL", "NOTHING": "retval=0"}.get(self.kind, f"error={self.kind}")
        last = ("+", f"..{self.number + 2}")[self.kind == "EINTR"] if self.sticky else ""
        return f"{self.call}:{action}:when={self.number}{last}"

    def __str__(self) -> str:
        return self.injection


def breaches(
    scenario: Scenario, expected: Expected, fault: Fault, ended: Ended, injected: Sequence[Call]
) -> list[str]:
    """Return what does not hold after `fault`, which hit the calls `injected`."""
    return [
        *_of_files(scenario, expected, ended, cleaned=not _may_leave(fault, ended)),
        *_of_ending(scenario, fault, ended, injected),
        *_of_left_overs(scenario, fault, ended),
    ]


def breaches_after_a_power_cut(scenario: Scenario, expected: Expected, code: int) -> list[str]:
    """Return what does not hold on a disk that lost its power during a run that ended with `code`."""
    state = tree(scenario.place)
    if code == 0:
        return [] if state == expected.after else ["exit 0, but the output did not survive"]
    found = [] if is_sound(scenario, expected, files(state)) else [f"exit {code}, and left {sorted(state)}"]
    if len(left_overs(scenario.place)) > scenario.outputs:
        found.append(f"left {left_overs(scenario.place)}")
    return found


def breaches_after_rerun(scenario: Scenario, expected: Expected, warm: Warm) -> list[str]:
    """Run again over whatever a fault left, and return what does not hold then."""
    left = left_overs(scenario.place)
    state = files(tree(scenario.place))
    there = state == files(expected.after) or (scenario.outputs > 1 and bool(state))
    # One that lies in what is replaced goes with it, unnamed.
    within = left_overs(scenario.place / scenario.out) if there else []
    # Not quietly: what it clears away it names. A job goes on by the very same command.
    told = [word for word in scenario.argv if word != "-q"]
    goes_on = has_plan(scenario.place) or scenario.verb == ("finish",)
    ended = warm.run([*told, *(["--overwrite"] if there and not goes_on else [])])
    found = []
    if ended.code != 0:
        found.append(f"the rerun ends with {ended.code}: {ended.stderr.strip()}")
    elif tree(scenario.place) != expected.after:
        found.append("the rerun's output is not whole")
    if left_overs(scenario.place):
        found.append(f"the rerun leaves {left_overs(scenario.place)}")
    if has_plan(scenario.place):
        found.append("the rerun leaves its job")
    found += [
        f"the rerun does not name {name}" for name in left if name not in ended.stderr and name not in within
    ]
    return found


def files(state: Tree) -> Tree:
    """Return a tree without its directories: a killed run may leave the empty parents it has made."""
    return {name: what for name, what in state.items() if not str(what[0]).startswith("d")}


def _of_files(scenario: Scenario, expected: Expected, ended: Ended, *, cleaned: bool) -> list[str]:
    found = []
    if tree(scenario.source.parent, mtime=True) != expected.source:
        found.append("the source changed")
    state = tree(scenario.place)
    if ended.code == 0:
        if state != expected.after:
            found.append("exit 0, but the output is not whole")
    elif ended.code == _KILLED:
        if not is_sound(scenario, expected, files(state)):
            found.append(f"killed, and neither the old state nor the new: {sorted(files(state))}")
    elif state != expected.before and (
        (cleaned and scenario.outputs == 1) or not is_sound(scenario, expected, files(state))
    ):
        found.append(f"exit {ended.code}, but something is there: {sorted(state)}")
    return found


def is_sound(scenario: Scenario, expected: Expected, state: Tree) -> bool:
    """Tell whether a kill may leave these files: all old, all new, or whole ones without a manifest.

    The last is for what takes several renames. The next run knows it for unfinished, and starts again. Of
    several outputs each is judged alone.
    """
    if scenario.outputs > 1:
        return all(_is_sound_alone(scenario, expected, state, n) for n in range(scenario.outputs))
    return _is_sound(scenario, files(expected.before), files(expected.after), state)


def _is_sound_alone(scenario: Scenario, expected: Expected, state: Tree, number: int) -> bool:
    """Judge the output that takes the seed `number`."""
    stem = scenario.out.replace("{seed}", str(number))

    def alone(tree: Tree) -> Tree:
        return {name: what for name, what in files(tree).items() if name.startswith(stem)}

    return _is_sound(scenario, alone(expected.before), alone(expected.after), alone(state))


def _is_sound(scenario: Scenario, before: Tree, after: Tree, state: Tree) -> bool:
    if state in (before, after):
        return True
    if not state and any(name.endswith(ASIDE) for name in left_overs(scenario.place)):
        return True  # two directories cannot be exchanged everywhere; the next run puts the old one back
    if not scenario.piecewise or any(name.endswith("noisytune.json") for name in state):
        return False
    return all(what in (before.get(name), after.get(name)) for name, what in state.items())


def _of_ending(scenario: Scenario, fault: Fault, ended: Ended, injected: Sequence[Call]) -> list[str]:
    if ended.hung:
        return ["it hangs"]
    if any(_is_foreign(scenario, call) for call in injected):
        return []  # Python's or the package's own files failed: nothing can be asked of what is said then
    lines = ended.stderr.splitlines()
    found = []
    if "Traceback" in ended.stderr:
        found.append(f"a traceback: {lines[-1]}")
    elif len(lines) > 1:
        found.append(f"{len(lines)} lines on stderr")
    if ended.code not in allowed_codes(fault, injected):
        found.append(f"exit {ended.code}: {ended.stderr.strip()}")
    deaf = any(call.name == "write" and call.text.startswith("2<") for call in injected)
    if ended.code not in (0, _KILLED) and not lines and not deaf:
        found.append("no line on stderr")
    return found


def allowed_codes(fault: Fault, injected: Sequence[Call]) -> set[int]:
    """Return the exit codes that are right for a fault."""
    if not injected:
        return {0}
    if fault.kind == "KILL":
        return {_KILLED}
    if fault.kind in ("EINTR", "NOTHING"):
        # POSIX lets these be interrupted, and Python or libc repeats them; of others it is an error like any.
        if any("O_DIRECTORY" in call.text for call in injected):
            return {0, *_FAILED}  # opendir is not repeated
        repeated = {"openat", "write", "pwrite64", "fallocate", "fsync", "flock", "read", "preadv2"}
        return {0} if fault.call in repeated and fault.kind == "EINTR" else {0, *_FAILED}
    if any(_OF_A_SHARE.search(call.text) for call in injected):
        return {0, *_FAILED}  # a share that fails is done again
    durable = {"fsync", "fdatasync", "write", "pwrite64"}
    if any((call.name in durable and LEFT_OVER in call.text) or _closes_output(call) for call in injected):
        return {6}
    return {0, *_FAILED}


def _closes_output(call: Call) -> bool:
    path = call.text.partition(">")[0].replace(JOB, "")  # whose files are flushed before they are closed
    return call.name == "close" and LEFT_OVER in path and path.endswith((".safetensors", ".json"))


def _is_foreign(scenario: Scenario, call: Call) -> bool:
    sandbox = str(scenario.place.parent.parent)
    if "/dev/null" in call.text:  # where a stream that failed leads: it takes everything
        return True
    return sandbox not in call.text and not call.text.startswith(("1<", "2<"))


def _may_leave(fault: Fault, ended: Ended) -> bool:
    """Tell whether this fault can keep a run from removing what it has made."""
    if ended.code == _KILLED or fault.call in _REMOVING:
        return True
    if fault.sticky and fault.call in _RENAMING:
        return True  # what was renamed before cannot be renamed back
    return fault.call in _LOOKING and (fault.sticky or ended.code == 0)


def _of_left_overs(scenario: Scenario, fault: Fault, ended: Ended) -> list[str]:
    left = [name for name in left_overs(scenario.place) if not name.endswith(ASIDE)]
    if ended.code == 0 and has_plan(scenario.place) and not _may_leave(fault, ended):
        return ["exit 0, and the job is still there"]
    if len(left) > scenario.outputs:
        return [f"{len(left)} left-overs: {left[:4]}"]
    return [f"it leaves {left[0]}"] if left and not _may_leave(fault, ended) else []
