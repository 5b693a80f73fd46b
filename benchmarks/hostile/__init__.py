"""A hostile trial: kills, unseen nets, bad inputs, two processes, compiled and changed models, mutants of our own code.

`python -m benchmarks.hostile --seed 0` from the root of the repository runs all of it on the CPU; see `__main__`.
"""
