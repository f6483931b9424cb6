"""`make bench`: every benchmark that needs no root and no files, in turn."""

from benchmarks import edgeshard_paper, engine, planner, prediction

for one in (engine, planner, prediction, edgeshard_paper):
    print(f"\n# {one.__name__}\n", flush=True)
    one.main([])
