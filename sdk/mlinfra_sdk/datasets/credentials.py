"""What a machine needs to read a URL: settings always, this user's credentials if asked for."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlinfra_sdk.errors import RequestError


def options_for(url: str, credentials: bool) -> dict[str, Any]:
    """Options of the file system. Without ``credentials`` they hold no secrets."""
    make = {"s3": _s3, "gs": _google, "gcs": _google, "hf": _hugging_face}.get(urlsplit(url).scheme)
    return make(credentials) if make else {}


def _s3(credentials: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["endpoint_url"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["client_kwargs"] = {"region_name": region}
    if credentials:
        key, secret, token = _aws_keys()
        options.update(key=key, secret=secret)
        if token:
            options["token"] = token
    return options


def _aws_keys() -> tuple[str, str, str]:
    """From wherever the AWS tools find them: the environment, profiles, single sign-on."""
    try:
        session = importlib.import_module("botocore.session").get_session()
        found = session.get_credentials()
        if found is not None:
            frozen = found.get_frozen_credentials()
            return frozen.access_key, frozen.secret_key, frozen.token or ""
    except ImportError:
        key = os.environ.get("AWS_ACCESS_KEY_ID", "")
        secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "")
        if key and secret:
            return key, secret, os.environ.get("AWS_SESSION_TOKEN", "")
    raise _none(
        "AWS", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (with botocore)."
    )


def _google(credentials: bool) -> dict[str, Any]:
    if not credentials:
        return {}
    path = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    default = Path.home() / ".config/gcloud/application_default_credentials.json"
    file = Path(path) if path else default
    if not file.is_file():
        raise _none("Google", "Run `gcloud auth application-default login`.")
    return {"token": json.loads(file.read_text())}


def _hugging_face(credentials: bool) -> dict[str, Any]:
    if not credentials:
        return {}
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    token = os.environ.get("HF_TOKEN", "")
    if not token and (home / "token").is_file():
        token = (home / "token").read_text().strip()
    if not token:
        raise _none("Hugging Face", "Run `hf auth login` or set HF_TOKEN.")
    return {"token": token}


def _none(whose: str, hint: str) -> RequestError:
    return RequestError(
        f"data_credentials=yes, but there are no credentials of {whose} here.", hint=hint
    )
