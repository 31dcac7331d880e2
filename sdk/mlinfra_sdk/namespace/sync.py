"""The two sides of the variables: :class:`LocalNamespace` here, :class:`WorkerNamespace` there."""

from mlinfra_sdk.namespace.delta import Inputs, Outputs
from mlinfra_sdk.namespace.held import WorkerNamespace
from mlinfra_sdk.namespace.local import EAGER_LIMIT, LocalNamespace, Report
from mlinfra_sdk.namespace.remote_value import RemoteValue

__all__ = [
    "EAGER_LIMIT",
    "Inputs",
    "LocalNamespace",
    "Outputs",
    "RemoteValue",
    "Report",
    "WorkerNamespace",
]
