"""The life of a deployment: what is known, the rules, and how often things are tried."""
