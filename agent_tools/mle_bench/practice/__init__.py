"""The practice suite: about a hundred small competitions cut from real tables in packages.

They give percentiles, not medals, for training and for the gate. One catalogue describes all of
them; there are no folders. This package is also imported by the prepare environment, so it is
empty.
"""
