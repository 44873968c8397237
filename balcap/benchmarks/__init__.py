"""Is the captioner better? Benchmarks, run while it trains (`callbacks.BenchmarkEval`) and after (``main.py test``).

`dcscore.py`     DCScore of DeCapBench: truth and completeness, fact by fact
`captionqa.py`   CaptionQA: questions answered from the caption alone
`caparena.py`    CapArena-Auto: battles against three captioners
`prism.py`       any multiple-choice VQA set, answered from the caption alone
`b_capscore.py`  precision, recall and language in one figure
`base.py`        `Benchmark`, their base: images, questions to the judge, scores
`scores.py`      scores with 95 % intervals, and paired differences
`text.py`        repetition, variety and commentary, without a judge: at every validation
`agreement.py`   whether a metric agrees with people
`official.py`    the authors' own prompts, read from a clone of their repository
`runner.py`      one captioner on one benchmark: captions, judgments, scores; resumable

Each file begins with pure functions that count as the authors' code does (``official: true``), checked against their
results.
"""

from balcap.benchmarks.b_capscore import BCapScore
from balcap.benchmarks.base import Benchmark
from balcap.benchmarks.caparena import CapArena
from balcap.benchmarks.captionqa import CaptionQA
from balcap.benchmarks.dcscore import DCScore
from balcap.benchmarks.prism import Prism

__all__ = ["BCapScore", "Benchmark", "CapArena", "CaptionQA", "DCScore", "Prism"]
