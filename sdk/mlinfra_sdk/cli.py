"""The ``mlinfra`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mlinfra_sdk import spec
from mlinfra_sdk._version import __version__
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.terminal import console, print_json, say

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_ORIGIN = "the command line"

_RUN_HELP = """\
Run a Python script on a machine as if it ran here: it sees its arguments and standard input, its
output appears as it is made, and its exit status is this command's. Ctrl-C interrupts it. The
machine is stopped at its end, unless machine= names it.

With --detach it is left running on its machine: `mlinfra attach` shows its output.

settings:
{settings}

example:
  mlinfra run train.py idle=5m -- --epochs 3
"""

_ATTACH_HELP = """\
Without a NAME the only run is meant. Ctrl-C leaves it running. Its variables stay on the machine
for a notebook. Exits as the script did, or with 1 if the run failed.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command's entry point. Exits with 0, 1 (failure), 2 (usage), 130 (Ctrl-C), or the
    status of the script that it ran."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    # Who ends this command by a signal ends what it has started, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except MlinfraError as error:
        say(str(error))
        status = USAGE if isinstance(error, RequestError) else FAILED
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # Who read our output is gone (`mlinfra run x.py | head`): that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _dispatch(words: list[str]) -> int:
    # Everything behind -- belongs to the script, whatever it looks like.
    own, script = words, []
    if "--" in words:
        cut = words.index("--")
        own, script = words[:cut], words[cut + 1 :]
    options = _parser().parse_args(own)
    if script and options.command != "run":
        raise RequestError(f"{options.command} takes no arguments behind --.")
    if options.command == "run":
        return _run(options, script)
    if options.command in ("status", "extend", "shell", "stop"):
        from mlinfra_sdk import cli_machines

        return cli_machines.dispatch(options)
    if options.command == "doctor":
        return _doctor(options.json)
    if options.command == "catalog":
        from mlinfra_sdk import cli_catalog

        return cli_catalog.dispatch(options)
    if options.command == "quote":
        from mlinfra_sdk import cli_quote

        layers = [*spec.configured(), _settings(options.settings)]
        return cli_quote.dispatch(options, spec.resolve(layers).request)
    if options.command == "sweep":
        from mlinfra_sdk import cli_sweep

        return cli_sweep.dispatch(options)
    if options.command == "checkpoints":
        from mlinfra_sdk import cli_checkpoints

        return cli_checkpoints.dispatch(options)
    if options.command == "compare":
        from mlinfra_sdk import cli_compare

        return cli_compare.dispatch(options)
    if options.command == "cost":
        from mlinfra_sdk import cli_cost

        return cli_cost.dispatch(options)
    from mlinfra_sdk import cli_runs

    return cli_runs.dispatch(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlinfra",
        description="Run Python code on a remote machine as if it were local.",
        epilog="`mlinfra COMMAND --help` says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlinfra-sdk {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="run a Python script on a machine",
        usage="mlinfra run FILE.py [KEY=VALUE ...] [--yes] [--detach [--name NAME]] "
        "[-- ARGUMENT ...]",
        description=_RUN_HELP.format(settings=_indented(spec.describe(spec.NOTEBOOK))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("file", metavar="FILE.py", help="the script")
    run.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="a setting, see above")
    run.add_argument("--yes", action="store_true", help="ask nothing before a machine is started")
    run.add_argument("--detach", action="store_true", help="leave it running and return at once")
    run.add_argument("--name", metavar="NAME", help="name of the detached run, to find it again")

    status = commands.add_parser(
        "status",
        help="show machines that run, what they cost, and all settings",
        description="Show the machines that run, what they have cost so far, and every setting "
        "with the place where it was set.",
    )
    status.add_argument("--json", action="store_true", help="print JSON")

    compare = commands.add_parser(
        "compare",
        help="run a Python script on several targets: how fast, at what cost",
        usage="mlinfra compare FILE.py on=TARGET,TARGET [repeat=N] [KEY=VALUE ...] "
        "[--json | --csv]",
        description="Runs the script on each target, one process each, and compares time, cost, "
        "use of the machine and the variables that it leaves. Settings are those of `mlinfra run`.",
    )
    compare.add_argument("file", metavar="FILE.py", help="the script")
    compare.add_argument("settings", metavar="KEY=VALUE", nargs="+", help="targets and settings")
    shape = compare.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--csv", action="store_true", help="print CSV, a line for each figure")

    quote = commands.add_parser(
        "quote",
        help="compare what a machine would cost, wherever it can be had",
        description="Ask everybody who is set up what the machine would cost that these settings "
        "ask for, such as gpu=A10. Nothing is started.",
    )
    quote.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="as for `mlinfra run`")
    quote.add_argument(
        "--run", metavar="N", type=int, help="also what the cell of run N would take and cost there"
    )
    quote.add_argument("--json", action="store_true", help="print JSON")

    extend = commands.add_parser(
        "extend",
        help="keep a machine for longer though it is idle",
        description="Have the machine of this name (without one, the only one that runs) not stop "
        "for being idle, nor for its time, before so long from now. Budgets are kept.",
    )
    extend.add_argument("name", metavar="NAME", nargs="?", help="as `mlinfra status` shows it")
    extend.add_argument("duration", metavar="DURATION", nargs="?", help="such as 2h (default: 30m)")

    shell = commands.add_parser(
        "shell",
        help="open a shell on a machine",
        description="Open a shell on the machine of this name (without one, the only one that "
        "runs), in its files and with its packages. It is no sign that the machine is needed: that "
        "ends when it is idle, and the shell with it.",
    )
    shell.add_argument("name", metavar="NAME", nargs="?", help="as `mlinfra status` shows it")

    stop = commands.add_parser(
        "stop",
        help="stop a machine",
        description="Stop the machine of this name; without a name, the only one that runs.",
    )
    which = stop.add_mutually_exclusive_group()
    which.add_argument("name", metavar="NAME", nargs="?", help="as `mlinfra status` shows it")
    which.add_argument("--all", action="store_true", help="stop all machines that run")

    doctor = commands.add_parser(
        "doctor",
        help="check that everything works here",
        description="Check that everything works here, and say how to mend what does not. "
        "Exits with 1 if there is a problem.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_sweep_command(commands)
    _add_cost_command(commands)
    _add_checkpoints_command(commands)
    _add_catalog_command(commands)
    _add_run_commands(commands)
    return parser


def _add_catalog_command(commands: Any) -> None:
    found = commands.add_parser(
        "catalog",
        help="list accelerators and what they cost",
        description="List accelerators with their figures, and prices with their day; each with "
        "its source in JSON.",
    )
    found.add_argument("--gpu", metavar="GPU", help="only what gpu=GPU would take, as in A10|24GB")
    found.add_argument("--provider", metavar="NAME", help="only prices of this one")
    found.add_argument(
        "--refresh", action="store_true", help="first ask providers that are set up for their rates"
    )
    found.add_argument("--json", action="store_true", help="print JSON")


def _add_sweep_command(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="stop machines that nobody wants any more",
        description="Ask all providers what runs. What this computer started and does not want is "
        "stopped; what is gone is closed in the ledger; what was billed is recorded. Machines of "
        "other computers that use the same accounts are shown. Sessions do the same when they "
        "start, at most every ten minutes. Exits with 1 if something could not be stopped.",
    )
    sweep.add_argument("--dry-run", action="store_true", help="only show what would be done")
    sweep.add_argument(
        "--all", action="store_true", help="stop those of other computers, too, whosever they are"
    )
    sweep.add_argument("--json", action="store_true", help="print JSON")


def _add_checkpoints_command(commands: Any) -> None:
    found = commands.add_parser(
        "checkpoints",
        help="list, export and remove checkpoints of training runs",
        description="List checkpoints: the newest of each name, or all of one. `stored` is what "
        "they really take, without what others have too.",
    )
    found.add_argument("name", nargs="?", metavar="NAME", help="only these")
    found.add_argument("--number", type=int, metavar="N", help="the one to export or remove")
    action = found.add_mutually_exclusive_group()
    action.add_argument("--export", metavar="FOLDER", help="write one as plain files")
    action.add_argument("--keep", type=int, metavar="COUNT", help="remove all but the newest")
    action.add_argument("--remove", action="store_true", help="remove one, or all of the name")
    action.add_argument("--json", action="store_true", help="as JSON")


def _add_cost_command(commands: Any) -> None:
    cost = commands.add_parser(
        "cost",
        help="show what was spent by day, notebook, machine, provider or run",
        description="Show what machines have cost. The rows always add up to the whole.",
    )
    cost.add_argument(
        "--by",
        metavar="GROUP",
        default="day",
        help="day, notebook, machine, provider or run (default: day)",
    )
    cost.add_argument(
        "--table",
        metavar="TABLE",
        help="the ledger's own entries instead: machines, runs, charges (bills), transfers or "
        "measurements, as JSON or with --output",
    )
    cost.add_argument(
        "--since", metavar="WHEN", default="30d", help="a date or a duration ago (default: 30d)"
    )
    cost.add_argument("--until", metavar="WHEN", help="a date or a duration ago (default: now)")
    output = cost.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument(
        "--output", metavar="FILE", help="write FILE.csv, FILE.json or FILE.parquet instead"
    )


def _add_run_commands(commands: Any) -> None:
    runs = commands.add_parser(
        "runs",
        help="list runs that go on, wait, or have ended and not been collected",
        description="List the runs on all machines: those that go on, that wait, and that have "
        "ended and have not been collected by a notebook.",
    )
    runs.add_argument("--json", action="store_true", help="print JSON")
    for name, words, more in (
        ("attach", "show a run: its whole output, live from there on", _ATTACH_HELP),
        ("logs", "show what a run has printed", ""),
        ("wait", "wait for the end of a run", "Exits with 0 if the run has succeeded, else 1."),
        ("cancel", "interrupt a run, take it out of the queue, or discard it", ""),
    ):
        sentence = f"{words[0].upper()}{words[1:]}."
        command = commands.add_parser(name, help=words, description=f"{sentence} {more}".strip())
        optional = "?" if name == "attach" else None
        command.add_argument("name", metavar="NAME", nargs=optional, help="name or id of the run")
        if name == "logs":
            command.add_argument("-f", "--follow", action="store_true", help="go on until its end")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


# -- run -----------------------------------------------------------------------------------


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    file, layers = options.file, [*spec.configured(), _settings(options.settings)]
    if options.yes:
        layers.append(spec.parse({"confirm": "no"}, place=spec.NOTEBOOK, origin="--yes"))
    if options.name is not None:
        if not options.detach:
            raise RequestError("--name is the name of a detached run.", hint="Add --detach.")
        layers.append(spec.parse({"name": options.name}, place=spec.CELL, origin=_ORIGIN))
    path = Path(file)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RequestError(f"The script {file} cannot be read: {error.strerror}.") from None
    from mlinfra_sdk.cli_runs import imports_of_script
    from mlinfra_sdk.session import Session
    from mlinfra_sdk.worker.script import run_script

    request = spec.resolve(layers).request
    if options.detach:
        from mlinfra_sdk.cli_runs import start_script

        return start_script(request, file, source, arguments)
    session = Session(namespace={}, request=request, notebook=str(path))
    try:
        session.need(imports_of_script(file, source))
        return session.call(run_script, file, str(path.absolute()), source, arguments)
    finally:
        # Not close(), which leaves a machine to a run that goes on: nobody would miss this one.
        if request.machine is None:
            session.stop()
        else:
            session.close()


def _settings(words: list[str]) -> spec.Layer:
    values: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        setting = spec.SETTINGS.get(key)
        if not equals and (setting is None or setting.kind is not spec.FLAG):
            raise RequestError(
                f"{word!r} is not KEY=VALUE.",
                hint="The script's own arguments come after --.",
            )
        values[key] = value if equals else True
    return spec.parse(values, place=spec.NOTEBOOK, origin=_ORIGIN)


# -- doctor --------------------------------------------------------------------------------


def _doctor(as_json: bool) -> int:
    from mlinfra_sdk.doctor import checks

    found = []
    out = console()
    for check in checks():
        found.append(check)
        if not as_json:
            word = "ok     " if check.ok else "-      " if check.optional else "PROBLEM"
            out.print(word, check.name + ":", check.detail)
            if not check.ok:
                out.print("        ", check.mend)
    problems = sum(not check.ok and not check.optional for check in found)
    if as_json:
        print_json({"ok": not problems, "checks": found})
    elif problems:
        out.print(f"{problems} problem{'s' * (problems != 1)} found.")
    else:
        out.print("Everything works.")
    return FAILED if problems else 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
