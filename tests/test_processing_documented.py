"""The processor as the documentation describes it: its parts, its prompts, and what it makes of outputs."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor as PeerImageProcessor
from transformers.models.emu3.processing_emu3 import Emu3Processor as PeerProcessor

from emu3.image_processing import Emu3ImageProcessor
from emu3.processing import CHAT_TEMPLATE, Emu3Processor
from emu3.tokenization import train_tokenizer

TOKENIZER = train_tokenizer(["You are a helpful assistant. USER: a red car. ASSISTANT: it is red."] * 4, 290, 16)
LIMITS = {"min_pixels": 16 * 16, "max_pixels": 32 * 32}
PROCESSOR = Emu3Processor(image_processor=Emu3ImageProcessor(**LIMITS), tokenizer=TOKENIZER)
PEER = PeerProcessor(PeerImageProcessor(**LIMITS), TOKENIZER, chat_template=CHAT_TEMPLATE)
WIDE, TALL, SQUARE = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(16, 24), (32, 16), (16, 16)])
)


def turn(role, *parts):
    """A message; a string in it is text, anything else a picture."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else picture(part) for part in parts]
    return {"role": role, "content": content}


def picture(image):
    return {"type": "image", "image": image}


CONVERSATIONS = {
    "before the words": [turn("user", WIDE, "What is it?")],
    "behind the words": [turn("user", "What is it?", WIDE)],
    "between words": [turn("user", "Is", WIDE, "like", TALL, "?")],
    "one behind the other": [turn("user", WIDE, TALL, SQUARE, "Which?")],
    "in the system's message": [turn("system", "Style:", SQUARE), turn("user", "Draw.")],
    "in an answer": [turn("user", "Show me."), turn("assistant", "Here:", TALL), turn("user", "And now?")],
    "in a later turn": [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", SQUARE, "And this?")],
    "in every turn": [
        turn("system", WIDE),
        turn("user", TALL, "a"),
        turn("assistant", SQUARE),
        turn("user", "b", WIDE),
    ],
    "nowhere": [turn("user", "What is it?")],
}


def pictures_of(conversation):
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def assert_same(ours, peer):
    assert ours.keys() == peer.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], torch.as_tensor(peer[name]), rtol=0, atol=1e-6)


def test_parts():
    processor = Emu3Processor(PROCESSOR.image_processor, TOKENIZER, chat_template="{{ messages[0]['content'] }}")
    assert processor.image_processor is PROCESSOR.image_processor
    assert processor.tokenizer is TOKENIZER
    assert processor.chat_template == "{{ messages[0]['content'] }}"
    assert PROCESSOR.chat_template == CHAT_TEMPLATE


def test_kwargs():
    """Further arguments are those of every processor, and a mistyped one is named."""
    processor = Emu3Processor(PROCESSOR.image_processor, TOKENIZER, None, image_area=64 * 64)
    assert processor(text="a", return_for_image_generation=True)["image_sizes"] == [[8, 8]]
    with pytest.raises(TypeError, match="chat_tenplate"):
        Emu3Processor(PROCESSOR.image_processor, TOKENIZER, chat_tenplate="")


@pytest.mark.parametrize("where", CONVERSATIONS)
def test_chat_template_with_pictures_anywhere(where):
    conversation = CONVERSATIONS[where]
    images = pictures_of(conversation) or None
    prompt = PROCESSOR.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt.count("<image>") == len(images or [])
    assert prompt.endswith(" ASSISTANT:")
    rendered = PROCESSOR(images=images, text=[prompt], return_tensors="pt")
    assert_same(rendered, PEER(images=images, text=[prompt], return_tensors="pt"))
    for plain in (False, True):
        tokenized = PROCESSOR.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            split_special_tokens=plain,
        )
        assert_same(tokenized, rendered)


