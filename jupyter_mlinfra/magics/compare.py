"""``%%compare``: the same cell on several targets, with a chart that grows while they are at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from IPython.display import display

from mlinfra_sdk import spec
from mlinfra_sdk.comparison import Comparison, Plan, run
from mlinfra_sdk.comparison.chart import render
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.spec import Layer

from . import grammar

ORIGIN = "the %%compare line"
OWN = ("on", "repeat", "keep", "result")
_EXAMPLE = "Write such as %%compare on=local,ssh:box repeat=3 keep=model"

HELP = f"""Run this cell on several targets and compare speed, cost and results.

    %%compare on=TARGET,TARGET[,...] [repeat=N] [keep=NAME,...] [result=NAME] [KEY=VALUE ...]

Each target gets the same variables, copied, and none sees what another one changes; nor does this
notebook, but for the variables of keep=, which come from the first target. The others are compared
with the first one. Targets on this computer run one after the other, the rest beside them. gpu=
counts for all targets but local. Machines are stopped at the end. result=NAME binds the
comparison: NAME.to_frame(), .to_csv(), .to_json(). Files that the cell writes on `local` land
in this folder as always.

Keys beside these:

{spec.describe(spec.NOTEBOOK)}
"""


def parse(line: str, layers: Sequence[Layer] = ()) -> tuple[Plan, str]:
    """The plan written on a ``%%compare`` line, and the name for its result. Raises
    :class:`RequestError`."""
    pairs = grammar.pairs_of(line, ORIGIN, OWN)
    own = {key: pairs.pop(key, "") for key in OWN}
    if not own["on"]:
        raise RequestError("%%compare needs the targets to compare: on=", hint=_EXAMPLE)
    try:
        repeat = int(own["repeat"] or 1)
    except ValueError:
        raise RequestError(f"repeat={own['repeat']} is no number.", hint=_EXAMPLE) from None
    keep = [name for name in own["keep"].split(",") if name]
    for name in filter(None, [*keep, own["result"]]):
        if not name.isidentifier():
            raise RequestError(f"{name!r} in {ORIGIN} is not a variable name.", hint=_EXAMPLE)
    on = [name for name in own["on"].split(",") if name]
    return Plan(on, repeat, keep, pairs, layers), own["result"]


def compare_cell(shell: Any, line: str, cell: str, defaults: Layer) -> None:
    """Run it over the notebook's defaults."""
    plan, result = parse(line, [defaults])
    code = f"#%%compare {line}\n{cell}"
    names = cell_names(shell.transform_cell(code), shell.user_ns, code)
    shown = Chart()
    comparison, kept = run(
        plan,
        code,
        shell.user_ns,
        names=names,
        look=shown.show,
        root=Path.cwd(),
        notebook=str(shell.user_ns.get("__session__", "")),
        imports=names.imports,
    )
    comparison.kept = sorted(kept)
    shell.user_ns.update(kept)
    if result:
        shell.user_ns[result] = comparison
    missing = [name for name in plan.keep if name not in kept]
    if missing:
        print(f"%%compare: {', '.join(missing)} of keep= was not bound on {plan.on[0]}.")


class Chart:
    """One display that is drawn again when something has changed."""

    def __init__(self, show: Callable[..., Any] = display) -> None:
        self._show = show
        self._handle: Any = None
        self._html = ""

    def show(self, comparison: Comparison) -> None:
        """Draw it."""
        html = render(comparison)
        if html == self._html:
            return
        self._html = html
        bundle = {"text/html": html, "text/plain": str(comparison)}
        if self._handle is None:
            self._handle = self._show(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
