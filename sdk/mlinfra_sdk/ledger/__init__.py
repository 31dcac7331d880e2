"""The ledger: what ran where, for how long and at what cost; every figure shown comes from it."""

from .attribution import Cost
from .ledger import Costs, Ledger
from .records import Charge, Machine, Measurement, Price, Run, Transfer

__all__ = [
    "Charge",
    "Cost",
    "Costs",
    "Ledger",
    "Machine",
    "Measurement",
    "Price",
    "Run",
    "Transfer",
]
