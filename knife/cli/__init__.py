"""The command line: the only package that knows typer and rich, prints, and makes exit codes of errors.

Nothing heavy is imported before a command needs it, so that `knife --help` answers at once.
"""

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from knife import __version__
from knife.cli.benching import bench
from knife.cli.crash import write_report
from knife.cli.data import data_app
from knife.cli.facts import doctor, info, phantom, presets
from knife.cli.measure import calibrate, evaluate
from knife.cli.models import models_app
from knife.cli.plugins import plugins_app
from knife.cli.terminal import give, say
from knife.cli.training import train
from knife.cli.translating import demo, sweep, translate
from knife.errors import KnifeError

DISK, MEMORY = 4, 5  # the exit codes of what the system refuses
COMMANDS = (train, translate, sweep, calibrate, evaluate, bench, demo, phantom, presets, info, doctor)

app = typer.Typer(
    help="Image-to-image translation with one diffusion model and many tasks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(plugins_app, name="plugins")
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the command line; every refusal is one sentence and an exit code, a traceback only with --debug."""
    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        raise KeyboardInterrupt  # removes what is half written; a plugin's hook passes it on, unlike SystemExit

    signal.signal(signal.SIGTERM, end)
    try:
        code = exit_code()
        code = written_out() or code
        hear_no_more()
    except KeyboardInterrupt:  # before typer listens, or after
        code = 128 + signal.SIGINT
        hear_no_more()
    sys.exit(128 + ended[0] if ended else code)


def exit_code() -> int:
    """Do what the command line says, and tell in one line why it was refused, if it was; return the exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if debug:
            traceback.print_exc()
        said, code = verdict(error)
        say(f"knife: {said}")
        return code
    return 0


def written_out() -> int:
    """Write out what stdout still holds, and return 0; or an exit code, if it takes no more. Nobody needs to listen."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again, and complains
        if not isinstance(error, BrokenPipeError):
            say(f"knife: stdout: {error.strerror}; make room.")
            return DISK
    return 0


def hear_no_more() -> None:
    """Let signals end the process at once and without words: what was to be done is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def verdict(error: Exception) -> tuple[str, int]:
    """Return what is said of an error, in one line, and the exit code: see the README's table."""
    if isinstance(error, KnifeError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'a file'}: {error.strerror}; make room, or allow it.", DISK
    if short_of_memory(error):
        return "out of memory; give smaller images, a smaller --batch-size, or another --device.", MEMORY
    report = write_report(error, typer.main.get_group(app).commands)
    where = f"; {report} holds what a report needs, and nothing of your data" if report else ""
    return f"internal error, {type(error).__name__}: {error}; --debug shows where{where}.", 1


def short_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; torch, if it is loaded, has its own ways of saying so."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from knife.devices import ran_out_of_memory

    return ran_out_of_memory(error)


def version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        give(f"knife {__version__}")
        raise typer.Exit


@app.callback()
def knife(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where knife refuses or fails.")] = False,
) -> None:
    """Image-to-image translation with one diffusion model and many tasks."""
