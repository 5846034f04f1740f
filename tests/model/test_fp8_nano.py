"""The bundled model in FP8 predicts held-out text as well as before."""

from benchmarks.fp8 import measure


def test_converted_nano_stays_within_one_per_cent_of_its_perplexity():
    result = measure(12)
    figures = result["figures"]
    for kind in ("scripts", "decisions"):
        assert 0.99 < figures[f"ratio_{kind}"] < 1.01
        low, high = result["intervals"][f"ratio_{kind}"]
        assert 0.99 < low <= figures[f"ratio_{kind}"] <= high < 1.01
        assert figures[f"logp_change_{kind}"] > 1e-6  # the weights did change
    assert 1.05 < figures["perplexity_scripts"] < 1.25  # of 2,048 tokens: it predicts
    assert 0.9 < figures["largest_error"] <= 1 + 2**-13
    assert figures["bytes_share"] < 0.6
    assert all(row["tokens"] > 300 for row in result["rows"])
