"""One folder a competition, as MLE-bench lays it out; folder name = competition id."""
