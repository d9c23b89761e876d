"""Private and fast: the layers packed for decoding, the cache, and recorded graphs."""
