"""How well a checkpoint draws, answers and reconstructs."""
