"""As much of RFC 6455 as a link needs, sans-I/O: the upgrade from HTTP, and messages after it."""
