"""A household without clock, sockets or models: the real deciders, and models of all that they decide about."""
