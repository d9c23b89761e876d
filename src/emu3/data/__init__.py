"""People's pictures, clips and conversations: read from where they lie, tokenized, kept as shards for training."""
