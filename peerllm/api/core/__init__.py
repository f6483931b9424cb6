"""What every API is translated from and to: one form of a request, one stream of events for its answer."""
