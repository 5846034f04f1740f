"""Reference scripts for cmudict-g2p: letter tables, window models, then models of letter and sound.

All but the trivial ones first find out which phones each letter stands for (expectation and
maximisation over alignments).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1 import phones_parts as part
from agent_tools.mle_bench.v1.fill import Named, fill

_NARROW = ((0, 0), (0, 1), (1, 1))
_MIDDLE = (*_NARROW, (1, 2), (2, 2))
_WIDE = (*_MIDDLE, (2, 3), (3, 3))
_WIDEST = (*_WIDE, (3, 4), (4, 4))


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The 100 scripts; ``facts`` do not matter, as no other competition has this form."""
    del facts
    return fill(trivial=_trivial(), default=_default(), tuned=_tuned(), strong=_strong())


def _trivial() -> Iterator[Named]:
    values = {
        "copy-sample": 'sub["target"]',
        "commonest": 'train["target"].mode()[0]',
        "random-draw": 'np.random.default_rng( 0 ).choice( train["target"], len(test) )',
        "first-word": 'train["target"][0]',
    }
    for name, value in values.items():
        yield name, part.READ + f"answers = {value}\n" + part.WRITE
    for letters, end in product((1, 2, 3), ("first", "last")):
        cut = f".str[:{letters}]" if end == "first" else f".str[-{letters}:]"
        lines = (
            f'known = train.groupby( train["word"]{cut} )["target"].agg( lambda t: t.mode()[0] )\n'
            f'answers = test["word"]{cut}.map( known ).fillna( "AH" )\n'
        )
        yield f"commonest-of-{end}-{letters}", part.READ + lines + part.WRITE
    nearest = (
        'order = train.sort_values( "word" ).reset_index( drop=True )\n'
        'at = order["word"].searchsorted( test["word"] ).clip( 0, len(order) - 1 )\n'
        'answers = order["target"].to_numpy()[at]\n'
    )
    yield "next-in-dictionary", part.READ + nearest + part.WRITE
    turned = nearest.replace('"word" )', '"turned" )').replace(
        'test["word"]', 'test["word"].str[::-1]'
    )
    turned = 'train["turned"] = train["word"].str[::-1]\n' + turned.replace(
        'order["word"]', 'order["turned"]'
    )
    yield "next-in-reverse-dictionary", part.READ + turned + part.WRITE
    one = (
        "seen = defaultdict( Counter )\n"
        'for word, t in zip( train["word"][:20000], train["target"][:20000] ):\n'
        "    t = t.split()\n"
        "    for i, letter in enumerate( word ):\n"
        "        seen[letter][t[{place}]] += 1\n"
        "best = {{ l: c.most_common( 1 )[0][0] for l, c in seen.items() }}\n"
        'answers = [ " ".join( best.get( l, "AH" ) for l in {letters} ) for w in test["word"] ]\n'
    )
    for name, place, source in (
        ("same-place", "min( i, len(t) - 1 )", "w"),
        ("share-of-length", "i * len(t) // len(word)", "w"),
        ("share-of-length-no-doubles", "i * len(t) // len(word)", "dict.fromkeys( w )"),
    ):
        yield name, part.READ + one.format(place=place, letters=source) + part.WRITE


def _table(
    words: int,
    windows: tuple[tuple[int, int], ...],
    *,
    least: int = 1,
    power: float | None = None,
) -> str:
    settings = f"WORDS, WINDOWS, LEAST, POWER = {words}, {list(windows)}, {least}, {power or 0}\n"
    choose = part.BACK_OFF if power is None else part.VOTE
    body = part.READ + settings + part.ALIGN + part.TABLES + choose + part.SPELL
    return body + part.WRITE


def _classifier(words: int, span: int, model: str, source: str, one_hot: bool) -> str:
    settings = f"WORDS, SPAN, ONE_HOT = {words}, {span}, {one_hot}\n"
    name = model.split("(")[0]
    made = f"from {source} import {name}\nmodel = {model}\n"
    return part.READ + settings + part.ALIGN + made + part.CLASSIFY + part.WRITE


