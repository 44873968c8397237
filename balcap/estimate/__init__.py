"""What a run's judging will cost, before anything is paid: ``python main.py estimate --config …``.

`command.py`      the command: sample rows, play, multiply, print
`plan.py`         how many images a run judges, and when
`forecast.py`     from sampled rows to the whole run
`rehearsal.py`    the real judge with an understudy in the provider's place, which asks nobody
`language.py`     captions that nobody has written yet, and the size of a judge's answers
`calibrate.py`    measured figures in the place of assumptions
`image_tokens.py`, `tokens.py`, `usage.py`, `report.py`: the small parts
"""
