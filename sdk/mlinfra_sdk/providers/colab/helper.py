"""Calls Google's own client for Colab, in the environment that this client has to itself.

Run by the Python of that environment, with one request as JSON on stdin; see ``tools.py``. The
client promises no interface to programs: whatever it does not have any more, or answers otherwise
than it did, is told as such.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from typing import Any

_GONE_WITHIN = 60.0
_LOOK_EVERY = 1.0
_LOG_IN = "Log in again; docs/providers/colab.md says how."
_CHANGED = "on=colab was made for google-colab-cli {version}: look for a newer mlinfra-sdk."


def main() -> None:
    """Answer the one request."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the client prints is no answer
    request = json.loads(sys.stdin.readline())  # it ends here, so that no login can wait for it
    try:
        answer = {"result": _call(request)}
    except BaseException as error:
        answer = _explained(error, request)
    out.write(json.dumps(answer))
    out.flush()


def _call(request: dict[str, Any]) -> Any:
    from colab_cli import auth, client

    session = auth.get_credentials(provider=auth.AuthProvider(request["auth"]))
    domain = request["domain"]
    colab = client.Client(client.Prod(domain=domain) if domain else client.Prod(), session)
    match request["call"]:
        case "assign":
            accelerator = client.Accelerator(request["accelerator"])
            given = colab.assign(
                uuid.UUID(request["notebook"]),
                variant=client.Variant(request["variant"]),
                accelerator=accelerator,
                shape=client.resolve_assign_shape(accelerator, high_mem=request["high_memory"]),
            )
            found = [it for it in _list(colab) if it["endpoint"] == given.endpoint]
            return {"runtimes": found, "usage": _usage(colab)}
        case "find":
            found = colab._get_assignment(uuid.UUID(request["notebook"]))  # changes nothing there
            return found.endpoint if isinstance(found, client.Assignment) else ""
        case "list":
            return _list(colab)
        case "unassign":
            return _unassign(colab, request["endpoint"])
        case "usage":
            return _usage(colab)
    raise ValueError(request["call"])


def _list(colab: Any) -> list[dict[str, Any]]:
    """What the account has now, with what opens the way to it."""
    return [
        {
            "endpoint": it.endpoint,
            "accelerator": it.accelerator.value,
            "url": it.runtime_proxy_info.url,
            "token": it.runtime_proxy_info.token,
            "expires": it.runtime_proxy_info.token_expires_in_seconds,
        }
        for it in colab.list_assignments()
    ]


def _usage(colab: Any) -> dict[str, Any]:
    info = colab.get_consumption_user_info()
    return {
        "balance": info.paid_compute_units_balance,
        "rate": info.consumption_rate_hourly,
        "assignments": info.assignments_count,
    }


def _unassign(colab: Any, endpoint: str) -> bool:
    """Give a runtime back; whether Colab lists it no longer, after a while."""
    try:
        colab.unassign(endpoint)
    except Exception:
        if any(it["endpoint"] == endpoint for it in _list(colab)):
            raise
        return True  # it was gone already
    end = time.monotonic() + _GONE_WITHIN
    while any(it["endpoint"] == endpoint for it in _list(colab)):
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def _explained(error: BaseException, request: dict[str, Any]) -> dict[str, str]:
    """The error of ours that says what one of the client's means."""
    text = str(error).strip().rstrip(".") or type(error).__name__
    names = {kind.__name__ for kind in type(error).__mro__}
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if names & {"EOFError", "SystemExit", "RefreshError", "DefaultCredentialsError"}:
        return _error("ProviderError", "There is no valid login for Colab.", _LOG_IN)
    if status in (401, 403):
        return _error("ProviderError", f"Colab does not let you in (HTTP {status}).", _LOG_IN)
    if "TooManyAssignmentsError" in names:
        return _error(
            "NoCapacity",
            "Colab refuses another machine: you have too many sessions, or it has reached a limit "
            "for this kind.",
            "End a session, wait, or take another GPU (gpu=L4|T4).",
        )
    if status == 400 and request["call"] == "assign":
        return _error(
            "NoCapacity",
            f"Colab does not give you {request['accelerator']}: your plan or your compute units "
            "do not cover it.",
            "Take another GPU (gpu=T4), or see https://colab.research.google.com/signup.",
        )
    if status is not None and status < 500:
        return _error("ProviderError", f"Colab refused (HTTP {status}): {text}.", "Try again.")
    if status is not None or names & {"RequestException", "TransportError", "OSError"}:
        return _error(
            "LinkError", f"Colab cannot be reached: {text}.", "Check the network, then try again."
        )
    hint = _CHANGED.format(version=request["version"])
    what = f"Google's client for Colab is not as expected: {type(error).__name__}: {text}."
    return _error("ProviderError", what[:500], hint)


def _error(kind: str, error: str, hint: str) -> dict[str, str]:
    return {"kind": kind, "error": error, "hint": hint}


if __name__ == "__main__":
    main()
