"""Reference scripts for russian-lemma: ending tables, then votes of all endings and a ranking."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, fill

_READ = """\
import numpy as np
import pandas as pd
from collections import Counter, defaultdict
train, test = pd.read_csv( "train.csv" ), pd.read_csv( "test.csv" )
sub = pd.read_csv( "sample_submission.csv" )
"""
_WRITE = """\
sub["target"] = answers
sub.to_csv( "submission.csv", index=False )"""

# Needs WORDS. A rule says how many letters go from the end of a form, and what comes instead.
_RULES = """\
def rule_of( form, lemma ):
    same = 0
    while same < min( len(form), len(lemma) ) and form[same] == lemma[same]:
        same += 1
    return f"{len(form) - same}|{lemma[same:]}"
def apply( form, rule ):
    cut, _, ending = rule.partition( "|" )
    return form[: len(form) - int( cut )] + ending if int( cut ) <= len(form) else form
forms, lemmas = train["form"].tolist()[:WORDS], train["target"].tolist()[:WORDS]
rules = [ rule_of( f, l ) for f, l in zip( forms, lemmas ) ]
"""

# Needs ENDS, the lengths of the endings. Words are marked at their begin.
_TABLES = """\
def count( forms, rules ):
    tables = { k: defaultdict( Counter ) for k in ENDS }
    for form, rule in zip( forms, rules ):
        text = "^" + form
        for k in ENDS:
            if k <= len(text):
                tables[k][text[len(text) - k :]][rule] += 1
    return tables
tables = count( forms, rules )
def endings( form ):
    text = "^" + form
    return [ (k, text[len(text) - k :]) for k in ENDS if k <= len(text) ]
"""

# Needs LEAST: the longest ending that was seen so often decides.
_BACK_OFF = """\
answers = []
for form in test["form"]:
    rule = "0|"
    for k, end in reversed( endings( form ) ):
        seen = tables[k].get( end )
        if seen and sum( seen.values() ) >= LEAST:
            rule = seen.most_common( 1 )[0][0]
            break
    answers.append( apply( form, rule ) )
"""

# Needs POWER and PRIOR: shares of all endings, longer ones weighing more.
_SHARES = """\
def shares( form, tables ):
    votes = Counter()
    for k, end in endings( form ):
        seen = tables[k].get( end )
        if seen:
            total = sum( seen.values() )
            for rule, c in seen.items():
                votes[rule] += c / ( total + PRIOR ) * k ** POWER
    return votes
"""
_VOTE = """\
answers = []
for form in test["form"]:
    votes = shares( form, tables )
    answers.append( apply( form, votes.most_common( 1 )[0][0] ) if votes else form )
"""

# Needs BACK, a number of rows: a longer ending is mixed with the next shorter one.
_MIXED = """\
def shares( form, tables ):
    mixed = {}
    for k, end in endings( form ):
        seen = tables[k].get( end )
        if seen:
            total = sum( seen.values() )
            weight = BACK * len(seen) ** KINDS
            mixed = { r: p * weight / ( total + weight ) for r, p in mixed.items() }
            for rule, c in seen.items():
                mixed[rule] = mixed.get( rule, 0 ) + c / ( total + weight )
    return Counter( mixed )
"""

# Needs TAIL and FAITH: how often lemmas end so, for the last letters of a candidate.
_PLAUSIBLE = """\
known = Counter( l[-TAIL:] for l in dict.fromkeys( lemmas ) )
answers = []
for form in test["form"]:
    best, most = form, -1e9
    for rule, share in shares( form, tables ).most_common( 8 ):
        lemma = apply( form, rule )
        score = np.log( share + 1e-9 ) + FAITH * np.log( known[lemma[-TAIL:]] + 0.1 )
        if score > most:
            best, most = lemma, score
    answers.append( best )
"""

# Half of the lemmas give tables, the other half examples for a model that ranks candidates; then
# all of them give the tables for the test.
_RANK = """\
from sklearn.ensemble import HistGradientBoostingClassifier
def tails_of( lemmas ):
    return { n: Counter( l[-n:] for l in dict.fromkeys( lemmas ) ) for n in (2, 3, 4, 5) }
