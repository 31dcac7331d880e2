"""The ``mlinfra`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mlinfra_sdk import spec
from mlinfra_sdk._version import __version__
from mlinfra_sdk.errors import MlinfraError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from mlinfra_sdk.ledger import Ledger, Machine

FAILED, USAGE, INTERRUPTED = 1, 2, 130

_RUN_HELP = """\
Run a Python script on a machine as if it ran here: it sees its arguments and standard input, its
output appears as it is made, and its exit status is this command's. Ctrl-C interrupts it. The
machine is stopped at its end, unless machine= names it.

settings:
{settings}

example:
  mlinfra run train.py idle=5m -- --epochs 3
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
        _say(str(error))
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
        return _run(options.file, options.settings, script)
    if options.command == "status":
        return _status(options.json)
    if options.command == "stop":
        return _stop(options.name, options.all)
    return _doctor(options.json)


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
        usage="mlinfra run FILE.py [KEY=VALUE ...] [-- ARGUMENT ...]",
        description=_RUN_HELP.format(settings=_indented(spec.describe(spec.NOTEBOOK))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("file", metavar="FILE.py", help="the script")
    run.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="a setting, see above")

    status = commands.add_parser(
        "status",
        help="show machines that run, what they cost, and all settings",
        description="Show the machines that run, what they have cost so far, and every setting "
        "with the place where it was set.",
    )
    status.add_argument("--json", action="store_true", help="print JSON")

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
    return parser


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _say(text: str) -> None:
    print(f"mlinfra: {text}", file=sys.stderr)


def _console() -> Console:
    from rich.console import Console

    # Into a file or a pipe nothing is cut off.
    width = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, markup=False, emoji=False, width=width)


# -- run -----------------------------------------------------------------------------------


def _run(file: str, words: list[str], arguments: list[str]) -> int:
    layer = _settings(words)
    path = Path(file)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RequestError(f"The script {file} cannot be read: {error.strerror}.") from None
    from mlinfra_sdk.session import Session
    from mlinfra_sdk.worker.script import run_script

    request = spec.resolve([*spec.configured(), layer]).request
    with Session(namespace={}, request=request, notebook=str(path)) as session:
        return session.call(run_script, file, str(path.absolute()), source, arguments)


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
    return spec.parse(values, place=spec.NOTEBOOK, origin="the command line")


# -- status --------------------------------------------------------------------------------


def _status(as_json: bool) -> int:
    from mlinfra_sdk.ledger import Ledger

    resolved = spec.resolve(spec.configured())
    ledger = Ledger.open()
    try:
        alive = _alive(ledger)
        month = time.mktime((*time.localtime()[:2], 1, 0, 0, 0, 0, 0, -1))
        cost = {machine.id: ledger.cost(machine.id).total for machine in alive}
        this_month, total = ledger.cost(since=month).total, ledger.cost().total
    finally:
        ledger.close()
    if as_json:
        _print_json(
            {
                "machines": [_as_json(machine, cost[machine.id]) for machine in alive],
                "usd_this_month": this_month / 1e6,
                "usd_total": total / 1e6,
                "settings": {
                    name: {"value": value, "origin": origin}
                    for name, value, origin in resolved.rows()
                },
            }
        )
    else:
        _show_status(alive, cost, this_month, total, resolved)
    return 0


def _alive(ledger: Ledger) -> list[Machine]:
    from mlinfra_sdk.machines import lifecycle
    from mlinfra_sdk.machines.portal import portal

    return portal().call(lifecycle.settle(ledger))


def _as_json(machine: Machine, cost: int) -> dict[str, Any]:
    return {
        "name": machine.name,
        "id": machine.id,
        "provider": machine.provider,
        "gpu": machine.gpu or None,
        "gpu_count": machine.gpu_count,
        "started_at": machine.started_at,
        "usd": cost / 1e6,
        "usd_per_hour": machine.price.micro_per_hour / 1e6,
        "price_source": machine.price.source,
        "price_date": machine.price.date,
    }


def _show_status(
    alive: list[Machine],
    cost: dict[str, int],
    this_month: int,
    total: int,
    resolved: spec.Resolved,
) -> None:
    from rich.table import Table

    from mlinfra_sdk.units import format_duration, format_usd

    console = _console()
    if alive:
        table = Table("machine", "on", "GPU", "up", "cost", "rate", box=None, pad_edge=False)
        for machine in alive:
            price = machine.price
            table.add_row(
                machine.name,
                machine.provider,
                f"{machine.gpu}:{machine.gpu_count}" if machine.gpu else "none",
                format_duration(time.time() - (machine.started_at or machine.intended_at)),
                format_usd(cost[machine.id]),
                f"{format_usd(price.micro_per_hour)}/h ({price.source}, {price.date})",
            )
        console.print(table)
    else:
        console.print("No machine runs.")
    console.print(
        f"Cost of all machines: {format_usd(this_month)} this month, {format_usd(total)} in all."
    )
    console.print()
    table = Table("setting", "value", "set in", box=None, pad_edge=False)
    for row in resolved.rows():
        table.add_row(*row)
    console.print(table)


# -- stop ----------------------------------------------------------------------------------


def _stop(name: str | None, every: bool) -> int:
    from mlinfra_sdk.ledger import Ledger
    from mlinfra_sdk.machines import lifecycle
    from mlinfra_sdk.machines.portal import portal

    ledger = Ledger.open()
    try:
        alive = _alive(ledger)
        chosen = alive if every else _chosen(alive, name)
        for machine in chosen:
            portal().call(lifecycle.stop_known(machine, ledger, "stopped by the user"))
            print(f"{machine.name} is stopped.")
        if not chosen:
            print("No machine runs.")
    finally:
        ledger.close()
    return 0


def _chosen(alive: list[Machine], name: str | None) -> list[Machine]:
    if name is None and len(alive) <= 1:
        return alive
    found = [machine for machine in alive if machine.name == name]
    if found:
        return found
    names = [machine.name for machine in alive]
    hint = f"Running: {', '.join(names) or 'none'}."
    if name is None:
        raise MlinfraError("More than one machine runs; say which one, or --all.", hint=hint)
    raise MlinfraError(f"No machine {name!r} runs.{spec.did_you_mean(name, names)}", hint=hint)


# -- doctor --------------------------------------------------------------------------------


def _doctor(as_json: bool) -> int:
    from mlinfra_sdk.doctor import checks

    found = []
    console = _console()
    for check in checks():
        found.append(check)
        if not as_json:
            console.print("ok     " if check.ok else "PROBLEM", check.name + ":", check.detail)
            if not check.ok:
                console.print("        ", check.mend)
    problems = sum(not check.ok for check in found)
    if as_json:
        _print_json({"ok": not problems, "checks": found})
    elif problems:
        console.print(f"{problems} problem{'s' * (problems != 1)} found.")
    else:
        console.print("Everything works.")
    return FAILED if problems else 0


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
