"""``mlinfra compare``: a script on several targets."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlinfra_sdk.cli_runs import imports_of_script
from mlinfra_sdk.comparison import Comparison, Plan, run
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.terminal import say

_EXAMPLE = "Write such as: mlinfra compare train.py on=local,ssh:box repeat=3"


def dispatch(options: argparse.Namespace) -> int:
    """Carry out the command; 1 if a target has failed."""
    plan = _plan(options.settings)
    try:
        source = Path(options.file).read_bytes()
        code = source.decode()
        compile(code, options.file, "exec")
    except OSError as error:
        raise RequestError(f"{options.file} cannot be read: {error.strerror}.") from None
    except (SyntaxError, ValueError) as error:
        raise RequestError(f"{options.file} is no Python script: {error}.") from None
    shown: dict[str, str] = {}

    def look(comparison: Comparison) -> None:
        for target in comparison.targets:
            if shown.get(target.target) != target.phase:
                shown[target.target] = target.phase
                say(f"{target.name}: {target.phase}")

    imports = imports_of_script(options.file, source)
    comparison, _ = run(plan, code, {}, look=look, notebook=options.file, imports=imports)
    if options.json:
        print(comparison.to_json())
    elif options.csv:
        print(comparison.to_csv(), end="")
    else:
        print(comparison)
    return int(any(target.error for target in comparison.targets))


def _plan(words: list[str]) -> Plan:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RequestError(f"{word!r} is not KEY=VALUE.", hint=_EXAMPLE)
        pairs[key] = value
    on = [name for name in pairs.pop("on", "").split(",") if name]
    if not on:
        raise RequestError("mlinfra compare needs the targets: on=", hint=_EXAMPLE)
    repeat = pairs.pop("repeat", "1")
    if not repeat.isdigit():
        raise RequestError(f"repeat={repeat} is no number.", hint=_EXAMPLE)
    return Plan(on, int(repeat), settings=pairs)
