"""The icon world: captioned scenes drawn by code, unlimited in number and exactly known."""

from emu3.data.captions import Question, caption, full_caption, questions
from emu3.data.prompts import EvaluationPrompt, RequiredObject, Requirement, evaluation_prompts, requirement
from emu3.data.scenes import (
    BACKGROUNDS,
    COLORS,
    TASKS,
    Relation,
    Scene,
    SceneObject,
    Split,
    Task,
    contains_held_out,
    relation,
    render,
    sample_scene,
)
from emu3.data.splits import is_held_out, is_held_out_pair
from emu3.data.sprites import ICON, NOUNS, mask, plural

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "ICON",
    "NOUNS",
    "TASKS",
    "EvaluationPrompt",
    "Question",
    "Relation",
    "RequiredObject",
    "Requirement",
    "Scene",
    "SceneObject",
    "Split",
    "Task",
    "caption",
    "contains_held_out",
    "evaluation_prompts",
    "full_caption",
    "is_held_out",
    "is_held_out_pair",
    "mask",
    "plural",
    "questions",
    "relation",
    "render",
    "requirement",
    "sample_scene",
]
