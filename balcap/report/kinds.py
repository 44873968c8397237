"""What an assertion is about, by its words: coarse, in English, the same for every run that is compared.

It sorts assertions for a reader, and enters no reward. A sentence of no listed word says that something is there.
"""

from __future__ import annotations

import re

_COLOURS = (
    "black|white|gr[ae]y|red|orange|yellow|green|blue|purple|violet|pink|brown|beige|tan|gold(?:en)?|silver|teal|cyan|"
    "magenta|maroon|navy|turquoise|cream|colou?r(?:ed|ful|s)?|dark|light|bright|pale"
)
_NUMBERS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|several|many|few|multiple|pair|\\d+"
)

_KINDS = {
    "mood": "seem\\w*|appear(?:s|ing)? to|suggest\\w*|atmosphere|mood|feel\\w*|sense of|inviting|peaceful|cozy|lively|"
    "serene|vibrant|beautiful|elegant|charming|pleasant|cheerful|evok\\w+|convey\\w*|impression|likely|perhaps|overall",
    "text": "text|words?|letters?|reads|says|written|sign|label\\w*|logo|caption(?:ed)?|title|inscription",
    "number": _NUMBERS + "|count|total",
    "place": "left|right|above|below|under(?:neath)?|over|behind|beside|between|near(?:by)?|next to|in front|corner|top|"
    "bottom|cent(?:er|re)|middle|foreground|in the background|on the \\w+ side|around|inside|outside|across|upper|lower",
    "colour": _COLOURS,
    "size": "large|small|big|tiny|huge|tall|short|long|wide|narrow|thick|thin|little|medium(?:-sized)?|size",
    "material": "wood(?:en)?|metal(?:lic)?|glass|plastic|stone|brick|leather|cotton|fabric|paper|concrete|marble|ceramic|"
    "striped|checkered|patterned|smooth|rough|shiny|texture\\w*|transparent|made of",
    "action": "(?!thing|something|nothing|building|ceiling|clothing|ring|string)\\w+ing|"
    "stands?|sits?|walks?|runs?|holds?|wears?|looks?|lies?|rides?|eats?|plays?|faces?",
}
OBJECT = "object"
_THERE_IS = re.compile(r"\s*there (?:is|are)\b.*", re.IGNORECASE | re.DOTALL)
_VERB = re.compile(r"\b(?:is|are|was|were|has|have)\b", re.IGNORECASE)
_PATTERNS = {kind: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for kind, words in _KINDS.items()}

KINDS = (OBJECT, "colour", "size", "number", "place", "material", "action", "text", "mood")
"""In the order of a chart."""


def kind_of(assertion: str) -> str:
    """One of `KINDS`, by the words behind the verb: "The red box is large." is about size.

    Where several fit it is the first of mood, text, number, place, colour, size, material and action. A sentence with
    "there is" is about an object, or about a number.
    """
    if there := _THERE_IS.match(assertion):
        return next((kind for kind in ("mood", "text", "number") if _PATTERNS[kind].search(there[0])), OBJECT)
    *_, predicate = _VERB.split(assertion, maxsplit=1)
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(predicate)), OBJECT)
