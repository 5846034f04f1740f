"""One-number entries for competitions that ask for the class of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from agent_tools.mle_bench.catalogue import call
from agent_tools.mle_bench.compose import Choices, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.v1.fill import Named

_NUMBERS = {
    "length": "s.str.len()",
    "words": 's.str.count( " " )',
    "capitals": 's.str.count( "[A-Z]" )',
    "commas": 's.str.count( "," )',
}


def number_scripts(facts: TaskFacts) -> Iterator[Named]:
    """Twelve scripts that look at one number of the text: a line, a stump or a small tree on it."""
    models = {
        "linear": call("LogisticRegression"),
        "stump": call("DecisionTreeClassifier", "max_depth=1", "random_state=0"),
        "tree": call("DecisionTreeClassifier", "max_depth=3", "random_state=0"),
    }
    one = replace(facts, numeric=1, categorical=0, text=0)
    for (name, expression), (kind, model) in product(_NUMBERS.items(), models.items()):
        extra = f'X, Z = [ d[["text"]].apply( lambda s: {expression} ) for d in (X, Z) ]'
        yield f"{name}-{kind}", compose(one, Choices((model,), extra=(extra,)))
