"""Runs in SkyPilot's own environment, and does by its Python API what ``engine.py`` asks for.

Requests are lines of JSON on standard input, each with an ``id``, an ``op`` and its arguments. They
are worked on at the same time, and answered in any order by lines of the same ``id``: any number
with ``tell``, then one with ``result`` or ``error``. When the input ends, whoever asked is gone:
clusters that he was launching and has not kept are taken down.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_IDLE = 600.0
"""Seconds without a request after which this process ends; the next request starts another."""
_ROLL_BACK = 900.0
"""Seconds that a takedown may last when nobody waits for it."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHATTER = re.compile(r"<sky-payload|[-─]{5}|.*View logs|\s*$")
_LONGEST_MESSAGE = 600
_OFFLINE = re.compile(r"catalogs?/v\d+/|Failed to fetch .* catalog")

Tell = Callable[[str], None]


class Refusal(Exception):
    """An error of the class of ours named ``kind``, to be told as it is."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.hint = hint


# -- what can be had -----------------------------------------------------------------------------

_optimizing = threading.Lock()
"""The optimizer runs in this process, and is made for one request at a time."""


def offers(
    tell: Tell, wishes: list[dict[str, int]], resources: dict[str, Any], most: int
) -> dict[str, Any]:
    """What SkyPilot's optimizer would take for each of the wishes (accelerators of which one is
    wanted; none at all for a CPU), then what it would take without that, and so on."""
    found: list[dict[str, Any]] = []
    why = ""
    with _optimizing, _errors():
        for place, wish in enumerate(wishes):
            for candidate in _candidates(resources | ({"accelerators": wish} if wish else {})):
                if isinstance(candidate, str):
                    why = why or candidate
                    break
                found.append({"wish": place, **candidate})
                if sum(one["wish"] == place for one in found) == most:
                    break
    return {"candidates": found, "why": why}


def _candidates(resources: Mapping[str, Any]) -> Iterator[dict[str, Any] | str]:
    """What fits, the cheapest first; at last why there is no more."""
    import sky
    from sky import exceptions

    passed_over: list[Any] = []
    while True:
        task = sky.Task.from_yaml_config({"resources": dict(resources)})
        dag = sky.Dag()
        dag.add(task)
        try:
            dag = sky.Optimizer.optimize(dag, blocked_resources=passed_over, quiet=True)
        except exceptions.ResourcesUnavailableError as error:
            yield _text(error)
            return
        best = dag.tasks[0].best_resources
        accelerators = list((best.accelerators or {}).items())
        yield {
            "cloud": str(best.cloud),
            "region": best.region or "",
            "instance": best.instance_type or "",
            "accelerator": accelerators[0][0] if accelerators else "",
            "count": int(accelerators[0][1]) if accelerators else 0,
            "spot": bool(best.use_spot),
            "usd_per_hour": float(best.get_cost(3600)),
            "date": _catalog_date(str(best.cloud)),
            "autodown": _turns_itself_off(best),
        }
        passed_over.append(best.copy(zone=None))


def _turns_itself_off(resources: Any) -> bool:
    from sky import exceptions
    from sky.clouds import CloudImplementationFeatures as Features

    try:
        resources.cloud.check_features_are_supported(resources, {Features.AUTODOWN})
    except exceptions.NotSupportedError:
        return False
    return True


def _catalog_date(cloud: str) -> str:
    """The day (ISO) on which the prices of a cloud were fetched; empty if it has no list."""
    from sky.catalog.common import get_catalog_path

    try:
        fetched = os.path.getmtime(get_catalog_path(f"{cloud.lower()}/vms.csv"))
    except OSError:
        return ""
    return datetime.date.fromtimestamp(fetched).isoformat()


def clouds(tell: Tell) -> list[str]:
    """The clouds that were found to be enabled when that was last checked."""
    from sky import global_user_state, skypilot_config
    from sky.clouds import CloudCapability

    found = global_user_state.get_cached_enabled_clouds(
        CloudCapability.COMPUTE, workspace=skypilot_config.get_active_workspace()
    )
    return [str(cloud) for cloud in found]


# -- clusters ------------------------------------------------------------------------------------


class _Launch:
    """A cluster that nobody has kept so far, and the request that makes it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.request: Any = None
        self.given_up = False


_launching: dict[str, _Launch] = {}


def launch(tell: Tell, cluster: str, task: dict[str, Any]) -> None:
    """Have a cluster with this name, and its job running. A failure leaves nothing behind."""
    import sky
    from sky.client import sdk

    mine = _launching[cluster] = _Launch()
    try:
        with _errors():
            if _state(cluster) != "UP":
                with mine.lock:
                    if mine.given_up:
                        raise Refusal("ProviderError", "The launch was given up.")
                    mine.request = sdk.launch(sky.Task.from_yaml_config(task), cluster_name=cluster)
                sdk.stream_and_get(mine.request, output_stream=_Lines(tell))
            _write_alias(cluster)
    except BaseException as error:
        _take_down(cluster, error)
        raise


def keep(tell: Tell, cluster: str) -> None:
    """What was launched is in use: it outlives whoever asked."""
    _launching.pop(cluster, None)


