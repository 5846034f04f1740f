"""Machine-learning-engineering environment: a task description in, a scikit-learn script out."""
