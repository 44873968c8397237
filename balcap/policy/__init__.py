"""The captioner that is trained, and the reference it is held against.

- ``config.py`` what a YAML says of it, and what contradicts itself there
- ``loading.py`` weights, adapters, freezing
- ``identity.py`` which captioner it is, for files of captions
- ``families/`` what each model family does in its own way, one file per family
- ``prompts.py`` the one place that builds prompts
- ``offsets.py`` where the tokens of a caption stand in its text
- ``policy.py`` `Policy`: log-probs of captions under the policy and its reference
- ``logps.py`` those of one padded sequence per caption: any model, and what the shared prefix is tested against
- ``shared_prefix.py`` those of one packed sequence for all captions of some images; ``layout.py`` where
  everything stands in it, ``attention.py`` what sees what
- ``windows.py`` attention of a vision tower, windows of one size in one call
- ``feature_cache.py`` what a frozen vision tower makes of each image, on disk
- ``head.py`` log-probs from hidden states, in chunks
- ``flops.py`` model FLOPs, peaks of devices, memory
- ``memory.py`` memory of an update, by arithmetic; ``checkpointing.py`` what is recomputed so that it fits
"""

from balcap.policy.config import LoraSettings, PolicyConfig

__all__ = ["LoraSettings", "PolicyConfig"]
