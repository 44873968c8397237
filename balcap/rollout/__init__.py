"""Engines that sample captions. ``base.py`` the contract, ``hf.py`` the one that needs nothing else."""

from balcap.rollout.base import RolloutEngine, Sampling

__all__ = ["RolloutEngine", "Sampling"]
