"""What a run has learned, for people: one HTML file, a README in the run folder, a model card.

`run.py`        a run as its folder describes it: settings, metrics, results with intervals, costs
`rollouts.py`   the captions that it has logged; `calls.py` the calls to its judge
`thumbnails.py` its images, small
"""
