"""Small things that several packages share, and that know none of them.

`arguments.py`  command lines whose errors name the key, its neighbour and what to type next
`errors.py`   `RunStopped`, which ends a run on purpose
`files.py`    whole files replaced at once, JSON lines appended
`imports.py`  torchmetrics without large packages
`loop.py`     event loops in background threads
`redact.py`   texts and settings without secrets
`run_folder.py`  a folder of one run, held by one process
`seeding.py`  random numbers of one place in a run
`settings_tree.py`  which settings a config may hold, and which of them are as by default
"""
