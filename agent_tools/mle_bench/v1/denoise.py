"""Reference scripts for photo-denoise: filters, then models of the pixels around each one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.v1.fill import Named, fill

_READ = """\
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
train, test = pd.read_csv( "train.csv" ), pd.read_csv( "test.csv" )
sub = pd.read_csv( "sample_submission.csv" )
def images( folder, names ):
    return { n: np.asarray( Image.open( folder + n ), dtype=float ) for n in names }
"""
_WRITE = """\
sub["target"] = np.clip( answers, 0, 255 )
sub.to_csv( "submission.csv", index=False )"""

# Needs `restore`, from a dirty image to a clean one.
_FILTER = """\
clean = { n: restore( i ) for n, i in images( "test_images/dirty/", test["image"].unique() ).items() }
answers = [ clean[n][r, c] for n, r, c in zip( test["image"], test["row"], test["column"] ) ]
"""

_DESPECKLE = """\
def despeckled( image ):
    middle = ndimage.median_filter( image, 3 )
    return np.where( ( ( image == 0 ) | ( image == 255 ) ) & ( abs( image - middle ) > 40 ), middle, image )
"""

# Needs RADIUS, SIZES, BLURS, PIXELS (an image) and `start` (what a pixel is before it is corrected);
# makes A, y, B and what to add again.
_FEATURES = """\
def features( image ):
    base = start( image )
    padded = np.pad( base, RADIUS, mode="reflect" )
    side = range( 2 * RADIUS + 1 )
    parts = [ padded[a : a + 64, b : b + 64] for a in side for b in side ]
    for s in SIZES:
        middle = ndimage.median_filter( base, s )
        parts += [ middle, ndimage.median_filter( abs( base - middle ), s ) ]
    for s in BLURS:
        blur = ndimage.gaussian_filter( base, s )
        parts += [ blur, np.sqrt( ndimage.gaussian_filter( ( base - blur ) ** 2, s ) ) ]
    table = np.stack( parts, -1 )
    return table, ndimage.median_filter( base, 3 )
names = train["image"].unique()
rng = np.random.default_rng( 0 )
A, y, B, add = [], [], [], []
soiled, true = images( "train_images/dirty/", names ), images( "train_images/clean/", names )
for n in names:
    table, middle = features( soiled[n] )
    at = rng.choice( 4096, PIXELS, replace=False )
    A.append( table.reshape( 4096, -1 )[at] - CENTRE * middle.ravel()[at][:, None] )
    y.append( ( true[n] - middle ).ravel()[at] )
for n, image in images( "test_images/dirty/", test["image"].unique() ).items():
    table, middle = features( image )
    asked = test[test["image"] == n]
    at = asked["row"].to_numpy() * 64 + asked["column"].to_numpy()
    B.append( pd.DataFrame( table.reshape( 4096, -1 )[at] - CENTRE * middle.ravel()[at][:, None], asked.index ) )
    add.append( pd.Series( middle.ravel()[at], asked.index ) )
