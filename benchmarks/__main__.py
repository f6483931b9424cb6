"""`make bench`: every benchmark in turn."""

from benchmarks import edgeshard_paper, engine, fused, main_job, planner, prediction, quality, turns

for one in (main_job, engine, fused, turns, quality, planner, prediction, edgeshard_paper):
    print(f"\n# {one.__name__}\n", flush=True)
    one.main([])
