"""How long the ends of a connection wait for each other."""

DIAL_TIMEOUT_S = 5.0  # TCP, TLS and the upgrade together
CLOSE_TIMEOUT_S = 1.0  # how long an orderly end waits for the other side's