def test_conversation_of_the_page():
    """A picture may be named without being given."""
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Please describe the image."}]},
    ]
    assert PROCESSOR.apply_chat_template(conversation, add_generation_prompt=True) == (
        "You are a helpful assistant. USER: <image>Please describe the image.. ASSISTANT:"
    )


def test_ratio_and_image_area_of_each_sample():
    ratios, areas = ["1:1", "2:1", "1:2"], [64 * 64, 128 * 64, 64 * 128]
    together = PROCESSOR(
        text=["a red car"] * 3, return_for_image_generation=True, ratio=ratios, image_area=areas, padding=True
    )
    assert together["image_sizes"] == [[8, 8], [8, 16], [16, 8]]
    for index, (ratio, area) in enumerate(zip(ratios, areas, strict=True)):
        arguments = {"return_for_image_generation": True, "ratio": ratio, "image_area": area}
        peer = PEER(text=["a red car"], **arguments)
        mask = together["attention_mask"][index]
        ids = [token for token, seen in zip(together["input_ids"][index], mask, strict=True) if seen]
        assert ids == peer["input_ids"][0]
        assert together["image_sizes"][index] == list(peer["image_sizes"][0])


def test_batches_are_padded_on_the_left():
    """As the page advises; the side is a setting of the tokenizer."""
    assert PROCESSOR.tokenizer.padding_side == "left"
    texts = ["a", "a red car and a red car"]
    masks = PROCESSOR(text=texts, padding=True, return_tensors="np")["attention_mask"]
    assert masks[0, 0] == 0
    assert masks[0, -1] == 1
    tokenizer = train_tokenizer(["a red car"], 256, 4)
    tokenizer.padding_side = "right"
    right = Emu3Processor(PROCESSOR.image_processor, tokenizer)
    masks = right(text=texts, padding=True, return_tensors="np")["attention_mask"]
    assert masks[0, 0] == 1
    assert masks[0, -1] == 0


def test_to_moves_pixels_to_a_dtype_and_leaves_ids_whole():
    inputs = PROCESSOR(images=WIDE, text="<image>", return_tensors="pt")
    for moved in (inputs.to("cpu", dtype=torch.bfloat16), inputs.to("cpu", torch.bfloat16)):
        assert moved["pixel_values"].dtype == torch.bfloat16
        assert moved["input_ids"].dtype == moved["image_sizes"].dtype == torch.int64


@pytest.mark.parametrize("skip", [True, False])
def test_decode_and_batch_decode(skip):
    ids = PROCESSOR(text=["a red car", "it is red"])["input_ids"]
    spelled = ["a red car", "it is red"] if skip else ["<|extra_203|>a red car", "<|extra_203|>it is red"]
    for processor in (PROCESSOR, PEER):
        assert processor.batch_decode(ids, skip_special_tokens=skip) == spelled
        assert [processor.decode(row, skip_special_tokens=skip) for row in ids] == spelled
    assert PROCESSOR.decode(torch.tensor(ids[0]), skip_special_tokens=skip) == spelled[0]


def test_post_process_multimodal_output():
    ids = torch.tensor(PROCESSOR(text=["a red car", "a red car"])["input_ids"])
    pixels = PROCESSOR(images=[WIDE, WIDE], text="<image><image>", return_tensors="pt")["pixel_values"]
    for processor in (PROCESSOR, PEER):
        for mode in (None, "text"):
            assert processor.post_process_multimodal_output(ids, generation_mode=mode) == ["a red car"] * 2
        spelled = processor.post_process_multimodal_output(ids, skip_special_tokens=False)
        assert spelled == ["<|extra_203|>a red car"] * 2
        images = processor.post_process_multimodal_output(list(pixels), generation_mode="image")
        assert len(images) == 2
        for image in images:
            difference = np.array(image).astype(int) - np.array(WIDE)
            assert np.abs(difference).max() <= 1  # transformers cuts off where we round
        with pytest.raises(ValueError, match="audio"):
            processor.post_process_multimodal_output(ids, generation_mode="audio")
