"""Pieces of the scripts for cmudict-g2p; each is plain Python and follows a line of settings."""

READ = """\
import numpy as np
import pandas as pd
from collections import Counter, defaultdict
train, test = pd.read_csv( "train.csv" ), pd.read_csv( "test.csv" )
sub = pd.read_csv( "sample_submission.csv" )
"""

WRITE = """\
sub["target"] = answers
sub.to_csv( "submission.csv", index=False )"""

# Needs WORDS. Makes `pairs`: a word and, for each of its letters, the phones it stands for (a text
# of none, one or two phones).
ALIGN = """\
words = train["word"].tolist()[:WORDS]
sounds = [ t.split() for t in train["target"][:WORDS] ]
cost, unseen = {}, [ 2.0, 1.0, 4.0 ]
def align( word, phones ):
    n, m = len(word), len(phones)
    best, back = { 0: 0.0 }, []
    for i, letter in enumerate( word ):
        step, came = {}, {}
        for j, here in best.items():
            for k in (0, 1, 2):
                to = j + k
                if to > m or m - to > 2 * ( n - i - 1 ):
                    continue
                c = here + cost.get( (letter, " ".join( phones[j:to] )), unseen[k] )
                if not cost:
                    c += 3 * abs( ( i + 1 ) / n - to / m )
                if to not in step or c < step[to]:
                    step[to], came[to] = c, k
        best = step
        back.append( came )
    if m not in best:
        return None
    parts, j = [], m
    for came in reversed( back ):
        k = came[j]
        parts.append( " ".join( phones[j - k : j] ) )
        j -= k
    return parts[::-1]
for turn in range( 4 ):
    some = 4000 if turn < 3 else len(words)
    aligned = [ align( w, s ) for w, s in zip( words[:some], sounds[:some] ) ]
    if turn < 3:
        seen = Counter( (l, p) for w, a in zip( words, aligned ) if a for l, p in zip( w, a ) )
        letters = Counter()
        for (l, p), c in seen.items():
            letters[l] += c
        cost = { (l, p): -np.log( c / letters[l] ) for (l, p), c in seen.items() if c > 1 }
        unseen = [ 9.0, 9.0, 12.0 ]
pairs = [ (w, a) for w, a in zip( words, aligned ) if a ]
"""

# Needs WINDOWS, pairs of letters to the left and right. Makes `tables`, one a window.
TABLES = """\
PAD = "#" * 6
def windows( word ):
    text = PAD + word + PAD
    for i in range( 6, 6 + len(word) ):
        yield [ text[i - a : i + b + 1] for a, b in WINDOWS ]
tables = [ defaultdict( Counter ) for _ in WINDOWS ]
for word, parts in pairs:
    for keys, part in zip( windows( word ), parts ):
        for table, key in zip( tables, keys ):
            table[key][part] += 1
"""

# Needs LEAST: the last window (the widest) that was seen so often decides.
BACK_OFF = """\
def choose( keys ):
    for table, key in zip( tables[::-1], keys[::-1] ):
        if key in table and sum( table[key].values() ) >= LEAST:
            return table[key].most_common( 1 )[0][0]
    return ""
"""

# Needs POWER: the share of each part, weighted by the width of the window.
VOTE = """\
def choose( keys ):
    votes = Counter()
    for (a, b), table, key in zip( WINDOWS, tables, keys ):
        if key in table:
            total = sum( table[key].values() )
            for part, count in table[key].items():
                votes[part] += count / ( total + 0.5 ) * ( a + b + 1 ) ** POWER
    return votes.most_common( 1 )[0][0] if votes else ""
"""

SPELL = """\
answers = [
    " ".join( p for p in map( choose, windows( word ) ) if p ) or "AH" for word in test["word"]
]
"""

# Needs SPAN (letters to each side) and `model`, an estimator, or ONE_HOT True for coded letters.
CLASSIFY = """\
def rows( word ):
    codes = [ 0 ] * SPAN + [ ord( c ) - 96 for c in word ] + [ 0 ] * SPAN
    return [ codes[i : i + 2 * SPAN + 1] for i in range( len(word) ) ]
A = np.array( [ r for word, _ in pairs for r in rows( word ) ] )
y = np.array( [ p for _, parts in pairs for p in parts ] )
B = np.array( [ r for word in test["word"] for r in rows( word ) ] )
if ONE_HOT:
    from sklearn.preprocessing import OneHotEncoder
    code = OneHotEncoder( handle_unknown="ignore" ).fit( A )
    A, B = code.transform( A ), code.transform( B )
pred = iter( model.fit( A, y ).predict( B ) )
answers = []
for word in test["word"]:
    parts = [ next( pred ) for _ in word ]
    answers.append( " ".join( p for p in parts if p ) or "AH" )
"""

