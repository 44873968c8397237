"""What runs have learned, for people: one HTML file, a README in the run folder, a model card.

`run.py`        a run as its folder describes it: settings, metrics, results with intervals, costs
`rollouts.py`   the captions that it has logged; `calls.py` the calls to its judge
`thumbnails.py` its images, small
`gallery.py`    images with their captions and verdicts, chosen for a reader
`breakdown.py`  where reward was gained and lost, contradicting verdicts; `kinds.py` what assertions are about
`curves.py`     metrics over training as charts; `figures.py` all other charts, and what they share
`readme.py`     the README of a run folder; `model_card.py` that of its export; `markdown.py` what they share
`page.py`       all of it as one HTML file; `html.py` makes pages of `templates/`; `text.py` makes texts harmless
`study.py`      means, differences and claims over runs x seeds; `study_page.py` writes them
`readme.py`     the README of a run folder; `model_card.py` that of an export; `markdown.py` what they share
"""
