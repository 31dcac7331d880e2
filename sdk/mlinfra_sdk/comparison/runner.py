"""Runs the same work on each target, isolated, and side by side where that disturbs nobody."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlinfra_sdk import spec, targets
from mlinfra_sdk.comparison.agreement import comparable, differences
from mlinfra_sdk.comparison.isolation import isolated
from mlinfra_sdk.comparison.result import Comparison, TargetResult, Trial
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.frontend import Console
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.namespace.analysis import CellNames, cell_names
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Layer, Request
from mlinfra_sdk.worker.records import Record

_FUNCTION, _ARGUMENTS = "mlinfra_function", "mlinfra_arguments"
_WORDS = {"_": "the result", _ARGUMENTS: "the arguments"}
_HERE = ("local", "container")
"""Providers whose machines are this computer: two of them at once would slow each other down."""
_OUTPUT = 4000
"""Characters of the output of a trial that are kept: its last ones."""
_EVERY = 0.5

Look = Callable[[Comparison], None]


@dataclass(frozen=True)
class Plan:
    """What to compare. ``settings`` are those of ``%%remote`` for all targets, over ``layers`` of
    defaults; ``gpu=`` counts only for targets other than ``local``. ``keep``: variables that the
    caller gets from the first target."""

    on: Sequence[str]
    repeat: int = 1
    keep: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    layers: Sequence[Layer] = ()

    def requests(self) -> list[Request]:
        """One for each target. Raises :class:`RequestError`."""
        if len(set(self.on)) != len(self.on) or len(self.on) < 2:
            raise RequestError(
                f"on={','.join(self.on)} names {'one target twice' if self.on else 'no target'}."
                if len(set(self.on)) != len(self.on) or not self.on
                else f"on={self.on[0]} is one target; a comparison needs two.",
                hint="Write targets with a comma between them, such as on=local,ssh:box",
            )
        if self.repeat < 1:
            raise RequestError(f"repeat={self.repeat} is no number of runs.", hint="Write repeat=3")
        return [self._request(target) for target in self.on]

    def _request(self, target: str) -> Request:
        given = {**self.settings, "on": target}
        layers = [*spec.configured(), *self.layers]
        if _provider(target) == targets.DEFAULT:
            given.pop("gpu", None)
            layers = [
                replace(it, values={k: v for k, v in it.values.items() if k != "gpu"})
                for it in layers
            ]
        layer = spec.parse(given, place=spec.NOTEBOOK, origin="the comparison")
        return spec.resolve([*layers, layer]).request


def compare(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    on: Sequence[str],
    repeat: int = 1,
    **settings: object,
) -> Comparison:
    """Call ``function(*args, **kwargs)`` on each target of ``on`` with the same arguments and
    compare time, cost, use of the machine, and what it returns.

    Arguments are copied for each call, so none sees what another one changes. ``settings`` are
    those of ``%%remote``. Raises :class:`RequestError`; a target that fails says so in its result.
    """
    plan = Plan(on, repeat, settings=settings)
    namespace = {_FUNCTION: function, _ARGUMENTS: (tuple(args), dict(kwargs or {}))}
    code = f"{_FUNCTION}(*{_ARGUMENTS}[0], **{_ARGUMENTS}[1])"
    names = CellNames(frozenset(namespace), frozenset(), frozenset(), False)
    main = vars(sys.modules["__main__"])
    return run(plan, code, {**main, **namespace}, names=names)[0]


def run(
    plan: Plan,
    code: str,
    namespace: Mapping[str, Any],
    *,
    names: CellNames | None = None,
    look: Look = lambda comparison: None,
    root: Path | None = None,
    notebook: str = "",
    imports: Iterable[str] = (),
) -> tuple[Comparison, dict[str, Any]]:
    """Run code on each target; gives the comparison, and what ``plan.keep`` names of the first.

    ``look`` is called in this thread now and then with how far it is. Ctrl-C stops all targets.
    Machines are stopped at the end.
    """
    requests = plan.requests()
    names = names or cell_names(code, namespace, code)
    work = _Work(plan, code, dict(namespace), names, root, notebook, list(imports))
    comparison = Comparison([TargetResult(target) for target in plan.on], plan.repeat)
    jobs = list(zip(requests, comparison.targets, strict=True))
    here = [job for job in jobs if _provider(job[0].on) in _HERE]
    elsewhere = [job for job in jobs if job not in here]
    with ThreadPoolExecutor(len(elsewhere) + 1, "compare") as pool:
        pending: set[Future[None]] = {pool.submit(work.targets, here)}
        pending |= {pool.submit(work.targets, [job]) for job in elsewhere}
        try:
            while pending:
                done, pending = wait(pending, _EVERY, FIRST_COMPLETED)
                for future in done:
                    future.result()
                look(comparison)
        except BaseException:
            work.stop()
            raise
    _compare_results(comparison)
    look(comparison)
    return comparison, work.kept


class _Work:
    """The work, and the sessions that are at it."""

    def __init__(
        self,
        plan: Plan,
        code: str,
        namespace: dict[str, Any],
        names: CellNames,
        root: Path | None,
        notebook: str,
        imports: list[str],
    ) -> None:
        self._plan = plan
        self._code = code
        self._namespace = namespace
        self._names = names
        self._root = root
        self._notebook = notebook
        self._imports = imports
        self._sessions: list[Session] = []
        self._lock = threading.Lock()
        self._stopped = False
        self.kept: dict[str, Any] = {}

    def targets(self, jobs: Sequence[tuple[Request, TargetResult]]) -> None:
        """One target after the other."""
        for request, result in jobs:
            if not self._stopped:
                self._target(request, result)

    def stop(self) -> None:
        """Interrupt all, and begin nothing more."""
        self._stopped = True
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.interrupt()

    def _target(self, request: Request, result: TargetResult) -> None:
        variables: dict[str, Any] = {}
        session = Session(
            namespace=variables,
            request=request,
            root=self._root,
            notebook=self._notebook,
            trial=True,
        )
        session.need(self._imports)
        with self._lock:
            self._sessions.append(session)
        try:
            for number in range(self._plan.repeat):
                if self._stopped:
                    break
                trial = self._trial(session, variables, result, fresh=number > 0)
                result.trials.append(trial)
                if trial.error:
                    result.error = trial.error
                    break
            result.phase = "failed" if result.error else "done"
        except MlinfraError as error:
            result.phase, result.error = "failed", str(error)
        finally:
            with self._lock:
                self._sessions.remove(session)
            session.close()

    def _trial(
        self, session: Session, variables: dict[str, Any], result: TargetResult, *, fresh: bool
    ) -> Trial:
        if fresh:  # a new process: nothing of the trial before is warm
            session.restart()
        copied, left_out = isolated(self._namespace, self._names)
        variables.clear()
        variables.update(copied)
        if left_out:
            result.notes = [f"{name} cannot be copied and was left out." for name in left_out]
        trial = Trial()
        recorder = _Recorder(result, trial, starting=not fresh)
        try:
            # Functions still have the globals that they were made with: what those use is named.
            names = self._names._replace(reads=self._names.reads | copied.keys())
            done = session.execute(self._code, names, frontend=recorder, count=1)
        finally:
            recorder.ended()
        trial.usage, trial.output = done.usage, recorder.output
        if done.error is not None:
            trial.error = f"{type(done.error).__name__}: {done.error}"
            return trial
        trial.results = {name: variables[name] for name in done.report.changed if name in variables}
        if done.value is not None:
            trial.results["_"] = done.value
        if result.target == self._plan.on[0] and not fresh:
            self.kept = {name: variables[name] for name in self._plan.keep if name in variables}
        return trial


class _Recorder(Console):
    """Takes the time of a trial's phases, and the end of its output."""

    allow_stdin = False

    def __init__(self, result: TargetResult, trial: Trial, *, starting: bool) -> None:
        super().__init__()
        self._result = result
        self._trial = trial
        self._phase = "start" if starting else "compute"
        self._since = time.monotonic()
        self.output = ""
        result.phase = self._phase

    def phase(self, phase: str) -> None:
        """Take the time."""
        now = time.monotonic()
        seconds = self._trial.seconds
        seconds[self._phase] = seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
        self._phase = "compute" if phase in ("running", "reconnecting") else phase
        self._result.phase = self._phase

    def ended(self) -> None:
        """The trial is over."""
        self.phase("compute")

    def placed(self, machine: LiveMachine) -> None:
        """Keep what it is and costs."""
        result, price = self._result, machine.offer.price
        result.machine, result.gpu = machine.name, str(machine.offer.gpu or "")
        result.rate = price.micro_per_hour if price.known else None
        result.price_source = price.describe() if price.known and price.micro_per_hour else ""

    def publish(self, record: Record) -> None:
        """Keep the end of what is printed."""
        if record.msg_type == "stream":
            self.output = (self.output + json.loads(record.content)["text"])[-_OUTPUT:]

    def note(self, text: str) -> None:
        """Keep it with the target."""
        self._result.notes.append(text)


def _compare_results(comparison: Comparison) -> None:
    reference = comparison.reference
    if not reference.done:
        return
    wanted = reference.good()[0].results
    for target in comparison.targets[1:]:
        if not target.done:
            continue
        found = target.good()[0].results
        for name in sorted(wanted.keys() & found.keys()):
            if comparable(wanted[name]):
                target.compared += 1
                target.differences += differences(wanted[name], found[name], _WORDS.get(name, name))


def _provider(target: str) -> str:
    """The name of the provider behind a target. Raises :class:`RequestError`."""
    try:
        return targets.find(target).provider
    except ValueError as error:
        raise RequestError(f"There is no target {target!r}.{error}") from None
