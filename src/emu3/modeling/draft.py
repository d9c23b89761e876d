"""A draft head: what a picture's next tokens probably are, for far less than a forward of the model.

A forward leaves a hidden state that knows all but the token that it decided. The head takes that state, and for each
position ahead the tokens around it, which may be guesses themselves:

    .  .  a  .  .         a  two rows above
    .  b  c  d  e         b to e  in the row above
    f  g  ?               f, g  to the left; and the token that was decided last, wherever it stands

It gives a vector, and the model's own output head the distribution. Rows that stand side by side do not wait for each
other: guess all of them, then again with the new guesses around them, and a few passes settle.

What comes out is a draft only. Decoders that take one verify it, so a bad head costs time and nothing else.

Shapes: R rows, one for each position ahead, N tokens around it, M width of the head, E of the model, V codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emu3.modeling.text import RMSNorm
from emu3.options import check_whole

if TYPE_CHECKING:
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration

AROUND = ((2, 0), (1, 1), (1, 0), (1, -1), (1, -2), (0, 2), (0, 1))
"""The tokens around a position: so many rows above, so many columns to the left."""

# In a folder of its own: readers of a checkpoint take every *.safetensors file beside config.json for its weights.
_FILE = Path("draft") / "head.safetensors"
_KEY = "emu3_draft"


class DraftHead(nn.Module):
    """Two small layers on the model's last hidden state.

    Args:
        hidden_size: E.
        width: M.
        ahead: from so many positions ahead on, how far it is makes no difference to the head.

    Raises:
        ValueError: one of these is no whole number from 1.
    """

    def __init__(self, hidden_size: int, width: int = 256, ahead: int = 16) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("width", width), ("ahead", ahead)):
            check_whole(name, size)
        self.hidden_size, self.width, self.ahead = hidden_size, width, ahead
        count = len(AROUND) + 1  # and the token that was decided last
        self.hidden = nn.Linear(hidden_size, width, bias=False)
        self.around = nn.ModuleList(nn.Linear(hidden_size, width, bias=False) for _ in range(count))
        self.edge = nn.Parameter(torch.zeros(count, width))  # in place of what is no code, such as the end of a row
        self.distance = nn.Embedding(ahead, width)
        self.middle = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.norm = RMSNorm(hidden_size, 1e-5)
        nn.init.zeros_(self.distance.weight)

    def table(self, embeddings_VE: Tensor) -> Tensor:
        """What each code adds at each of the N places, (N * (V + 1), M); code V is the edge.

        To look up is cheaper than to multiply, and the same codes come again and again.
        """
        embeddings_VE = F.rms_norm(embeddings_VE.to(self.edge.dtype), embeddings_VE.shape[-1:])
        parts = [
            torch.cat((linear(embeddings_VE), edge[None])) for linear, edge in zip(self.around, self.edge, strict=True)
        ]
        return torch.cat(parts)

    def prepare(self, hidden_RE: Tensor, distance_R: Tensor) -> Tensor:
        """What does not depend on the tokens around: (R, M). `distance_R` counts from 1."""
        distance_R = distance_R.clamp(1, self.ahead) - 1
        hidden_RE = F.rms_norm(hidden_RE.to(self.edge.dtype), hidden_RE.shape[-1:])
        prepared_RM: Tensor = self.hidden(hidden_RE) + self.distance(distance_R)
        return prepared_RM

    def forward(self, prepared: Tensor, codes: Tensor, table: Tensor) -> Tensor:
        """Vectors (R, E) for the model's output head.

        Args:
            prepared: of `prepare`, (R, M).
            codes: around each position, (R, N); V for what is no code.
            table: of `table`.
        """
        count = codes.shape[1]
        starts = torch.arange(count, device=codes.device) * (len(table) // count)
        x = F.silu(prepared + F.embedding_bag(codes + starts, table, mode="sum"))
        x = x + F.silu(self.middle(x))
        vectors: Tensor = self.norm(self.output(x))
        return vectors

    def save(self, folder: Path) -> None:
        """Write it into the folder of the checkpoint that it belongs to, in float16."""
        file = folder / _FILE
        file.parent.mkdir(exist_ok=True)
        sizes = {"hidden_size": self.hidden_size, "width": self.width, "ahead": self.ahead}
        tensors = {name: tensor.to("cpu", torch.float16) for name, tensor in self.state_dict().items()}
        save_file(tensors, file, metadata={_KEY: json.dumps(sizes)})


def around(width: int, positions_R: Tensor, newest_R: Tensor) -> Tensor:
    """The positions (R, N) of the tokens around, in a picture of rows of so many codes; below 0 there is none."""
    steps = [rows * (width + 1) + columns for rows, columns in AROUND]
    places_RN = positions_R[:, None] - torch.tensor(steps, device=positions_R.device)
    return torch.cat((places_RN, newest_R[:, None]), 1)


def load_draft(folder: Path, model: Emu3ForConditionalGeneration) -> DraftHead | None:
    """The draft head of a checkpoint, on the device of its model; None if the folder holds none.

    Raises:
        ValueError: the file is damaged, or the head is not of such a model.
    """
    file, embeddings = folder / _FILE, model.model.text_model.embed_tokens.weight
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            sizes = json.loads((opened.metadata() or {})[_KEY])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        draft = DraftHead(**sizes)
        draft.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged or holds no draft head ({error}); get it again or delete it") from error
    width = embeddings.shape[1]
    if draft.hidden_size != width:
        raise ValueError(
            f"{file} is for a model {draft.hidden_size} wide, this one is {width}; train one, or delete it"
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{file} holds NaN or infinite weights; get it again or delete it")
    dtype = torch.float32 if embeddings.device.type == "cpu" else embeddings.dtype
    return draft.to(embeddings.device, dtype).eval().requires_grad_(False)
