"""Engines that sample captions.

``base.py`` the contract; ``hf.py`` the one that needs nothing else; ``packing.py`` what sampled tokens become.
"""

from balcap.rollout.base import EngineFailed, Finished, RolloutEngine, Sampling

__all__ = ["EngineFailed", "Finished", "RolloutEngine", "Sampling"]
