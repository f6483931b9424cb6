"""`make bench`: every benchmark in turn."""

from benchmarks import main_job, planner

main_job.main()
planner.main([])
