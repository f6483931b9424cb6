"""A model served by the household: found, planned, loaded, served, and planned again."""
