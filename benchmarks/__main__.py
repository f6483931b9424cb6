"""`make bench`: every benchmark in turn."""

from benchmarks import edgeshard_paper, engine, main_job, planner, prediction, quality

for one in (main_job, engine, quality, planner, prediction, edgeshard_paper):
    print(f"\n# {one.__name__}\n", flush=True)
    one.main([])