def candidates( form, tables, tails ):
    votes = shares( form, tables )
    rows, found = [], []
    top = votes.most_common( 5 )
    for place, (rule, share) in enumerate( top ):
        lemma = apply( form, rule )
        cut, _, new = rule.partition( "|" )
        row = [ share, place, share / top[0][1], len(form), len(lemma), int( cut ), len(new) ]
        for k in ENDS:
            seen = tables[k].get( ( "^" + form )[-k:] ) if k <= len(form) + 1 else None
            row += [ seen[rule] / sum( seen.values() ), sum( seen.values() ) ] if seen else [ -1, 0 ]
        row += [ np.log1p( tails[n][lemma[-n:]] ) for n in tails ]
        row += [ 0 if len(lemma) < 2 else ord( lemma[-1] ) - 1071, ord( form[-1] ) - 1071 ]
        rows.append( row )
        found.append( lemma )
    return rows, found
side = np.array( [ hash_of( l ) % 2 for l in lemmas ] )
half_tails = tails_of( [ l for l, s in zip( lemmas, side ) if s ] )
half = count( [ f for f, s in zip( forms, side ) if s ], [ r for r, s in zip( rules, side ) if s ] )
A, y = [], []
for form, lemma in [ (f, l) for f, l, s in zip( forms, lemmas, side ) if not s ][:EXAMPLES]:
    rows, found = candidates( form, half, half_tails )
    A += rows
    y += [ f == lemma for f in found ]
model = HistGradientBoostingClassifier( max_iter=ROUNDS, random_state=0 ).fit( np.array( A ), y )
del half
rows, places, options, tails = [], [], [], tails_of( lemmas )
for form in test["form"]:
    r, found = candidates( form, tables, tails )
    places.append( (len(rows), len(rows) + len(r)) )
    rows += r
    options.append( found or [ form ] )
chance = model.predict_proba( np.array( rows ) )[:, 1]
answers = [
    o[int( np.argmax( chance[a:b] ) )] if b > a else o[0] for (a, b), o in zip( places, options )
]
"""
_HASH = """\
import zlib
hash_of = lambda text: zlib.crc32( text.encode() )
"""

# Needs `model`; a form is its last six letters, as numbers or as signs that are there or not.
_CLASSIFY = """\
def codes( forms ):
    return np.array( [ [ ord( c ) % 64 for c in ( "^" * 6 + f )[-6:] ] for f in forms ] )
A, B = codes( forms ), codes( test["form"] )
if ONE_HOT:
    from sklearn.preprocessing import OneHotEncoder
    code = OneHotEncoder( handle_unknown="ignore" ).fit( A )
    A, B = code.transform( A ), code.transform( B )
pred = model.fit( A, rules ).predict( B )
answers = [ apply( f, r ) for f, r in zip( test["form"], pred ) ]
"""


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The 100 scripts; ``facts`` do not matter, as no other competition has this form."""
    del facts
    return fill(trivial=_trivial(), default=_default(), tuned=_tuned(), strong=_strong())


def _trivial() -> Iterator[Named]:
    values = {
        "copy-sample": 'sub["target"]',
        "copy": 'test["form"]',
        "commonest": 'train["target"].mode()[0]',
        "random-draw": 'np.random.default_rng( 0 ).choice( train["target"], len(test) )',
        "without-last": 'test["form"].str[:-1]',
        "without-two": 'test["form"].str[:-2]',
        "without-three": 'test["form"].str[:-3]',
    }
    for ending in ("ть", "ый", "а", "ся"):
        for cut in (1, 2):
            values[f"without-{cut}-with-{ending}"] = f'test["form"].str[:-{cut}] + "{ending}"'
    for name, value in values.items():
        yield name, _READ + f"answers = {value}\n" + _WRITE


def _table(words: int, ends: range, least: int = 1) -> str:
    settings = f"WORDS, ENDS, LEAST = {words}, {list(ends)}, {least}\n"
    return _READ + settings + _RULES + _TABLES + _BACK_OFF + _WRITE


def _vote(words: int, ends: range, power: float, prior: float) -> str:
    settings = f"WORDS, ENDS, POWER, PRIOR = {words}, {list(ends)}, {power}, {prior}\n"
    return _READ + settings + _RULES + _TABLES + _SHARES + _VOTE + _WRITE


