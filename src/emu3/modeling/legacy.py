"""The names of the weights that transformers 4 saved. No torch here: it is not needed to look at a checkpoint."""

LEGACY_PREFIXES = {
    "text_model.model.": "model.text_model.",
    "text_model.lm_head.": "lm_head.",
    "vqmodel.": "model.vqmodel.",
}
"""How a weight's name begins in the legacy layout -> in the documented one."""


def documented_name(name: str) -> str:
    """A weight's name in the documented layout, from either."""
    for legacy, documented in LEGACY_PREFIXES.items():
        if name.startswith(legacy):
            return documented + name.removeprefix(legacy)
    return name


def legacy_name(name: str) -> str:
    """A weight's name in the legacy layout, from the documented one."""
    for legacy, documented in LEGACY_PREFIXES.items():
        if name.startswith(documented):
            return legacy + name.removeprefix(documented)
    return name
