"""Heartbeats in datagrams, sent and taken by a thread of their own, so that a busy device is known to be alive."""
