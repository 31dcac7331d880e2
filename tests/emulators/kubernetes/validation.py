"""What an API server refuses before it stores a pod (``fieldValidation=Strict``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_POD = {"apiVersion", "kind", "metadata", "spec"}
_SPEC = {
    "activeDeadlineSeconds",
    "automountServiceAccountToken",
    "containers",
    "enableServiceLinks",
    "imagePullSecrets",
    "nodeSelector",
    "restartPolicy",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "volumes",
}
_CONTAINER = {
    "command",
    "env",
    "image",
    "name",
    "resources",
    "terminationMessagePath",
    "volumeMounts",
}


class Invalid(Exception):
    """The pod is refused; the text is the server's."""


def check_pod(pod: Mapping[str, Any]) -> None:
    """Raises :class:`Invalid`."""
    _known(pod, _POD, "")
    if (pod.get("apiVersion"), pod.get("kind")) != ("v1", "Pod"):
        raise Invalid("the object provided is unrecognized")
    metadata, spec = pod.get("metadata", {}), pod.get("spec", {})
    _known(metadata, {"annotations", "labels", "name"}, "metadata.")
    if not _NAME.fullmatch(metadata.get("name", "")):
        raise Invalid(f"metadata.name: Invalid value: {metadata.get('name')!r}")
    _labels(metadata.get("labels", {}), "metadata.labels")
    _known(spec, _SPEC, "spec.")
    if spec.get("restartPolicy") not in ("Always", "OnFailure", "Never"):
        raise Invalid("spec.restartPolicy: Unsupported value")
    deadline = spec.get("activeDeadlineSeconds", 1)
    if type(deadline) is not int or not 1 <= deadline < 2**31:
        raise Invalid(f"spec.activeDeadlineSeconds: Invalid value: {deadline!r}")
    _labels(spec.get("nodeSelector", {}), "spec.nodeSelector")
    for toleration in spec.get("tolerations", []):
        _known(toleration, {"effect", "key", "operator", "value"}, "spec.tolerations[].")
        operator = toleration.get("operator", "Equal")
        if operator not in ("Equal", "Exists") or (operator == "Exists" and "value" in toleration):
            raise Invalid("spec.tolerations[0].operator: Invalid value")
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    if not spec.get("containers"):
        raise Invalid("spec.containers: Required value")
    for container in spec["containers"]:
        _container(container, volumes)


def _container(container: Mapping[str, Any], volumes: set[str]) -> None:
    _known(container, _CONTAINER, "spec.containers[].")
    if not container.get("image") or container["image"] != container["image"].strip():
        raise Invalid("spec.containers[0].image: Required value")
    for entry in container.get("env", []):
        _known(entry, {"name", "value"}, "spec.containers[].env[].")
        if not isinstance(entry["value"], str):
            raise Invalid("spec.containers[0].env[0].value: Invalid type")
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            raise Invalid(f"spec.containers[0].volumeMounts[0].name: Not found: {mount['name']!r}")
    resources = container.get("resources", {})
    _known(resources, {"limits", "requests"}, "spec.containers[].resources.")
    for kind in ("limits", "requests"):
        for name, amount in resources.get(kind, {}).items():
            where = f"spec.containers[0].resources.{kind}[{name}]"
            if not _QUANTITY.fullmatch(str(amount)):
                raise Invalid(f"{where}: quantities must match the regular expression")
            if "/" in name and not str(amount).isdigit():
                raise Invalid(f"{where}: Invalid value: must be an integer")
            if "/" in name and name not in resources.get("limits", {}):
                raise Invalid(f"{where}: Limit must be set for non overcommitable resources")


def _labels(labels: Mapping[str, str], where: str) -> None:
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise Invalid(f"{where}: Invalid value: {key!r}")
        if not isinstance(value, str) or not _LABEL.fullmatch(value):
            raise Invalid(f"{where}: Invalid value: {value!r}")


def _known(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise Invalid(f'strict decoding error: unknown field "{where}{name}"')
