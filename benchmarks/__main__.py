"""`make bench`: every benchmark in turn."""

from benchmarks import main_job

main_job.main()
