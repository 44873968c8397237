"""The kinds of judgment, one file each: schema -> prompt -> parser.

=============  ==================  ======================================  =========
task           is given            answers                                 image
=============  ==================  ======================================  =========
`Decompose`    a caption           its atomic assertions                   no
`Verify`       image, assertions   true and pointable for each             yes
`Match`        units, assertions   covered or not for each reference unit  no
`Rate`         a caption           clarity, fluency, coherency             no
=============  ==================  ======================================  =========
"""

from balcap.judge.tasks.base import Schema, Task
from balcap.judge.tasks.decompose import Decompose
from balcap.judge.tasks.match import Match
from balcap.judge.tasks.rate import Rate, Rating
from balcap.judge.tasks.verify import Verdict, Verify

__all__ = ["Decompose", "Match", "Rate", "Rating", "Schema", "Task", "Verdict", "Verify"]
