"""Quiet while other packages are imported."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_LOGGERS = ("torchao", "torch.utils._pytree")
_levels: dict[str, int] = {}
_lock, _inside = Lock(), 0


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Without the warnings of torchao about GPU parts that it misses: transformers imports it where it is installed."""
    global _inside
    with _lock:  # several threads may import at once: the first one in changes the levels, the last one out restores
        _inside += 1
        if _inside == 1:
            for name in _LOGGERS:
                _levels[name] = logging.getLogger(name).level
                logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for name, level in _levels.items():
                    logging.getLogger(name).setLevel(level)
