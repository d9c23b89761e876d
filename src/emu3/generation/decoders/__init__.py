"""Ways to decide the tokens of an answer."""
