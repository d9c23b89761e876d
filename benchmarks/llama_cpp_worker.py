"""llama.cpp's side of `llama_cpp.py`, run by the Python of its own environment.

Reads a line of JSON, answers by one. Between two lines no thread of it runs.
"""

import base64
import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp


class Peer:
    """A model and a context with two sequences."""

    def __init__(self, model: str, threads: int, context: list[int]) -> None:
        self.log: list[str] = []
        # Kept, because a callback must live as long as it may be called.
        self.listener = llama_cpp.llama_log_callback(lambda level, text, data: self.log.append(text.decode()))
        llama_cpp.llama_log_set(self.listener, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise RuntimeError("".join(self.log[-20:]))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 1024, 512, 512, 2
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("".join(self.log[-20:]))
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 2)
        self.length = len(context)
        for sequence in range(2):
            self.decode([(id_, place, sequence) for place, id_ in enumerate(context)])

    def decode(self, tokens: list[tuple[int, int, int]]) -> float:
        """Seconds of a call for tokens (id, position, sequence), with the logits of all of them."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for n, (id_, place, sequence) in enumerate(tokens):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = id_, place, 1, 1
            batch.seq_id[n][0] = sequence
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        elapsed = time.perf_counter() - start
        assert status == 0, (status, self.log[-5:])
        return elapsed

    def call(self, ids: list[int], sequences: int) -> float:
        """Seconds of a call after the context: one id for each sequence, or all for the first. It is forgotten then."""
        tokens = [(id_, self.length + n // sequences, n % sequences) for n, id_ in enumerate(ids)]
        elapsed = self.decode(tokens)
        for sequence in range(2):
            memory = llama_cpp.llama_get_memory(self.context)
            assert llama_cpp.llama_memory_seq_rm(memory, sequence, self.length, -1)
        return elapsed

    def logits(self, row: int) -> str:
        """Those of a row of the last call, float32 in base64."""
        found = llama_cpp.llama_get_logits_ith(self.context, row)
        return base64.b64encode(ctypes.string_at(found, 4 * self.vocabulary)).decode()


def memory() -> dict[str, int]:
    """Bytes in memory: of the process's own, and of mapped files."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {name: 1024 * int(fields[key].split()[0]) for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed does not mix with the answers
    peer: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        kind = asked.pop("do")
        answer: Any = None
        if kind == "load":
            peer = Peer(**asked)
            answer = {
                "version": llama_cpp.__version__,
                "system": llama_cpp.llama_print_system_info().decode(),
                "buffers": [each.strip() for each in peer.log if "buffer size" in each],
            }
        elif kind == "call":
            answer = [peer.call(asked["ids"], asked["sequences"]) for _ in range(asked["calls"])]
        elif kind == "logits":
            answer = peer.logits(asked["row"])
        elif kind == "memory":
            answer = memory()
        elif kind == "cpu":
            answer = time.process_time()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
