"""The ``farshore`` command: finds the verb, runs it, turns errors into one line and an exit code."""

import contextlib
import importlib
import json
import os
import select
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import click

from farshore import __version__
from farshore.errors import Failed, FarshoreError, UsageError

# For us and every process that we start: numpy's BLAS would begin a thread per core that spins for a while,
# a fifth of the start of a command, and we multiply no matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as a shell reports it."""


class Verb(NamedTuple):
    """Where a verb's click command is, and the line that the list of verbs shows for it."""

    target: str
    help: str


# A verb's module is imported only when the verb is used: TAB completion and --help start in a tenth of a
# second whatever the roles import. A new verb is one line here.
VERBS: Final[dict[str, Verb]] = {
    "demo": Verb("farshore.cli.demo:command", "Lose everything but the vault, and get it back."),
    "server": Verb("farshore.cli.server:command", "Make, take over and run a process server."),
    "token": Verb("farshore.cli.token:command", "Make a token with which a machine enrols."),
    "agent": Verb("farshore.cli.agent:command", "Enrol a machine and run its agent."),
    "volume": Verb("farshore.cli.volume:command", "Protect disks and look after them."),
    "machine": Verb("farshore.cli.machine:command", "List and revoke machines."),
    "status": Verb("farshore.cli.status:command", "Show every machine, the one in most trouble first."),
    "point": Verb("farshore.cli.point:command", "List and create recovery points."),
    "recover": Verb("farshore.cli.recover:command", "Write volumes at a point to files or a device."),
    "export": Verb("farshore.cli.export:command", "Serve a volume at a point over NBD."),
    "vault": Verb("farshore.cli.vault:command", "Look into a vault, and check that all of it is sound."),
    "hrl": Verb("farshore.cli.hrl:command", "Look into .hrl change logs."),
    "test": Verb("farshore.cli.test:command", "Run the tests of this checkout."),
}


class LazyGroup(click.Group):
    """A group whose commands are named in a table and imported when used."""

    def __init__(self, name: str, verbs: dict[str, Verb], help: str) -> None:
        super().__init__(name, help=help, context_settings={"help_option_names": ["-h", "--help"]})
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table, which is the order in which one meets them."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command; None when the table has no such verb."""
        verb = self._verbs.get(cmd_name)
        if verb is None:
            return None
        module, _, attribute = verb.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), verb.target
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; the inherited method would propose only verbs already imported."""
        if args[0] not in self._verbs and not args[0].startswith("-"):
            raise click.NoSuchCommand(args[0], possibilities=self._verbs, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table: the inherited method would import every module for its help line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in self._verbs.items()])


cli = LazyGroup(
    "farshore",
    VERBS,
    "Disaster recovery for Linux servers: replicate disks, recover any moment, fail over and back.",
)
click.version_option(__version__, prog_name="farshore", message="%(prog)s %(version)s")(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code (DESIGN, section 10)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words[: words.index("--")] if "--" in words else "--json" in words
    try:
        result = cli.main(words, prog_name="farshore", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _report(_translated(error), as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _forget_stdout()
            return 1
        return _report(error, as_json=as_json)
    return result if isinstance(result, int) else 0


def _translated(error: click.ClickException) -> FarshoreError:
    message = " ".join(error.format_message().split())
    if not isinstance(error, click.UsageError):
        return Failed(message)
    if message.endswith("?") or error.ctx is None:  # "Did you mean ...?" is the better advice
        return UsageError(message)
    return UsageError(message.removesuffix("."), fix=f"see '{error.ctx.command_path} --help'")


def _report(error: Exception, *, as_json: bool) -> int:
    if os.environ.get("FARSHORE_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    known = next((inner for inner in _leaves(error) if isinstance(inner, FarshoreError)), None)
    if known is None:
        cause = next(_leaves(error))
        known = Failed(
            "internal error",
            where=type(cause).__name__,
            why=str(cause),
            fix="set FARSHORE_DEBUG=1 for a traceback",
        )
    with contextlib.suppress(OSError):  # nobody may be reading either stream
        print(f"error: {known}", file=sys.stderr, flush=True)
        if as_json:
            print(json.dumps({"error": known.as_dict()}), flush=True)
    return known.exit_code


def _leaves(error: BaseException) -> Iterator[BaseException]:
    # A TaskGroup wraps what its tasks raised; a service unwraps it, a short command may not.
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _reader_is_gone() -> bool:
    """Tell whether stdout's reader went away (``| head``), as opposed to some socket of ours."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _forget_stdout() -> None:
    # What is still buffered would fail again, loudly, when the interpreter flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
