"""Ids of structure and visual tokens."""

import numpy as np
import pytest
import torch

from emu3.vocabulary import EMU3, SURFACES, Vocabulary

STRUCTURE = {surface: number for number, surface in enumerate(SURFACES.values())}


def visual(ids):
    return {f"<|visual token {code:06d}|>": id_ for code, id_ in enumerate(ids)}


SCATTERED = Vocabulary.from_map(STRUCTURE | visual([22, 20, 23, 21]))


def test_documented_ids():
    assert (EMU3.boi, EMU3.img, EMU3.eoi) == (151852, 151851, 151853)
    assert (EMU3.eol, EMU3.eof) == (151646 + 200, 151646 + 201)
    assert (EMU3.bos, EMU3.eos, EMU3.pad) == (151646 + 203, 151646 + 204, 151643)
    assert EMU3.visual_span == (151854, 184622)


def test_from_map_reads_roles_from_their_surfaces():
    roles = {role: 100 + n for n, role in enumerate(SURFACES)}
    built = Vocabulary.from_map({SURFACES[role]: id_ for role, id_ in roles.items()} | visual(range(7, 12)) | {"a": 0})
    assert built == Vocabulary(**roles, visual_base=7, codebook_size=5)


@pytest.mark.parametrize("vocabulary", [EMU3, SCATTERED], ids=["arithmetic", "table"])
def test_codes_survive_the_round_trip_in_every_container(vocabulary):
    last = vocabulary.codebook_size - 1
    first_id, last_id = vocabulary.ids_of(0), vocabulary.ids_of(last)
    assert vocabulary.codes_of(first_id) == 0
    assert vocabulary.codes_of(last_id) == last
    codes = [[0, last], [last, 1]]
    expected = [[first_id, last_id], [last_id, vocabulary.ids_of(1)]]
    array = vocabulary.ids_of(np.array(codes, dtype=np.uint16))
    tensor = vocabulary.ids_of(torch.tensor(codes, dtype=torch.int32))
    assert array.tolist() == tensor.tolist() == expected
    assert vocabulary.codes_of(array).tolist() == vocabulary.codes_of(tensor).tolist() == codes


def test_scattered_ids_come_from_the_table():
    assert SCATTERED.table == (22, 20, 23, 21)
    assert SCATTERED.visual_span == (20, 24)
    assert SCATTERED.ids_of(torch.tensor([3, 2, 1, 0])).tolist() == [21, 23, 20, 22]


@pytest.mark.parametrize("vocabulary", [EMU3, SCATTERED], ids=["arithmetic", "table"])
@pytest.mark.parametrize("wrap", [int, lambda n: np.array([n]), lambda n: torch.tensor([n])])
def test_values_outside_are_refused(vocabulary, wrap):
    lo, hi = vocabulary.visual_span
    for id_ in (lo - 1, hi, 0):
        with pytest.raises(ValueError, match="visual token"):
            vocabulary.codes_of(wrap(id_))
    for code in (-1, vocabulary.codebook_size):
        with pytest.raises(ValueError, match="codes must be in"):
            vocabulary.ids_of(wrap(code))


def test_gaps_between_visual_ids():
    gapped = Vocabulary.from_map(STRUCTURE | visual([20, 21, 30]))
    assert gapped.codes_of(30) == 2
    with pytest.raises(ValueError, match="not all of"):
        gapped.codes_of(25)
    with pytest.raises(ValueError, match="gaps between 20 and 30"):
        _ = gapped.visual_span


def test_a_missing_token_is_named_when_it_is_needed():
    partial = Vocabulary.from_map({k: v for k, v in STRUCTURE.items() if k != "<|extra_200|>"} | visual([20]))
    assert (partial.eof, partial.visual_span) == (STRUCTURE["<|extra_201|>"], (20, 21))
    with pytest.raises(ValueError, match=r"no <\|extra_200\|> \(eol\)"):
        _ = partial.eol
    textual = Vocabulary.from_map(STRUCTURE)
    assert textual.bos == STRUCTURE["<|extra_203|>"]
    with pytest.raises(ValueError, match="no visual tokens"):
        _ = textual.visual_span
    for ask in (textual.ids_of, textual.codes_of):
        with pytest.raises(ValueError, match=r"codes must|visual tokens are"):
            ask(0)
    with pytest.raises(ValueError, match=r"\['begin'\] are no control tokens"):
        Vocabulary(visual_base=0, codebook_size=1, begin=3)


def test_any_set_of_codes_in_any_spelling():
    """Codes 5 to 7 and 9, with and without a space, five digits, and a surface that is no visual token."""
    names = ["<|visual token000005|>", "<|visual token 000006|>", "<|visual token 00007|>", "<|visual token000009|>"]
    mixed = Vocabulary.from_map({name: 30 + n for n, name in enumerate(names)} | {"<|visual tokens|>": 2})
    assert mixed.visual_span == (30, 34)
    assert mixed.ids_of(np.array([5, 6, 7, 9])).tolist() == [30, 31, 32, 33]
    assert mixed.codes_of(torch.tensor([33, 30])).tolist() == [9, 5]
    for missing in (0, 8):
        with pytest.raises(ValueError, match="no visual token for some of the codes"):
            mixed.ids_of(missing)
