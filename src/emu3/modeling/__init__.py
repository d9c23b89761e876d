"""The networks: the language model, the vision tokenizer, and both as one model."""
