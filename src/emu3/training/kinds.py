"""The kinds of recipe, for people's own data."""

from emu3.training.assemble import AssembleRecipe, assemble
from emu3.training.language import FinetuneRecipe, LoraRecipe, PretrainRecipe, finetune, lora, pretrain
from emu3.training.preference import PreferenceRecipe, prefer
from emu3.training.recipe import Kind
from emu3.training.tokenizer import VisionRecipe, train_vision

KINDS = {
    "pretrain": Kind(PretrainRecipe, pretrain),
    "finetune": Kind(FinetuneRecipe, finetune),
    "lora": Kind(LoraRecipe, lora),
    "vision": Kind(VisionRecipe, train_vision),
    "preference": Kind(PreferenceRecipe, prefer),
    "checkpoint": Kind(AssembleRecipe, assemble),
}
