"""New reference captions for a data set, from any model that litellm reaches: the paper's data step.

``python main.py recaption --config configs/recaption.yaml`` (arXiv 2605.07394 has GPT-5-mini re-write the
references of ShareGPT4V). What is written is a ShareGPT4V file whose rows also hold the assertions of their
caption, so that training asks nobody about references.

``cli.py``       the command line: one check of all settings, then the run
``settings.py``  `Recaptioner`: what a YAML sets
``plan.py``      which rows take part, and what their answers depend on
``run.py``       the run: rows in, captions and what they assert out
``journal.py``   what has been answered, on disk line by line: where a run that was killed goes on
``output.py``    the journal and the rows of the data set -> the ShareGPT4V file, and the quarantine file
``checks.py``    what is wrong with the settings, before anything is read or paid
``progress.py``  the bar: rows, pace, dollars
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balcap.recaption.settings import Recaptioner

__all__ = ["Recaptioner"]


def __getattr__(name: str) -> Any:
    if name == "Recaptioner":  # who only reads a journal needs no judge
        from balcap.recaption.settings import Recaptioner

        return Recaptioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