# Needs ORDER and DISCOUNT. A letter with its phones is one sign; `lines` are the words as signs.
# `chance` is an interpolated n-gram model with absolute discounting over the signs.
SIGNS = """\
kinds = Counter( (l, p) for w, a in pairs for l, p in zip( w, a ) )
sign = { pair: chr( 1000 + i ) for i, pair in enumerate( sorted( kinds ) ) }
meaning = { s: p for (l, p), s in sign.items() }
choices = defaultdict( list )
for (l, p), c in kinds.most_common():
    if c > 1 and len(choices[l]) < 14:
        choices[l].append( sign[l, p] )
lines = [ "".join( sign[pair] for pair in zip( w, a ) ) for w, a in pairs ]
def n_grams( lines ):
    counts = [ Counter() for _ in range( ORDER ) ]
    for line in lines:
        text = "^" * ( ORDER - 1 ) + line + "$"
        for n in range( 1, ORDER + 1 ):
            counts[n - 1].update( text[i - n : i] for i in range( ORDER, len(text) + 1 ) )
    if CONTINUED:
        for n in range( ORDER - 1 ):
            counts[n] = Counter( gram[1:] for gram in counts[n + 1] )
    totals = []
    for level in counts:
        total = defaultdict( lambda: [ 0, 0 ] )
        for gram, c in level.items():
            entry = total[gram[:-1]]
            entry[0] += c
            entry[1] += 1
        totals.append( dict( total ) )
    known = {}
    def chance( context, s ):
        key = context + s
        p = known.get( key )
        if p is None:
            p = 1 / ( len(sign) + 1 )
            for n in range( ORDER ):
                part = context[len(context) - n :]
                total = totals[n].get( part )
                if total is None:
                    break
                c = counts[n].get( part + s, 0 )
                p = ( max( c - DISCOUNT, 0 ) + DISCOUNT * total[1] * p ) / total[0]
            p = known[key] = np.log( p )
        return p
    return chance
"""

# Needs BEAM. The likeliest signs of each word under `chance`: up to BEAM of them with their scores.
SEARCH = """\
chance = n_grams( lines )
def search( word ):
    start = "^" * ( ORDER - 1 )
    beam = [ (0.0, start, "") ]
    for letter in word:
        options = choices.get( letter ) or [ "" ]
        found = {}
        for score, context, line in beam:
            for s in options:
                if not s:
                    found[context] = (score, context, line)
                    continue
                new = score + chance( context, s )
                to = ( context + s )[1:] if ORDER > 1 else ""
                key = to if MERGE else line + s
                if key not in found or new > found[key][0]:
                    found[key] = (new, to, line + s)
        beam = sorted( found.values(), reverse=True )[:BEAM]
    return sorted( ( (s + chance( c, "$" ), line) for s, c, line in beam ), reverse=True )
def spoken( line ):
    return " ".join( meaning[s] for s in line if meaning[s] ) or "AH"
"""

BEST = """\
answers = [ spoken( search( word )[0][1] ) for word in test["word"] ]
"""

# Signs that give the same phones add up.
SUMMED = """\
answers = []
for word in test["word"]:
    votes = defaultdict( float )
    for score, line in search( word ):
        votes[spoken( line )] += np.exp( score )
    answers.append( max( votes, key=votes.get ) )
"""

# Needs SHARE: what a model that reads from the end weighs.
BOTH_WAYS = """\
backward = n_grams( [ line[::-1] for line in lines ] )
answers = []
for word in test["word"]:
    votes = defaultdict( float )
    for score, line in search( word ):
        text = "^" * ( ORDER - 1 ) + line[::-1] + "$"
        other = sum(
            backward( text[i - ORDER + 1 : i], text[i] ) for i in range( ORDER - 1, len(text) )
        )
        votes[spoken( line )] += np.exp( ( 1 - SHARE ) * score + SHARE * other )
    answers.append( max( votes, key=votes.get ) )
"""
