"""Training: two recipes, one for the vision tokenizer and one for the language model."""

from emu3.training.recipe import run_recipe

__all__ = ["run_recipe"]
