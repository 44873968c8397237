"""A small world whose truth is known: scenes, captions, a base policy and a judge.

It exists so that the whole system runs, learns and is checked on a laptop, with no key, no download
and no GPU. It writes ordinary ShareGPT4V files and registers an ordinary litellm provider; nothing
outside this package knows that it exists.

``scene.py`` what is in a picture, and its pixels; ``language.py`` the words and how facts are read from
text; ``captions.py`` true and flawed captions; ``fluency.py`` how well a text reads; ``oracle.py`` the judge,
``questions.py`` and ``rivals.py`` what it says where other methods ask, ``noise.py`` how it may err;
``competition.py`` worlds in which the rewards compete more, ``spreads.py`` how much they differ within a group;
``dataset.py`` files on disk; ``base_policy.py`` builds the model in ``assets/``; ``benchmarks.py`` twins of
benchmarks; ``summary.py`` what a run changed.
"""
