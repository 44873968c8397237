"""One training step, in the order in which it happens.

`pipeline.py`     sampling, judging, and batches in flight between them and the update
`spans.py`        the tokens that assertions come from, for advantages per token
`update.py`       rollouts and advantages -> optimizer steps
`metrics.py`      what a step reports; `tally.py`: sums over micro-batches and ranks; `timeline.py`: what ran when
`loggers.py`      ``metrics.csv``, and the count that metrics are logged under
`checkpoint.py`   what of the policy a checkpoint holds
`distributed.py`  what ranks tell each other
"""
