"""The architecture study: matched small models that differ in one part (`python -m model.study`).

`variants` says what differs, `costs` counts parameters and FLOPs, `collect` and `corpus` make the
text, `probes` the retrieval tasks, `train` and `measure` run one variant and seed, `log` keeps one
line for each, and `report` computes the tables of docs/architecture_study.md from those lines.
"""
