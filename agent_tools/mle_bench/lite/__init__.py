"""The 22 competitions of MLE-bench Lite: a catalogue, their graders and the smaller preparers.

Written from the facts of what the original does, with no code of it. A grader gives the same score
as the original on every submission, or refuses it where the original does; scikit-learn is not
needed. Where releases of scikit-learn differ on a degenerate submission, the newest counts.
"""
