"""The captioner that is trained, and the reference it is held against.

``config.py`` what a YAML says of it; ``loading.py`` weights, adapters, freezing; ``prompts.py`` the one
place that builds prompts; ``logps.py`` log-probabilities of captions; ``policy.py`` the three together.
"""

from balcap.policy.config import LoraSettings, PolicyConfig

__all__ = ["LoraSettings", "PolicyConfig"]
