"""A Kubernetes API server with its scheduler and kubelets, for the real ``kubectl``.

Containers are processes of this computer, which see its files: images and volumes are only names.
What a real API server would refuse is refused, and pods end as they would.
"""

from emulators.kubernetes.cluster import Node
from emulators.kubernetes.pods import Pod
from emulators.kubernetes.server import Emulator, emulator

__all__ = ["Emulator", "Node", "Pod", "emulator"]
