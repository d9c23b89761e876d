"""What a run of a language model takes, before it starts: memory of each device, and time, by the number of devices.

Weights, gradients and optimizers are counted from the model's own shapes. What the backward pass keeps is counted by
running one layer at its real size on torch's meta device, which computes shapes and no numbers. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from emu3.configuration import Emu3TextConfig, Emu3VQVAEConfig
from emu3.modeling.text import Emu3DecoderLayer, RotaryEmbedding
from emu3.tokenization import CONTROL_TOKENS
from emu3.training.language import FinetuneRecipe, LanguageRecipe, LoraRecipe, PretrainRecipe
from emu3.training.machine import peak_flops
from emu3.training.objective import LOGITS_AT_ONCE
from emu3.training.state import require_output

RESERVE = 1.1  # for fragments, buffers of communication and what else a device holds
TYPICAL_SHARE = 0.4  # of the peak rate that training reaches on GPUs


@dataclass(frozen=True)
class Need:
    """What a run takes on so many devices.

    Attributes:
        devices: how many share weights and parts of a step.
        state_bytes: of weights, gradients, optimizers and averages, of each device.
        activation_bytes: of what the backward pass keeps, and of logits, of each device.
        seconds_per_step: at the rate that was assumed.
    """

    devices: int
    state_bytes: float
    activation_bytes: float
    seconds_per_step: float

    @property
    def bytes(self) -> float:
        """Of each device, in all."""
        return RESERVE * (self.state_bytes + self.activation_bytes)


@dataclass(frozen=True)
class Plan:
    """The needs of a recipe.

    Attributes:
        weights: of the language model.
        trained: of them, those that are trained.
        tokens_per_step: in all parts.
        flops_per_step: of the forward and backward pass.
        steps: of the recipe.
        flops_per_second: of one device, as assumed.
        needs: one for each number of devices.
    """

    weights: int
    trained: int
    tokens_per_step: int
    flops_per_step: float
    steps: int
    flops_per_second: float
    needs: tuple[Need, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        needs = [asdict(need) | {"bytes": need.bytes} for need in self.needs]
        return asdict(self) | {"needs": needs}

    def to_table(self) -> str:
        """For people."""
        lines = [
            f"{self.weights / 1e9:.3g} G weights, {self.trained / 1e9:.3g} G of them trained; a step is "
            f"{self.tokens_per_step:,} tokens and {self.flops_per_step:.3g} operations; {self.steps:,} steps",
            f"assumed: {self.flops_per_second / 1e12:.3g} T operations a second on each device",
            "",
            "devices   weights and optimizer   activations   in all   tokens/s   a step      the run",
        ]
        for need in self.needs:
            run = need.seconds_per_step * self.steps
            lines.append(
                f"{need.devices:7}{need.state_bytes / 1e9:21.1f} GB{need.activation_bytes / 1e9:11.1f} GB"
                f"{need.bytes / 1e9:6.0f} GB{self.tokens_per_step / need.seconds_per_step:11,.0f}"
                f"{need.seconds_per_step:8.3g} s{plain_time(run):>13}"
            )
        return "\n".join(lines)


def make_plan(
    recipe: LanguageRecipe,
    config: Emu3TextConfig,
    devices: Sequence[int],
    flops_per_second: float | None = None,
    half: bool = True,
) -> Plan:
    """The plan of a recipe for a model of this configuration.

    Args:
        devices: numbers of devices, which should divide the recipe's parts.
        flops_per_second: of one device, as training reaches it; None: a share of what this machine was measured at.
        half: whether products are in bfloat16.
    """
    layer_weights, outer_weights = _weights(config)
    weights = config.num_hidden_layers * layer_weights + outer_weights
    trained = _adapters(recipe, config) if isinstance(recipe, LoraRecipe) else weights
    rate = peak_flops(recipe) * TYPICAL_SHARE if flops_per_second is None else flops_per_second
    tokens = recipe.length * recipe.parts
    # A sample has at most a row; attention to half of what stands before each token.
    attention = 2.0 * config.hidden_size * config.num_hidden_layers * recipe.length**2
    forward = recipe.parts * (2.0 * weights * recipe.length + attention)
    passes = 4 if recipe.recompute_layers else 3
    if isinstance(recipe, LoraRecipe):
        passes -= 1  # no gradients of the frozen matrices
    needs = []
    for count in devices:
        shared = _state_bytes(recipe, weights, trained, half) / count
        if count > 1:  # one layer is whole while it computes, the next one is fetched, and so are embedding and head
            shared += (2 if half else 4) * (2 * layer_weights + outer_weights)
        seconds = forward * passes / (rate * count)
        needs.append(Need(count, shared, _activation_bytes(recipe, config, half), seconds))
    return Plan(weights, trained, tokens, forward * passes, recipe.steps, rate, tuple(needs))


def _weights(config: Emu3TextConfig) -> tuple[int, int]:
    """Of one layer, and of embedding, final norm and head."""
    with torch.device("meta"):
        layer = Emu3DecoderLayer(config, 0)
    outer = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size + config.hidden_size
    return sum(each.numel() for each in layer.parameters()), outer


def _adapters(recipe: LoraRecipe, config: Emu3TextConfig) -> int:
    with torch.device("meta"):
        layer = Emu3DecoderLayer(config, 0)
    sides = [
        module.in_features + module.out_features
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in recipe.modules
    ]
    return config.num_hidden_layers * recipe.rank * sum(sides)


def _state_bytes(recipe: LanguageRecipe, weights: int, trained: int, half: bool) -> float:
    """Weights that are trained in float32 with gradients, moments (one for Muon's matrices) and averages."""
    moments = 1 if recipe.optimizer == "muon" else 2
    of_trained = 4 * trained * (2 + moments + (recipe.average > 0))
    return of_trained + (
        weights * (2 if half else 4) if isinstance(recipe, FinetuneRecipe) and trained < weights else 0
    )


def _activation_bytes(recipe: LanguageRecipe, config: Emu3TextConfig, half: bool) -> float:
    """What the backward pass of one row keeps, in all layers, and the logits of some targets."""
    of_layer = _kept_by_layer(config, recipe.length, torch.bfloat16 if half else torch.float32)
    entry = recipe.length * config.hidden_size * (2 if half else 4)
    layers = config.num_hidden_layers
    kept = layers * entry + of_layer if recipe.recompute_layers else layers * of_layer
    # Logits, their logarithms and their gradient in float32, of as many targets as are held at once.
    return kept + 3 * 4 * min(LOGITS_AT_ONCE, recipe.length * config.vocab_size)


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps: its inputs and its result."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context.save_for_backward(query, key, value, query)
        return query.transpose(1, 2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        raise AssertionError("only what is kept is counted")


def _kept_by_layer(config: Emu3TextConfig, length: int, dtype: torch.dtype) -> float:
    """Bytes that the backward pass of a layer keeps of a row, beside the weights."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no two storages get one address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return _Attention.apply(query, key, value), None

    with torch.device("meta"):
        layer = Emu3DecoderLayer(config, 0).train().to(dtype)
        hidden = torch.empty(1, length, config.hidden_size, dtype=dtype, requires_grad=True)
    weights = {each.untyped_storage()._cdata for each in layer.parameters()}
    one = RotaryEmbedding(config)(torch.empty(0, dtype=dtype), torch.zeros(1, 1, dtype=torch.long))
    places = tuple(each.to("meta").expand(1, length, -1) for each in one)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, position_embeddings=places, attend=attend)
    return float(sum(kept.values()))


def plain_time(seconds: float) -> str:
    """Such as "1.6 hours"."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"


def text_config_of(recipe: LanguageRecipe) -> Emu3TextConfig:
    """Of the model that a recipe trains. Only its settings are read."""
    from emu3.checkpoints import resolve
    from emu3.checkpoints.config import build_config, parts_of
    from emu3.checkpoints.settings import read_config

    if isinstance(recipe, FinetuneRecipe):
        folder = resolve(recipe.checkpoint)
        return parts_of(build_config(read_config(folder), folder / "config.json"))[0]
    assert isinstance(recipe, PretrainRecipe), recipe
    vision = Emu3VQVAEConfig.from_pretrained(require_output(recipe.vision))
    if recipe.tokenizer is None:
        entries = recipe.text_entries + len(CONTROL_TOKENS) + vision.codebook_size
    else:
        entries = len(AutoTokenizer.from_pretrained(recipe.tokenizer.resolve()))
    return Emu3TextConfig(**recipe.model, vocab_size=entries, pad_token_id=0)
