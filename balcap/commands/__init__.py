"""The commands beside Lightning's own, each run by ``python main.py <command>``.

`estimate.py`    what a run's judge will cost: a subcommand of the trainer, with the flags of ``fit``;
                 `estimate_assumptions.py` (its flags), `estimate_plan.py` (the images that are judged),
                 `estimate_dry_run.py` (judging that asks nobody), `estimate_tokens.py` (tokens of images, texts,
                 reasoning), `estimate_run.py` (all of it together)
`check.py`       whether model and engine do what training relies on: a subcommand of the trainer, too;
                 `check_policy.py`, `check_engine.py` (the checks), `check_state.py` (what they share)
`plan.py`        whether a run has enough memory on its GPUs: a subcommand of the trainer, too; `plan_setup.py` (what decides
                 about it, from the config), `plan_fit.py` (the stages, and what to change)
`init.py`        a config by five questions; `init_config.py` has the hardware and writes it
`recaption.py`   new references for a data set; `recaption_settings.py`, `recaption_run.py` (the run),
                 `recaption_files.py` (what it writes)
`export.py`      an adapter and its base as one model
`push.py`        an export on Hugging Face's hub
`benchmark.py`   benchmarks of captioners (`test`)
`general.py`     ten general vision benchmarks, by lmms-eval in an environment of its own
`serve.py`       a vLLM server that samples for a run
`study.py`       runs x seeds of one question; `study_settings.py` (its YAML), `study_runs.py` (its runs),
                 `study_work.py` (their processes)
`listing.py`     all commands, for who typed none or a wrong one
`ledger.py`      what a cache and a ledger of judgments hold (`ledger`, `cache`)
"""
