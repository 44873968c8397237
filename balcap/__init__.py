"""BalCapRL: reinforcement learning for image captions with balanced rewards (arXiv 2605.07394).

The packages, in the order in which a training step goes through them::

    data/ -> rollout/ -> judge/ + rewards/ -> algorithms/ -> policy/

`module.py` is the step itself, `trainer/` what it is made of, `types.py` what travels between the packages and the one
legend of shapes. `cli.py` and `commands/` are what is typed; `config.py` checks it; `utils/` is used by all.
"""

__version__ = "0.1.0"
