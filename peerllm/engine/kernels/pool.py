"""The threads of onnxruntime's sessions: one pool for the process, whoever makes the sessions."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_made = False


def make_pool(threads: int) -> None:
    """Before the first session is made, with `use_per_session_threads` off. The first caller's number holds."""
    global _made  # noqa: PLW0603  # it is made once
    import onnxruntime

    with _lock:
        if not _made:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _made = True
