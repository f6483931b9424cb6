"""Measurements: ratios taken in one run on one machine, interleaved, medians, processors pinned."""
