"""The kinds of judgment, one file each: schema -> prompt -> parser.

================ ========================== ======================================= =========
task             is given                   answers                                 image
================ ========================== ======================================= =========
`Decompose`      captions                   the atomic assertions of each           no
`DecomposeSpans` captions                   their assertions, and the words of each no
`Verify`         an image, assertions       true and pointable for each             yes
`Match`          reference units, captions  for each, which units it covers         no
`MatchSpans`     reference units, captions  the same, and the assertions that do    no
`PooledMatch`    all of a group             what others have told that it covers    no
`Rate`           captions                   clarity, fluency, coherency of each     no
`Recaption`      an image, a question       a new reference caption                 yes
`Answer`         a caption, questions       the chosen option of each (CapRL)       no
`Compare`        an image, two captions     which is better                         yes
`ExtractFacts`   captions                   DCScore: their facts                    no
`MatchFacts`     facts, annotated facts     DCScore: what each matches              no
`VerifyFacts`    an image, facts            DCScore: whether each holds             yes
`Grade`          image, reference, captions correctness, completeness, text (VCap)  yes
`Differences`    image, reference, captions who errs where they differ (ClaimDiff)  yes
`CheckRubric`    criteria, captions         for each, which criteria it meets       no
`WriteQuestions` an image, its reference    questions for `Answer`                  yes
`Quiz`           questions, an image or ()  the chosen option of each               yes, no
`WriteRubric`    an image, its reference    criteria for `CheckRubric`              yes
================ ========================== ======================================= =========

To add one, write a file with a subclass of `Task` and name it in the `needs` of a reward. There is nothing to
register. ``encode`` writes the JSON that ``parse`` reads, and ``example`` gives plausible answers: dry runs, judges
that run in this process, and tests answer with them.
"""

from balcap.judge.tasks.answer import Answer
from balcap.judge.tasks.compare import Compare
from balcap.judge.tasks.decompose import Assertion, Decompose, DecomposeSpans
from balcap.judge.tasks.differences import Difference, Differences
from balcap.judge.tasks.facts import ExtractFacts, Fact, MatchFacts, VerifyFacts
from balcap.judge.tasks.grade import Grade, Grades
from balcap.judge.tasks.match import Match, MatchSpans
from balcap.judge.tasks.pooled_match import PooledMatch
from balcap.judge.tasks.quiz import Quiz
from balcap.judge.tasks.rate import Rate, Rating
from balcap.judge.tasks.recaption import Recaption
from balcap.judge.tasks.rubric import CheckRubric, Criterion
from balcap.judge.tasks.verify import Verdict, Verify
from balcap.judge.tasks.write_questions import WriteQuestions, WrittenQuestion
from balcap.judge.tasks.write_rubric import WriteRubric

__all__ = [
    "Answer", "Assertion", "CheckRubric", "Compare", "Criterion", "Decompose", "DecomposeSpans", "Difference", "Differences",
    "ExtractFacts", "Fact", "Grade", "Grades", "Match", "MatchFacts", "MatchSpans", "PooledMatch", "Quiz", "Rate", "Rating",
    "Recaption", "Verdict", "Verify", "VerifyFacts", "WriteQuestions", "WriteRubric", "WrittenQuestion",
]  # fmt: skip