def _signs(
    words: int,
    order: int,
    beam: int,
    discount: float,
    *,
    continued: bool = False,
    share: float | None = None,
    summed: bool = False,
) -> str:
    settings = (
        f"WORDS, ORDER, BEAM, DISCOUNT = {words}, {order}, {beam}, {discount}\n"
        f"CONTINUED, MERGE, SHARE = {continued}, {not summed and share is None}, {share}\n"
    )
    end = part.BEST
    if share is not None:
        end = part.BOTH_WAYS
    elif summed:
        end = part.SUMMED
    return part.READ + settings + part.ALIGN + part.SIGNS + part.SEARCH + end + part.WRITE


def _default() -> Iterator[Named]:
    windows = {
        "letter": ((0, 0),),
        "next": ((0, 0), (0, 1)),
        "before": ((0, 0), (1, 0)),
        "around": ((0, 0), (1, 1)),
        "narrow": _NARROW,
    }
    for (name, chosen), words in product(windows.items(), (2_000, 8_000, 20_000)):
        yield f"{name}-{words}", _table(words, chosen)
    models = {
        "tree": ("DecisionTreeClassifier( random_state=0 )", "sklearn.tree", False),
        "short-tree": (
            "DecisionTreeClassifier( max_depth=12, random_state=0 )",
            "sklearn.tree",
            False,
        ),
        "bayes": ("BernoulliNB()", "sklearn.naive_bayes", True),
        "near": ("KNeighborsClassifier( n_neighbors=1 )", "sklearn.neighbors", False),
        "forest": (
            "RandomForestClassifier( n_estimators=10, random_state=0 )",
            "sklearn.ensemble",
            False,
        ),
    }
    for (name, (model, source, one_hot)), span in product(models.items(), (1, 2, 3)):
        yield f"{name}-{span}", _classifier(4_000, span, model, source, one_hot)
    for order, words in ((1, 10_000), (2, 3_000), (2, 10_000), (3, 2_000), (3, 5_000)):
        yield f"signs-{order}-{words}", _signs(words, order, 2, 0.5)


def _tuned() -> Iterator[Named]:
    for (name, windows), least in product((("middle", _MIDDLE), ("wide", _WIDE)), (1, 2, 3)):
        yield f"{name}-40k-at-least-{least}", _table(40_000, windows, least=least)
    for (name, windows), power in product((("wide", _WIDE), ("widest", _WIDEST)), (1.0, 2.0, 4.0)):
        yield f"{name}-30k-vote-{power}", _table(30_000, windows, power=power)
    yield "widest-40k", _table(40_000, _WIDEST)
    for order, words in product((3, 4, 5), (15_000, 30_000)):
        yield f"signs-{order}-{words}", _signs(words, order, 4, 0.7)
        yield f"signs-{order}-{words}-continued", _signs(words, order, 4, 0.7, continued=True)
    for order, beam in product((4, 6), (1, 3)):
        yield f"signs-{order}-20k-beam-{beam}", _signs(20_000, order, beam, 0.5)
    for span in (3, 4):
        for words in (15_000, 30_000):
            model = "DecisionTreeClassifier( min_samples_leaf=2, random_state=0 )"
            yield f"tree-{span}-{words}", _classifier(words, span, model, "sklearn.tree", True)
    extra = "ExtraTreesClassifier( n_estimators=12, random_state=0 )"
    yield "extra-4", _classifier(8_000, 4, extra, "sklearn.ensemble", False)
    near = 'KNeighborsClassifier( n_neighbors=4, weights="distance", metric="hamming" )'
    yield "near-4", _classifier(3_000, 4, near, "sklearn.neighbors", False)


def _strong() -> Iterator[Named]:
    for order, discount in ((5, 0.7), (6, 0.7), (6, 0.8), (7, 0.8)):
        yield (
            f"signs-{order}-{discount}-all-summed",
            _signs(110_000, order, 6, discount, continued=True, summed=True),
        )
        yield (
            f"signs-{order}-{discount}-all-both-ways",
            _signs(110_000, order, 6, discount, continued=True, share=0.5),
        )
    for order in (5, 6):
        yield f"signs-{order}-all", _signs(110_000, order, 5, 0.75, continued=True)
        yield (
            f"signs-{order}-70k-both-ways",
            _signs(70_000, order, 6, 0.75, continued=True, share=0.5),
        )
        yield f"signs-{order}-all-raw-summed", _signs(110_000, order, 6, 0.6, summed=True)
    yield "signs-6-all-both-ways-10", _signs(110_000, 6, 10, 0.75, continued=True, share=0.4)