def _mixed(
    words: int,
    ends: range,
    back: float,
    kinds: float,
    *,
    tail: int = 0,
    faith: float = 0.0,
    examples: int = 0,
    rounds: int = 0,
) -> str:
    settings = f"WORDS, ENDS, BACK, KINDS = {words}, {list(ends)}, {back}, {kinds}\n"
    end = _VOTE
    if tail:
        settings += f"TAIL, FAITH = {tail}, {faith}\n"
        end = _PLAUSIBLE
    if examples:
        settings += f"EXAMPLES, ROUNDS = {examples}, {rounds}\n"
        end = _HASH + _RANK
    return _READ + settings + _RULES + _TABLES + _MIXED + end + _WRITE


def _classifier(words: int, model: str, source: str, one_hot: bool) -> str:
    settings = f"WORDS, ONE_HOT = {words}, {one_hot}\n"
    made = f"from {source} import {model.split('(')[0]}\nmodel = {model}\n"
    return _READ + settings + _RULES + made + _CLASSIFY + _WRITE


def _default() -> Iterator[Named]:
    for words, k in product((2_000, 10_000), (1, 2, 3, 4)):
        yield f"ending-{k}-{words}", _table(words, range(k, k + 1))
    for words, k in product((2_000, 10_000, 30_000), (2, 3, 4, 5)):
        yield f"endings-to-{k}-{words}", _table(words, range(1, k + 1))
    models = {
        "tree": ("DecisionTreeClassifier( random_state=0 )", "sklearn.tree", False),
        "short-tree": (
            "DecisionTreeClassifier( max_depth=15, random_state=0 )",
            "sklearn.tree",
            False,
        ),
        "one-hot-tree": ("DecisionTreeClassifier( random_state=0 )", "sklearn.tree", True),
        "bayes": ("BernoulliNB( alpha=0.1 )", "sklearn.naive_bayes", True),
        "near": (
            'KNeighborsClassifier( n_neighbors=1, metric="hamming" )',
            "sklearn.neighbors",
            False,
        ),
    }
    for (name, (model, source, one_hot)), words in product(models.items(), (1_000, 3_000, 8_000)):
        yield f"{name}-{words}", _classifier(words, model, source, one_hot)


def _tuned() -> Iterator[Named]:
    for words, k, least in product((60_000, 150_000), (6, 8), (1, 2, 4)):
        yield f"endings-to-{k}-{words}-at-least-{least}", _table(words, range(1, k + 1), least)
    for words, power, prior in product((30_000, 100_000), (1.0, 2.0, 3.0), (0.0, 2.0)):
        yield f"vote-{words}-{power}-{prior}", _vote(words, range(1, 8), power, prior)
    for words, back in product((20_000, 60_000), (0.3, 1.0, 3.0)):
        yield f"mixed-{words}-{back}", _mixed(words, range(1, 9), back, 0.0)
    for words in (20_000, 40_000):
        model = "DecisionTreeClassifier( min_samples_leaf=2, random_state=0 )"
        yield f"one-hot-tree-{words}", _classifier(words, model, "sklearn.tree", True)
    extra = "ExtraTreesClassifier( n_estimators=12, random_state=0 )"
    yield "extra", _classifier(12_000, extra, "sklearn.ensemble", False)
    for k in (3, 8):
        near = f'KNeighborsClassifier( n_neighbors={k}, weights="distance", metric="hamming" )'
        yield f"near-{k}", _classifier(12_000, near, "sklearn.neighbors", False)


def _strong() -> Iterator[Named]:
    for tail, faith in ((3, 0.1), (3, 0.2), (4, 0.1), (4, 0.2), (5, 0.1)):
        yield (
            f"mixed-all-lemma-{tail}-{faith}",
            _mixed(300_000, range(1, 11), 0.5, 0.5, tail=tail, faith=faith),
        )
    for back, kinds in ((0.5, 1.0), (1.0, 0.5)):
        yield f"mixed-all-{back}-{kinds}", _mixed(300_000, range(1, 11), back, kinds)
    for examples, rounds in product((20_000, 40_000), (60, 120)):
        yield (
            f"ranked-{examples}-{rounds}",
            _mixed(300_000, range(1, 10), 0.5, 0.5, examples=examples, rounds=rounds),
        )
    for back in (0.25, 1.0):
        for longest in (8, 12):
            yield (
                f"ranked-{back}-to-{longest}",
                _mixed(300_000, range(1, longest + 1), back, 0.5, examples=30_000, rounds=100),
            )
