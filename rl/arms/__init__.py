"""Learning arms: objectives from the bundled policy at equal script executions, curves and tables.

    python -m rl.arms run --work DIR --log LOGS [--only ARM …]    resumable; one or many arms
    python -m rl.arms report LOGS [--into docs/objectives.md]     tables with 95 % intervals
    python -m rl.arms curve LOGS                                  one arm's slope, and its power

An arm is an objective, a number of updates a batch and a seed. All arms have the same policy at the
start, tasks, steps, scripts a step and learning rate; the last checkpoint is measured, and those
before it for the curve: nothing is chosen by a score.
"""
