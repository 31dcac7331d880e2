"""The same work on several targets: how fast, at what cost, and whether the results agree."""

from .result import Comparison as Comparison
from .result import Figure as Figure
from .result import TargetResult as TargetResult
from .result import Trial as Trial
from .runner import Plan as Plan
from .runner import compare as compare
from .runner import run as run

__all__ = ["Comparison", "Figure", "Plan", "TargetResult", "Trial", "compare", "run"]