def down(tell: Tell, cluster: str) -> None:
    """Give up its launch if one goes on, and have no such cluster any more."""
    from sky import exceptions
    from sky.client import sdk

    its = _launching.get(cluster, _Launch())
    with its.lock:
        its.given_up = True
    with _errors():
        if its.request is not None:
            sdk.get(sdk.api_cancel(its.request, silent=True))
        with contextlib.suppress(exceptions.ClusterDoesNotExist):
            sdk.get(sdk.down(cluster))
    _launching.pop(cluster, None)


def _take_down(cluster: str, why: BaseException) -> None:
    try:
        down(print, cluster)
    except Exception as error:
        raise Refusal(
            "ProviderError",
            f"{_text(why)} The cluster {cluster} could not be taken down either: {_text(error)}",
            f"It may cost money. Take it down by: {_sky()} down {cluster}",
        ) from why


def status(tell: Tell, cluster: str) -> str:
    """The cloud's own word for how it is; empty if it is gone."""
    with _errors():
        return _state(cluster)


def _state(cluster: str) -> str:
    import sky
    from sky.client import sdk

    found = sdk.get(sdk.status([cluster], refresh=sky.StatusRefreshMode.FORCE))
    return str(found[0]["status"].value) if found else ""


def clusters(tell: Tell, prefix: str) -> list[str]:
    """The names of all clusters that begin so."""
    from sky.client import sdk

    with _errors():
        return [one["name"] for one in sdk.get(sdk.status()) if one["name"].startswith(prefix)]


def _write_alias(cluster: str) -> None:
    """Have SkyPilot write the name for ``ssh``, which only its command does."""
    from sky.client.cli import command

    command.cli.main(["status", cluster], prog_name="sky", standalone_mode=False)


class _Lines(io.TextIOBase):
    """What SkyPilot says while it works, by whole lines and without its decoration."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._rest = ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            line = _ESCAPES.sub("", line).strip(" \t\r└─├│⚙︎✓")
            if not _CHATTER.match(line):
                self._tell(line)
        return len(text)


# -- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """SkyPilot's errors as refusals that say what to do."""
    from sky import exceptions

    try:
        yield
    except Refusal:
        raise
    except exceptions.NoCloudAccessError as error:
        raise Refusal(
            "ProviderError",
            "SkyPilot has no cloud that it may use.",
            f"Set one up, then run: {_sky()} check",
        ) from error
    except exceptions.ResourcesUnavailableError as error:
        said = [_text(one) for one in getattr(error, "failover_history", None) or [error]]
        raise Refusal("NoCapacity", " ".join(dict.fromkeys(said))[:_LONGEST_MESSAGE]) from error
    except exceptions.ClusterOwnerIdentityMismatchError as error:
        raise Refusal("ProviderError", _text(error), "Log in as who has started it.") from error
    except Exception as error:
        said_so = _text(error)
        if _OFFLINE.search(str(error)):
            raise Refusal(
                "ProviderError",
                "SkyPilot could not fetch its list of machines and prices.",
                "It comes from the internet at the first use: check the connection.",
            ) from error
        kind = "LinkError" if isinstance(error, exceptions.ApiServerConnectionError) else ""
        raise Refusal(kind or "ProviderError", f"SkyPilot failed: {said_so}") from error


def _text(error: BaseException) -> str:
    """The first sentences of a message, without colours."""
    text = _ESCAPES.sub("", str(error)) or type(error).__name__
    text = re.split(r"\n\s*\n|\nTo fix:|\nHint:", text.strip())[0]
    return re.sub(r"\s+", " ", text)[:_LONGEST_MESSAGE]


def _sky() -> str:
    return os.path.join(os.path.dirname(sys.executable), "sky")


# -- the conversation ----------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (offers, clouds, launch, keep, down, status, clusters)
}


class Conversation:
    """Requests from one file descriptor, answers to another."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing
        self._lock = threading.Lock()
        self._busy = 0

    def go_on(self) -> None:
        """Until the requests end, or none has come for some time."""
        rest = b""
        while True:
            ready, _, _ = select.select([self._reading], [], [], _IDLE)
            if not ready:
                if self._busy or _launching:
                    continue
                return
            data = os.read(self._reading, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                with self._lock:
                    self._busy += 1
                threading.Thread(target=self._work, args=(request,), daemon=True).start()
        patience = threading.Timer(_ROLL_BACK, os._exit, (1,))
        patience.daemon = True
        patience.start()
        for cluster in list(_launching):
            with contextlib.suppress(Exception):
                down(print, cluster)

    def _work(self, request: dict[str, Any]) -> None:
        number = request.pop("id")
        try:
            operation = OPERATIONS[request.pop("op")]
            answer = {"result": operation(lambda text: self._say(number, tell=text), **request)}
        except Refusal as refusal:
            answer = {"kind": refusal.kind, "error": str(refusal), "hint": refusal.hint}
        except BaseException as error:
            said = f"SkyPilot failed: {type(error).__name__}: {_text(error)}"
            answer = {"kind": "ProviderError", "error": said, "hint": ""}
        with self._lock:
            self._busy -= 1
        self._say(number, **answer)

    def _say(self, number: int, **what: Any) -> None:
        line = json.dumps({"id": number, **what}).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):  # nobody listens any more
            while line:
                line = line[os.write(self._writing, line) :]


def main() -> None:
    """Talk; what SkyPilot prints and starts gets neither end of the conversation."""
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    Conversation(reading, writing).go_on()
    os._exit(0)  # threads that still wait for SkyPilot have nobody to answer


if __name__ == "__main__":
    main()
