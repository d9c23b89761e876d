"""How likely a picture's ids are, by one forward over all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emu3.generation.request import Request
from emu3.generation.runtime.head import Head
from emu3.generation.sampling import probabilities


@torch.inference_mode()
def probabilities_of(model: Any, request: Request, ids: Sequence[int]) -> NDArray[np.float32]:
    """The probability of each id, given all before it and as the request samples; 1 where the grammar forces it.

    `model` is an `Emu3ForConditionalGeneration`.
    """
    grammar, head = request.grammar, Head(model.lm_head)
    lo, hi = (np.broadcast_to(bound, len(ids)) for bound in grammar.span(np.arange(len(ids))))
    states = []
    for prompt in request.prompts:
        ids_BS = torch.tensor([[*prompt, *ids[:-1]]], device=head.device)
        hidden_BSE = model.model.text_model(input_ids=ids_BS, use_cache=False).last_hidden_state
        states.append(hidden_BSE[0, len(prompt) - 1 :])
    found = np.ones(len(ids), dtype=np.float32)
    sampling = request.sampling_of(grammar.kind)
    for k in (hi > lo + 1).nonzero()[0].tolist():  # one by one, because the logits of all would take much memory
        logits_BV = head.logits(torch.stack([state[k] for state in states]), (int(lo[k]), int(hi[k])))
        guide = request.guide_of(request.guidance_at(grammar, k))
        guided_BV = logits_BV[:1]
        if guide is not None:
            guided_BV, left_out_BV = guide.logits(guided_BV, logits_BV[1:])
            if left_out_BV is not None:
                guided_BV[left_out_BV] = -torch.inf
        found[k] = probabilities(guided_BV, sampling)[0, ids[k] - int(lo[k])]
    return found
