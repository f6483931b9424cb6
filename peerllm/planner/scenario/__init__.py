"""Scenario files: what to plan for, read and written."""
