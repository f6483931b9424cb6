"""This device as its owner runs it: a service of systemd, sleep, and what it lends."""
