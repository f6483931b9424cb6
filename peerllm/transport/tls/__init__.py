"""Mutual TLS 1.3 with pinned certificates: contexts, and a server whose trust can change while it runs."""