A, y = np.concatenate( A ) / 64, np.concatenate( y )
B, add = pd.concat( B ).loc[test.index].to_numpy() / 64, pd.concat( add ).loc[test.index].to_numpy()
"""
_FIT = """\
answers = add + np.mean( [ m.fit( A, y ).predict( B ) for m in models ], 0 )
"""


def recipes(facts: TaskFacts) -> list[Recipe]:
    """The 100 scripts; ``facts`` do not matter, as no other competition has this form."""
    del facts
    return fill(trivial=_trivial(), default=_default(), tuned=_tuned(), strong=_strong())


def _trivial() -> Iterator[Named]:
    values = {
        "copy-sample": 'sub["target"]',
        "mean": 'train["target"].mean()',
        "median": 'train["target"].median()',
        "random-draw": 'np.random.default_rng( 0 ).choice( train["target"], len(test) )',
        "copy": 'test["dirty"]',
        "shifted-copy": 'test["dirty"] + ( train["target"] - train["dirty"] ).mean()',
        "image-mean": 'test.groupby( "image" )["dirty"].transform( "mean" )',
        "image-median": 'test.groupby( "image" )["dirty"].transform( "median" )',
        "image-largest": 'test.groupby( "image" )["dirty"].transform( "max" )',
        "inverted": '255 - test["dirty"]',
        "doubled": '2 * test["dirty"]',
        "rounded": 'test["dirty"] // 64 * 64 + 32',
        "black-or-white": '255 * ( test["dirty"] > 127 )',
        "half-way": '( test["dirty"] + 128 ) / 2',
        "row": 'test["row"] * 4',
    }
    for name, value in values.items():
        yield name, _READ + f"answers = {value}\n" + _WRITE


def _filter(expression: str, *before: str) -> str:
    return _READ + "".join(before) + f"restore = lambda i: {expression}\n" + _FILTER + _WRITE


def _on_columns(model: str, source: str, columns: str) -> str:
    name = model.split("(")[0]
    lines = (
        f"from {source} import {name}\n"
        "for d in (train, test):\n"
        '    of = d.groupby( "image" )["dirty"]\n'
        '    d["level"], d["spread"] = of.transform( "mean" ), of.transform( "std" )\n'
        f"columns = {columns}\n"
        f'answers = {model}.fit( train[columns], train["target"] ).predict( test[columns] )\n'
    )
    return _READ + lines + _WRITE


def _default() -> Iterator[Named]:
    for size in (3, 5, 7):
        yield f"median-{size}", _filter(f"ndimage.median_filter( i, {size} )")
        yield f"mean-{size}", _filter(f"ndimage.uniform_filter( i, {size} )")
        wiener = "from scipy.signal import wiener\n"
        yield f"wiener-{size}", _filter(f"wiener( i, {size} )", wiener)
    for sigma in (0.7, 1.5, 3.0):
        yield f"gauss-{sigma}", _filter(f"ndimage.gaussian_filter( i, {sigma} )")
    models = {
        "linear": ("LinearRegression()", "sklearn.linear_model"),
        "near": ("KNeighborsRegressor()", "sklearn.neighbors"),
        "tree": ("DecisionTreeRegressor( random_state=0 )", "sklearn.tree"),
        "forest": (
            "RandomForestRegressor( n_estimators=20, random_state=0 )",
            "sklearn.ensemble",
        ),
        "boost": ("GradientBoostingRegressor( random_state=0 )", "sklearn.ensemble"),
        "hist": ("HistGradientBoostingRegressor( random_state=0 )", "sklearn.ensemble"),
        "ada": ("AdaBoostRegressor( n_estimators=10, random_state=0 )", "sklearn.ensemble"),
        "huber": ("HuberRegressor()", "sklearn.linear_model"),
    }
    columns = {
        "value": '[ "dirty" ]',
        "place": '[ "row", "column", "dirty" ]',
        "level": '[ "dirty", "level", "spread" ]',
    }
    for (name, chosen), (kind, (model, source)) in product(columns.items(), models.items()):
        yield f"{name}-{kind}", _on_columns(model, source, chosen)


def _model(
    models: tuple[str, ...],
    *,
    radius: int = 2,
    sizes: tuple[int, ...] = (),
    blurs: tuple[float, ...] = (),
    pixels: int = 60,
    despeckle: bool = False,
    centre: bool = True,
    scale: bool = False,
) -> str:
    sources = {
        "Ridge": "sklearn.linear_model",
        "HistGradientBoostingRegressor": "sklearn.ensemble",
        "ExtraTreesRegressor": "sklearn.ensemble",
        "MLPRegressor": "sklearn.neural_network",
        "KNeighborsRegressor": "sklearn.neighbors",
    }
    names = sorted({model.split("(")[0] for model in models})
    imports = "".join(f"from {sources[name]} import {name}\n" for name in names)
    settings = (
        f"RADIUS, SIZES, BLURS, PIXELS = {radius}, {list(sizes)}, {list(blurs)}, {pixels}\n"
        f"CENTRE = {int(centre)}\n"
    )
    start = _DESPECKLE + "start = despeckled\n" if despeckle else "start = lambda image: image\n"
    scaled = ""
    if scale:
        scaled = "A, B = [ ( t - A.mean( 0 ) ) / ( A.std( 0 ) + 1e-9 ) for t in (A, B) ]\n"
    listed = f"models = [ {', '.join(models)} ]\n"
    body = imports + settings + start + _FEATURES + scaled + listed + _FIT
    return _READ + body + _WRITE


def _hist(rounds: int, rate: float, leaves: int = 31) -> str:
    return (
        f"HistGradientBoostingRegressor( max_iter={rounds}, learning_rate={rate}, "
        f"max_leaf_nodes={leaves}, random_state=0 )"
    )


def _net(width: int, rounds: int, penalty: float = 0.1, seed: int = 0) -> str:
    return (
        f"MLPRegressor( hidden_layer_sizes=({width}, {width // 2}), alpha={penalty}, "
        f"max_iter={rounds}, early_stopping=True, random_state={seed} )"
    )


_SCALES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "small": ((3, 5), (1.0, 2.0)),
    "large": ((3, 7), (1.0, 4.0, 10.0)),
    "broad": ((3, 5, 9), (2.0, 5.0, 12.0)),
    "sparse": ((5,), (1.5, 15.0)),
}


def _tuned() -> Iterator[Named]:
    extra = "ExtraTreesRegressor( n_estimators=30, min_samples_leaf=5, random_state=0 )"
    for name, (sizes, blurs) in _SCALES.items():
        for kind, model in (("ridge", "Ridge( alpha=1.0 )"), ("extra", extra)):
            yield f"{name}-filters-{kind}", _model((model,), radius=0, sizes=sizes, blurs=blurs)
        for centre, rounds in product((False, True), (60, 150)):
            yield (
                f"{name}-filters-hist-{rounds}{'-centred' if centre else ''}",
                _model((_hist(rounds, 0.1),), radius=0, sizes=sizes, blurs=blurs, centre=centre),
            )
    for radius in (1, 2, 4):
        yield f"ridge-{radius}", _model(("Ridge( alpha=1.0 )",), radius=radius, despeckle=True)
    for radius in (1, 2):
        yield f"hist-{radius}", _model((_hist(100, 0.1),), radius=radius)
        yield (
            f"levels-net-{radius}",
            _model((_net(40, 20),), radius=radius, blurs=(8.0,), centre=False, scale=True),
        )
    near = "KNeighborsRegressor( n_neighbors=20 )"
    yield "near-1", _model((near,), radius=1, pixels=20)
    yield (
        "despeckled-gauss",
        _filter("ndimage.gaussian_filter( despeckled( i ), 1.0 )", _DESPECKLE),
    )
    yield (
        "despeckled-median",
        _filter("ndimage.median_filter( despeckled( i ), 5 )", _DESPECKLE),
    )
    yield (
        "median-then-gauss",
        _filter("ndimage.gaussian_filter( ndimage.median_filter( i, 3 ), 1.0 )"),
    )


def _strong() -> Iterator[Named]:
    many: dict[str, tuple[int, tuple[int, ...], tuple[float, ...]]] = {
        "patch": (3, (5, 9), (1.0, 2.0, 5.0, 12.0)),
        "wide": (4, (5, 11), (1.5, 4.0, 10.0, 25.0)),
    }

    def script(models: tuple[str, ...], name: str, pixels: int, *, scale: bool = True) -> str:
        radius, sizes, blurs = many[name]
        return _model(
            models,
            radius=radius,
            sizes=sizes,
            blurs=blurs,
            pixels=pixels,
            despeckle=True,
            scale=scale,
        )

    for name in many:
        yield f"{name}-net-80", script((_net(80, 25),), name, 120)
        yield f"{name}-net-150", script((_net(150, 20),), name, 150)
        yield f"{name}-net-hist", script((_net(100, 20), _hist(250, 0.1)), name, 120)
        yield f"{name}-two-nets", script((_net(100, 20), _net(100, 20, 0.5, 1)), name, 120)
        yield f"{name}-hist", script((_hist(300, 0.1, 63),), name, 150, scale=False)
        yield (
            f"{name}-two-nets-hist",
            script((_net(80, 20), _net(80, 20, 0.5, 1), _hist(250, 0.1)), name, 120),
        )
        yield f"{name}-penalised-net", script((_net(120, 20, 3.0),), name, 150)
    yield (
        "wide-net-two-hists",
        script((_net(120, 20), _hist(250, 0.1), _hist(200, 0.08, 15)), "wide", 120),
    )
