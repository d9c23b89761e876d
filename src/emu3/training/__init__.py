"""Training of a vision tokenizer and of a language model, on any source of pictures and sequences."""
