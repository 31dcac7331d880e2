"""What a cell will take and cost on a machine, before anything is spent: by what it has taken,
there or elsewhere, with an interval that says how little is known.

``past.py`` reads the ledger into runs at places (``places.py``), ``hardware.py`` guesses from
figures of processors and GPUs, ``calibration.py`` measures this computer for that, and ``model.py``
puts it all together.
"""

from .calibration import calibrate
from .hardware import Used
from .model import Prediction, predict
from .past import estimate
from .places import Past, Place

__all__ = ["Past", "Place", "Prediction", "Used", "calibrate", "estimate", "predict"]
