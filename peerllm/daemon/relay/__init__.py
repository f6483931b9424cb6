"""People's requests that another device answers: sent there, and taken from there."""
