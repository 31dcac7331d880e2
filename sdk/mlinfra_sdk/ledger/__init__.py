"""The ledger: what ran where, for how long and at what cost; every figure shown comes from it."""

from .attribution import Cost
from .ledger import Ledger, Machine, Price, Run

__all__ = ["Cost", "Ledger", "Machine", "Price", "Run"]
