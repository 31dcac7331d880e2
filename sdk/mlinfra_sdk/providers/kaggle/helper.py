"""Calls Kaggle's own client, in the environment that this client has to itself.

Run by the Python of that environment, with one request as JSON on stdin; see ``tools.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOG_IN = "Make a new API token at https://www.kaggle.com/settings; docs/providers/kaggle.md."
_PROCESSED = 1800.0
"""Seconds within which an upload must have become a dataset."""


def main() -> None:
    """Answer the one request, with a line for each piece if it is for the log."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the client prints is no answer
    request = json.loads(sys.stdin.readline())

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        if request["address"]:
            _call_at(request["address"])
        if request["call"] == "log":
            for text in _log(request["user"], request["title"]):
                say({"result": text})
        elif request["call"] == "upload":
            say({"result": _upload(request["title"], Path(request["folder"]))})
        elif request["call"] == "drop":
            _drop(request["title"])
            say({"result": None})
        else:
            say({"result": _call(request)})
    except Exception as error:
        say(_explained(error))


def _call_at(address: str) -> None:
    """Have the client take another service for Kaggle's."""
    from kagglesdk import kaggle_env

    kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = f"{address}/api"


def _call(request: dict[str, Any]) -> Any:
    from kagglesdk.kaggle_client import KaggleClient
    from kagglesdk.kaggle_env import KaggleEnv
    from kagglesdk.kernels.types import kernels_api_service as types

    name, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
    with KaggleClient(env=KaggleEnv.PROD, username=name, password=key) as kaggle:
        kernels = kaggle.kernels.kernels_api_client
        if request["call"] == "quota":
            found = kernels.get_accelerator_quota_statistics(
                types.ApiGetAcceleratorQuotaStatisticsRequest()
            )
            quota = found.gpu_quota
            return {
                "used": quota.time_used.total_seconds(),
                "total": quota.total_time_allowed.total_seconds(),
                "renewed": found.quota_refresh_time.isoformat() if found.quota_refresh_time else "",
            }
        if request["call"] == "push":
            user = _user(kaggle)
            save = types.ApiSaveKernelRequest()
            save.slug = f"{user}/{request['title']}"
            save.new_title = request["title"]
            save.text = request["text"]
            save.language, save.kernel_type = "python", "script"
            save.is_private = True
            save.enable_internet = request["internet"]
            save.dataset_data_sources = request["datasets"]
            save.session_timeout_seconds = request["seconds"]
            if request["shape"]:
                save.machine_shape = request["shape"]
            saved = kernels.save_kernel(save)
            if saved.error or saved.invalid_dataset_sources:
                bad = ", ".join(saved.invalid_dataset_sources or [])
                raise ValueError(saved.error or f"unknown datasets: {bad}")
            return user
        where = {"user_name": request["user"], "kernel_slug": request["title"]}
        if request["call"] == "status":
            asked = _filled(types.ApiGetKernelSessionStatusRequest(), where)
            status = kernels.get_kernel_session_status(asked)
            return {"status": status.status.name, "failure": status.failure_message or ""}
        if request["call"] == "fetch":
            return _fetch(kernels, types, where, request["file"], Path(request["folder"]))
        if request["call"] == "delete":
            kernels.delete_kernel(_filled(types.ApiDeleteKernelRequest(), where))
            return None
    raise ValueError(request["call"])


def _filled(message: Any, values: dict[str, Any]) -> Any:
    for name, value in values.items():
        setattr(message, name, value)
    return message


def _user(kaggle: Any) -> str:
    """The account's name, which is part of a kernel's address."""
    from kagglesdk.kaggle_env import get_access_token_from_env
    from kagglesdk.security.types.oauth_service import IntrospectTokenRequest

    token, _ = get_access_token_from_env()
    if token:
        found = kaggle.security.oauth_client.introspect_token(
            _filled(IntrospectTokenRequest(), {"token": token})
        )
        return str(found.username)
    if name := os.environ.get("KAGGLE_USERNAME"):
        return name
    return str(json.loads((Path.home() / ".kaggle" / "kaggle.json").read_text())["username"])


def _fetch(kernels: Any, types: Any, where: dict[str, str], name: str, folder: Path) -> Any:
    """Download the output file of this name; the log's end where there is none."""
    import requests

    token, log = None, ""
    while True:
        asked = _filled(types.ApiListKernelSessionOutputRequest(), {**where, "page_token": token})
        found = kernels.list_kernel_session_output(asked)
        log = log or found.log or ""
        for file in found.files or []:
            if file.file_name == name:
                with requests.get(file.url, stream=True, timeout=60) as answer:
                    answer.raise_for_status()
                    with open(folder / name, "wb") as out:
                        for piece in answer.iter_content(1 << 20):
                            out.write(piece)
                return {"found": True, "log": ""}
        token = found.next_page_token
        if not token:
            return {"found": False, "log": _words(log)[-2000:]}


def _words(log: str) -> str:
    """What a log says that is over: it is kept as a list of pieces."""
    try:
        return "".join(piece["data"] for piece in json.loads(log))
    except (ValueError, TypeError, KeyError):
        return log


def _upload(title: str, folder: Path) -> str:
    """Make a private dataset, and wait until it is ready; gives its address."""
    import kaggle  # logs in
    import requests

    address = f"{kaggle.api.get_config_value('username')}/{title}"
    about = {"id": address, "title": title, "licenses": [{"name": "other"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(about))
    made = kaggle.api.dataset_create_new(str(folder), quiet=True)
    if made.error:
        raise ValueError(made.error)
    end = time.monotonic() + _PROCESSED
    while time.monotonic() < end:
        try:
            status = kaggle.api.dataset_status(address)
        except requests.HTTPError as error:  # not there yet
            status = str(error)
        if status == "ready":
            return address
        if status in ("failed", "deleted"):
            break
        time.sleep(1)
    raise ValueError(f"the variables did not become a dataset ({status})")


def _drop(title: str) -> None:
    """Remove a dataset. It may be being made by a call whose sender has gone."""
    import kaggle  # logs in
    import requests

    user = kaggle.api.get_config_value("username")
    try:
        kaggle.api.dataset_delete(user, title, no_confirm=True)
    except requests.HTTPError:
        time.sleep(2)
        kaggle.api.dataset_delete(user, title, no_confirm=True)


def _log(user: str, title: str) -> Iterator[str]:
    """What a script prints, piece by piece, until its end."""
    import kaggle  # logs in

    for event in kaggle.api.kernels_logs_stream(f"{user}/{title}"):
        if event.get("stream_name", "stdout") == "stdout":
            yield str(event.get("data", ""))


def _explained(error: Exception) -> dict[str, str]:
    """The error of ours that says what one of the client's means."""
    text = str(error).strip().rstrip(".") or type(error).__name__
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return _error("ProviderError", f"Kaggle does not let you in (HTTP {status}).", _LOG_IN)
    if status is not None and status < 500:
        return _error("ProviderError", f"Kaggle refused (HTTP {status}): {text}.", "Try again.")
    if status is not None or "RequestException" in names:
        return _error(
            "LinkError", f"Kaggle cannot be reached: {text}.", "Check the network, then try again."
        )
    return _error("ProviderError", f"Kaggle refused: {text}."[:500], "See https://www.kaggle.com.")


def _error(kind: str, error: str, hint: str) -> dict[str, str]:
    return {"kind": kind, "error": error, "hint": hint}


if __name__ == "__main__":
    main()
