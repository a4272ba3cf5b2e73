"""The command line: the app, its verbs in the order of `--help`, and the exit codes of errors.

A verb turns options into records, calls the function of its name in `commands/`, and tells what came of it.
A run makes the options of its own verb alone, and everything heavy is imported inside the verbs, so that
`--help` and small models are quick. Errors are caught in one place (`_Command.invoke`), which serves the
terminal and the test runner alike.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from noisytune_cli.cli.help import HelpfulCommand, usage_shown
from noisytune_cli.errors import (
    NoisytuneError,
    NoisytuneWarning,
    ResourceExhausted,
    UsageError,
    exhausted,
    lacking,
)
from noisytune_cli.version import __version__

#: In the order of `--help`, with what it says of each in one line; a verb's own help says more. Each is the
#: function of its name in the file of its name.
_VERBS = {
    "perturb": "Write a noisy copy of a checkpoint, and its manifest.",
    "inspect": "List tensors, their statistics, and what perturb would do.",
    "verify": "Check an output against its manifest, byte for byte.",
    "replay": "Rebuild a noisy checkpoint from its manifest and its base.",
    "compare": "Tell what lies between two checkpoints, tensor by tensor.",
    "detect": "Tell whether the noise of a seed is in a checkpoint.",
    "average": "Write the mean of several checkpoints (a model soup).",
    "plan": "Write a run of perturb down as a job of many shares.",
    "work": "Do shares of a job, on any machine that sees its folder.",
    "finish": "Publish the output of a job whose shares are done.",
    "status": "Tell how far a job is.",
    "study": "Finetune with several methods, and tell what differs.",
}

#: Digits that Python reads as a number without a question.
_MANY_DIGITS = 10


def _take_plain(parameter: Any) -> Callable[[Any, Any], Any]:
    """Return what reads a parameter: as Typer does, but without it where there is nothing to ask.

    Typer has pydantic confirm that a word is a word, that an option is not given, and what whole number some
    digits are; to import that takes longer than a small run.
    """
    read = parameter.process_value
    known = getattr(parameter, "type_descriptor", None)
    kind, own = (None, None) if known is None else (known.annotation, known.parameter_info.parser)

    def process_value(ctx: Any, value: Any) -> Any:
        if parameter.callback is not None:
            return read(ctx, value)
        if value is parameter.default and not parameter.required:
            return value
        if value and own is None and kind in (str, list[str]):
            return value
        plain = None
        if isinstance(value, str) and isinstance(kind, type):
            if own is None:
                plain = _plain(value, kind, parameter)
            elif kind is float:
                plain = own(value)
        return read(ctx, value) if plain is None else plain

    return process_value


def _plain(text: str, kind: type, parameter: Any) -> Any:
    """Return the word of a choice, or the number within its range, that a text is beyond doubt; else None."""
    if issubclass(kind, StrEnum) and text in kind.__members__.values():
        return kind(text)
    if kind is int and text.isascii() and text.isdigit() and len(text) < _MANY_DIGITS:
        number = int(text)
        least, most = parameter.min, parameter.max
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    return None


#: Where a command's context keeps what is to be warned of.
_REPEATED = "noisytune.repeated"


def _repeated(given: Sequence[Any]) -> list[str]:
    """Return a warning for each option of one value that was given several times: the last one counts.

    A word before the others may stand in a script, and one after them replace it.
    """
    told = []
    for one in dict.fromkeys(given):
        if one.param_type_name == "option" and not (one.multiple or one.is_flag) and given.count(one) > 1:
            several = "; several go into one list, with commas" if ",…" in (one.metavar or "") else ""
            told.append(f"{max(one.opts, key=len)} is given more than once, and the last counts{several}")
    return told


class _PlainHelp:
    """Gives `--help` a default that is a bool, which needs no reading either."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class _Command(_PlainHelp, HelpfulCommand):
    """Runs a command and maps what it raises to a line on stderr and an exit code."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for parameter in self.params:
            parameter.process_value = _take_plain(parameter)  # type: ignore[assignment, method-assign]

    def make_parser(self, ctx: Any) -> Any:
        """Return what parses the words, and notes what options were given several times."""
        parser = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            parsed = parse(args)
            ctx.meta[_REPEATED] = _repeated(parsed[2])
            return parsed

        parser.parse_args = parse_args  # type: ignore[method-assign]
        return parser

    def invoke(self, ctx: Any) -> Any:
        try:
            from noisytune_cli.cli import show

            quiet = ctx.params.get("quiet", False)
            with _shown_warnings(), _shown_downloads(), show.errors_alone(quiet):
                show.warn_all(ctx.meta.get(_REPEATED, ()))
                return super().invoke(ctx)
        except (NoisytuneError, MemoryError, OSError, ModuleNotFoundError) as found:
            error = lacking(found) if isinstance(found, ModuleNotFoundError) else found
            if error is None:
                raise
            if ctx.parent.params["debug"]:
                traceback.print_exc()
            if isinstance(error, UsageError):
                raise typer.BadParameter(error.line(), ctx=ctx) from error
            raise _report(error) from error


@functools.cache
def _make(name: str) -> Any:
    """Make the command of a verb."""
    verb = typer.Typer(rich_markup_mode=None, add_completion=False)
    function = getattr(importlib.import_module(f"noisytune_cli.cli.{name}"), name)
    verb.command(cls=_Command, short_help=_VERBS[name])(function)
    return get_command(verb)


class _Commands(Mapping[str, Any]):
    """The commands by name, each made when it is asked for: to make all takes longer than a small run."""

    def __getitem__(self, name: str) -> Any:
        if name not in _VERBS:
            raise KeyError(name)
        return _make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_VERBS)

    def __len__(self) -> int:
        return len(_VERBS)


class _Verbs(_PlainHelp, TyperGroup):
    """The verbs, and `help`, which is the word for `--help`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": _Commands()})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the verbs without making them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with usage_shown(ctx):
            return super().parse_args(ctx, [*args[1:2], "--help"] if args[:1] == ["help"] else args)


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Show noisytune's own warnings as one line each."""

    def show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, NoisytuneWarning):
            from noisytune_cli.cli import show

            show.warn(str(message))
        else:
            as_python_does(message, category, *where, **more)

    as_python_does = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        yield


