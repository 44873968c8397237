"""BalCapRL: reinforcement learning for image captions with balanced rewards (arXiv 2605.07394).

The rooms, in the order in which a training step walks through them::

    data/ -> rollout/ -> judge/ + rewards/ -> objective/ -> policy/

`batch.py` holds what travels between them and is the one legend of shapes. `module.py` is the step itself.
"""

__version__ = "0.1.0"
