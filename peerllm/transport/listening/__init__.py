"""Taking in connections at any port without letting the ones that say nothing keep the others out."""