@contextmanager
def _shown_downloads() -> Iterator[None]:
    """Show what comes from the hub or an object store as all progress is shown."""
    from noisytune_cli.checkpoint import downloads
    from noisytune_cli.cli import show

    before = downloads.shown.set(lambda nbytes: show.progress(nbytes, "download"))
    try:
        yield
    finally:
        downloads.shown.reset(before)


def _report(error: NoisytuneError | MemoryError | OSError) -> typer.Exit:
    """Print the error's line and return the exit that carries its code."""
    from noisytune_cli.cli import show

    if not isinstance(error, NoisytuneError):
        error = exhausted(error)
    show.fail(error.line())
    return typer.Exit(error.exit_code)


app = typer.Typer(
    name="noisytune",
    cls=_Verbs,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from noisytune_cli.cli import show

        show.write_out(f"noisytune {__version__}\n")
        raise typer.Exit


#: What a shell asks for completions by, and the shells that do.
_COMPLETE = "_NOISYTUNE_COMPLETE"
_SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


def _completion() -> Any:
    return importlib.import_module("typer.completion")  # its own names are no part of what it exports


def _complete(param: typer.CallbackParam, wanted: bool) -> None:
    """Install completion for the shell that this runs in, or show what that would install.

    Typer would add both options by itself, and with them a fifth to the start of every run.
    """
    if not wanted:
        return
    import shellingham

    from noisytune_cli.cli import show

    try:
        shell = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        shell = ""
    if shell not in _SHELLS:
        raise typer.BadParameter(f"{shell or 'no shell'} is none of {', '.join(_SHELLS)}: run it in one")
    if param.name == "show_completion":
        script = _completion().get_completion_script(
            prog_name="noisytune", complete_var=_COMPLETE, shell=shell
        )
        show.write_out(f"{script}\n")
    else:
        try:
            _, path = _completion().install(shell=shell, prog_name="noisytune", complete_var=_COMPLETE)
        except (OSError, RuntimeError) as error:  # no home is a RuntimeError
            raise ResourceExhausted(
                "cannot install completion",
                path=getattr(error, "filename", None),
                why=getattr(error, "strerror", None) or str(error),
                next_step="Put what --show-completion prints into the shell's own start-up file",
            ) from error
        show.note(f"installed {path}: open a new {shell}")
    raise typer.Exit


@app.callback()
def noisytune(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion", callback=_complete, help="Have this shell complete verbs and options."
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option("--show-completion", callback=_complete, help="Show what that installs."),
    ] = False,
) -> None:
    """Add reproducible noise to a pretrained checkpoint before finetuning it (NoisyTune, ACL 2022)."""


def run() -> None:
    """Run the command line and end the process with its exit code."""
    if _COMPLETE in os.environ:
        _completion().completion_init()
    try:
        app(prog_name="noisytune", args=sys.argv[1:])
    except NoisytuneError as error:  # of --version, which no verb runs
        sys.exit(_report(error).exit_code)
    except OSError as error:  # of --help, which Typer prints
        from noisytune_cli.cli import show

        sys.exit(_report(show.lost_out(error)).exit_code)
