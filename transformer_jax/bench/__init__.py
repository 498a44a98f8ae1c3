"""How fast an experiment runs, beside what the device can do. A wrong figure is an error, not a result.

`train` is the step; `decode`, `data`, `checkpoint` and `depth` are what stands beside it. What each figure means is
said in `docs/bench.md`.
"""
