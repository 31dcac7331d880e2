"""How far loops are: counted by :func:`track`, read off progress bars, or told by libraries.

A bar of tqdm keeps its own count, which is read once a second from outside of the loop; so the rate
of a training is known without a change of its code, and at no cost to it. Keras, Hugging Face's
Trainer and Lightning without such a bar, fastai, XGBoost and LightGBM are counted where they call
their callbacks (``libraries.py``). What has neither is counted by :func:`track`.
"""

from .imports import watch
from .loops import Meter, Meters, meters, outermost, track

__all__ = ["Meter", "Meters", "meters", "outermost", "track", "watch"]
