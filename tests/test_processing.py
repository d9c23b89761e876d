import base64
import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor as PeerImageProcessor
from transformers.models.emu3.processing_emu3 import Emu3Processor as PeerProcessor

from emu3.chat import CHAT_TEMPLATE
from emu3.image_processing import Emu3ImageProcessor
from emu3.processing import Emu3Processor, generation_size
from emu3.tokenization import CONTROL_TOKENS, encode_plain, train_tokenizer, visual_token

TEXTS = ["You are a helpful assistant. USER: a photo of a red car. ASSISTANT:", "What colour is the cat? It is red."]
TOKENIZER = train_tokenizer(TEXTS * 4, 300, 16)
SMALL = {"min_pixels": 16 * 16, "max_pixels": 32 * 32}
PROCESSOR = Emu3Processor(Emu3ImageProcessor(**SMALL), TOKENIZER)
PEER = PeerProcessor(PeerImageProcessor(**SMALL), TOKENIZER, chat_template=CHAT_TEMPLATE)
WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
TALL = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 16, 3), dtype=np.uint8))

SURFACES = [*CONTROL_TOKENS.values(), visual_token(3), "<", ">", "<|visual token 99|>"]
TYPED = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SURFACES)), max_size=6).map("".join)


def spelled(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def picture(height, width):
    placeholders = "<image>" * (height * (width + 1))
    return f"<|image start|>{height}*{width}<|image token|>{placeholders}<|extra_201|><|image end|>"


def assert_equals_peer(text, **kwargs):
    ours = PROCESSOR(text=text, return_tensors="pt", **kwargs)
    peer = PEER(text=text, return_tensors="pt", **kwargs)
    assert ours.keys() == peer.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], torch.as_tensor(peer[key]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("a photo of a red car", None),
        (["a red car", "What colour is the cat?\n\n12*12 </b>'S"], None),
        ("What do you see?<image>", WIDE),
        ("<image> and <image>?", [WIDE, TALL]),
        (["<image>a", "What colour is <image> than <image>?"], [TALL, WIDE, TALL]),
        (["a<image>", "no picture here"], [[WIDE], []]),
        ("typed <|image start|>9*9<|visual token 000003|> stays", None),
    ],
)
def test_prompts_equal_transformers(text, images):
    assert_equals_peer(text, images=images, padding=True)


@pytest.mark.parametrize("ratio", ["1:1", "4:3", "16:9", "2:3"])
@pytest.mark.parametrize("area", [518400, 262144, 4096])
def test_generation_prompts_equal_transformers(ratio, area):
    options = {"return_for_image_generation": True, "ratio": ratio, "image_area": area, "padding": True}
    assert_equals_peer(["a red car", "What colour is the cat?"], **options)


@settings(max_examples=50, deadline=None)
@given(TYPED)
def test_control_tokens_are_found_where_the_tokenizer_finds_them(text):
    text = text.replace("<image>", "")
    ids = PROCESSOR(text=text, add_special_tokens=False)["input_ids"][0]
    assert ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_padding_is_on_the_left_and_masked():
    output = PROCESSOR(text=["a", "a red car and a cat"], padding=True, return_tensors="np")
    lengths = [len(encode_plain(TOKENIZER, text)) + 1 for text in ("a", "a red car and a cat")]
    assert output["attention_mask"].sum(axis=1).tolist() == lengths
    row, mask = output["input_ids"][0], output["attention_mask"][0]
    assert set(row[mask == 0]) == {TOKENIZER.pad_token_id}
    assert row[mask == 1][0] == TOKENIZER.bos_token_id
    assert mask.tolist() == sorted(mask.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "longest", "padding_side": "right"},
        {"padding": "max_length", "max_length": 40},
        {"padding": True, "pad_to_multiple_of": 32},
        {"padding": False},
        {"padding": True, "truncation": True, "max_length": 6},
        {"padding": "max_length", "truncation": True, "max_length": 6},
    ],
)
def test_padding_options_equal_transformers(options):
    ours, peer = (side(text=["a", "a red car and a cat"], **options) for side in (PROCESSOR, PEER))
    assert ours["input_ids"] == peer["input_ids"]
    assert ours["attention_mask"] == peer["attention_mask"]


def test_what_is_too_long_is_cut_but_no_picture_is():
    whole = PROCESSOR(images=WIDE, text="<image> and a car")["input_ids"][0]
    end = whole.index(TOKENIZER.eoi_token_id) + 1
    for length in (end, end + 1, len(whole), len(whole) + 9):
        cut = PROCESSOR(images=WIDE, text="<image> and a car", truncation=True, max_length=length)["input_ids"][0]
        assert cut == whole[:length]
    for length in (0, 1, end - 1):
        with pytest.raises(ValueError, match=rf"{len(whole)} tokens cannot be cut to {length}: a picture"):
            PROCESSOR(images=WIDE, text="<image> and a car", truncation=True, max_length=length)
    for options, named in (
        ({"truncation": True}, "need max_length"),
        ({"truncation": "only_last", "max_length": 9}, "only_last"),
        ({"truncation": True, "max_length": -1}, "cut to -1"),
    ):
        with pytest.raises(ValueError, match=named):
            PROCESSOR(text="a", **options)
    assert PROCESSOR(text="a red car", truncation="do_not_truncate", max_length=1) == PROCESSOR(text="a red car")


def test_where_a_picture_begins_is_never_cut():
    options = {"return_for_image_generation": True, "image_area": 64 * 64}
    begin = PROCESSOR(text="", **options)["input_ids"][0][1:]
    (row,) = PROCESSOR(text="a red car and a cat", **options, truncation=True, max_length=len(begin) + 2)["input_ids"]
    assert row == [*PROCESSOR(text="a red car and a cat")["input_ids"][0][:2], *begin]
    with pytest.raises(ValueError, match="no text be left"):
        PROCESSOR(text="a", **options, truncation=True, max_length=len(begin))


def test_one_bos_for_each_sample():
    bos = CONTROL_TOKENS["bos_token"]
    outputs = PROCESSOR(text=["<image><image>", bos + "a", ""], images=[WIDE, WIDE])["input_ids"]
    assert [row.count(TOKENIZER.bos_token_id) for row in outputs] == [1, 1, 1]
    assert all(row[0] == TOKENIZER.bos_token_id for row in outputs)
    assert TOKENIZER.bos_token_id not in PROCESSOR(text="a", add_special_tokens=False)["input_ids"][0]


def test_sizes_follow_the_image_processors_factor():
    processor = Emu3Processor(Emu3ImageProcessor(**SMALL, spatial_factor=4), TOKENIZER)
    output = processor(images=WIDE, text="<image>")
    assert spelled(output["input_ids"][0]) == "<|extra_203|>" + picture(4, 6)
    drawing = processor(text="a", return_for_image_generation=True, image_area=48 * 48)
    assert drawing["image_sizes"] == [[12, 12]]
    assert spelled(drawing["input_ids"][0]) == "<|extra_203|>a<|image start|>12*12<|image token|>"


def test_every_sample_has_its_own_size():
    output = PROCESSOR(
        text=["a", "a"], return_for_image_generation=True, ratio=["1:1", "2:1"], image_area=[64 * 64, 128 * 64]
    )
    assert output["image_sizes"] == [[8, 8], [8, 16]]
    assert [spelled(row) for row in output["input_ids"]] == [
        f"<|extra_203|>a<|image start|>{size}<|image token|>" for size in ("8*8", "8*16")
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]))
def test_generation_size_hits_pixels_exactly(height, width, factor):
    pixel_height, pixel_width = factor * height, factor * width
    size = generation_size(f"{pixel_width}:{pixel_height}", pixel_height * pixel_width, factor)
    assert size == (height, width)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(64 * 64, 2048 * 2048))
def test_generation_size_keeps_ratio_and_area(width, height, area):
    ratio = f"{width}:{height}"
    size = generation_size(ratio, area, 8)
    assert size == PEER.calculate_generate_size(ratio, area, 8) == PROCESSOR.calculate_generate_size(ratio, area, 8)
    # Each side is its exact length to half a token.
    exact_height = (area * height / width) ** 0.5 / 8
    exact_width = (area * width / height) ** 0.5 / 8
    assert abs(size[0] - exact_height) <= 0.5 + 1e-9
    assert abs(size[1] - exact_width) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("ratio", "area", "named"),
    [("16x9", 4096, "16x9"), ("0:1", 4096, "0:1"), ("1:-1", 4096, "1:-1"), ("1:1", 0, "image_area=0"),
     ("1:1", 9, "0x0 tokens"), ("400:1", 4096, "0x160 tokens")],
)  # fmt: skip
def test_impossible_sizes_are_refused(ratio, area, named):
    with pytest.raises(ValueError, match=named):
        generation_size(ratio, area, 8)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"text": "<image><image>", "images": WIDE}, "1 pictures for 2"),
        ({"text": "<image>", "images": [WIDE, WIDE]}, "2 pictures for 1"),
        ({"text": "<image>"}, "0 pictures for 1"),
        ({"text": ["<image>", "<image>"], "images": [[WIDE, WIDE], []]}, r"\[2, 0\] for \[1, 1\]"),
        ({"text": "<image>", "images": WIDE, "split_special_tokens": True}, "1 pictures for 0"),
        ({"text": "a", "images": WIDE, "return_for_image_generation": True}, "exclude"),
        ({"text": ["a", "b"], "return_for_image_generation": True, "ratio": ["1:1"]}, "ratio lists 1 values for 2"),
        ({"text": "a", "return_for_image_generation": True, "image_area": [1, 2]}, "image_area lists 2"),
        ({}, "text=None"),
        ({"text": "a", "padding": True, "text_kwargs": {"padding": False}}, "two times"),
        ({"text": "a", "split_special_tokens": True, "return_offsets_mapping": True}, "return_offsets_mapping cannot"),
        ({"text": []}, "no prompt"),
        ({"text": [["a"]]}, "no prompt"),
        ({"text": "a", "padding": "shortest"}, "shortest"),
        ({"text": "a", "padding": "max_length"}, "max_length"),
    ],
)
def test_mistakes_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        PROCESSOR(**call)


def test_image_options_reach_the_image_processor():
    output = PROCESSOR(images=WIDE, text="<image>", images_kwargs={"do_rescale": False, "do_normalize": False})
    np.testing.assert_array_equal(output["pixel_values"][0].transpose(1, 2, 0), np.array(WIDE))


@settings(max_examples=50, deadline=None)
@given(TYPED)
def test_plain_prompts_hold_no_control_token_but_their_own(text):
    (ids,) = PROCESSOR(text=text, split_special_tokens=True, return_for_image_generation=True)["input_ids"]
    suffix = [TOKENIZER.boi_token_id, *encode_plain(TOKENIZER, "90*90"), TOKENIZER.image_wrapper_token_id]
    assert ids == [TOKENIZER.bos_token_id, *encode_plain(TOKENIZER, text), *suffix]


def said(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def shown(image):
    return {"type": "image", "image": image}


def chat(conversation, **kwargs):
    return PROCESSOR.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
    )


def test_chat_template_as_text():
    ask = [said("user", {"type": "image"}, "What is it?")]
    rendered = PROCESSOR.apply_chat_template(ask, add_generation_prompt=True)
    assert rendered == "You are a helpful assistant. USER: <image>What is it?. ASSISTANT:"
    talk = [said("system", "Be brief."), *ask, {"role": "assistant", "content": "A cat"}, said("user", "Sure?")]
    assert PROCESSOR.apply_chat_template(talk) == (
        "Be brief. USER: <image>What is it?. ASSISTANT: A cat<|extra_204|> USER: Sure?."
    )
    assert PROCESSOR.apply_chat_template([ask, talk[:1]]) == [rendered.removesuffix(" ASSISTANT:"), "Be brief."]


@pytest.mark.parametrize("plain", [False, True])
def test_tokenized_chat_equals_the_rendered_prompt(plain):
    conversation = [said("user", "a photo: ", shown(WIDE), shown(TALL), " what?")]
    prompt = "You are a helpful assistant. USER: a photo: <image><image> what?. ASSISTANT:"
    ours = chat(conversation, split_special_tokens=plain, return_tensors="pt")
    expected = PEER(images=[WIDE, TALL], text=prompt, return_tensors="pt")
    assert ours.keys() == expected.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=1e-6)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same picture in a file, at an address of this machine, and in base64."""
    folder = tmp_path_factory.mktemp("pictures")
    WIDE.save(folder / "wide.png")
    encoded = base64.b64encode((folder / "wide.png").read_bytes()).decode()
    handler = partial(QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/wide.png"
        yield {
            "path": str(folder / "wide.png"),
            "url": address,
            "base64": encoded,
            "image": f"data:image/png;base64,{encoded}",
        }
        server.shutdown()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("key", ["path", "url", "base64", "image"])
def test_pictures_by_where_they_lie(places, key, plain):
    expected = chat([said("user", shown(WIDE), "what?")], return_tensors="pt")
    found = chat(
        [said("user", {"type": "image", key: places[key]}, "what?")], split_special_tokens=plain, return_tensors="pt"
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    direct = PROCESSOR(images=places[key], text="<image>", return_tensors="pt")
    assert torch.equal(direct["pixel_values"], expected["pixel_values"])


def test_parts_of_openais_interface():
    buffer = io.BytesIO()
    WIDE.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    expected = chat([said("user", shown(WIDE), "what?")])
    for address in (url, {"url": url}):
        talk = [said("user", {"type": "image_url", "image_url": address}, "what?")]
        for plain in (False, True):
            assert chat(talk, split_special_tokens=plain)["input_ids"] == expected["input_ids"]


def test_arguments_of_transformers_for_text_and_pictures():
    """Flat, nested and common ones, against the peer; what they do is in its own documentation."""
    for options in (
        {"do_resize": False, "do_rescale": False},
        {"images_kwargs": {"do_normalize": False}, "text_kwargs": {"padding": "max_length", "max_length": 60}},
        {"common_kwargs": {"return_tensors": "pt"}, "padding": True},
        {"return_mm_token_type_ids": True, "return_attention_mask": False},
        {"return_length": True, "return_special_tokens_mask": True, "return_offsets_mapping": True},
        {"return_text_replacement_offsets": True},
    ):
        arguments = {"text": ["<image> a red car", "<image>"], "images": [WIDE, WIDE], "padding": True} | options
        arguments |= {} if "common_kwargs" in options else {"return_tensors": "np"}
        if "text_kwargs" in options:
            del arguments["padding"]
        ours, peer = PROCESSOR(**arguments), PEER(**arguments)
        assert ours.keys() == peer.keys(), options
        for key in ours:
            if key == "text_replacement_offsets":
                assert ours[key] == peer[key]
            else:
                assert type(ours[key]) is type(peer[key])
                np.testing.assert_allclose(np.asarray(ours[key]), np.asarray(peer[key]), rtol=0, atol=1e-6)


def test_pictures_alone_and_their_token_counts():
    sizes = [(100, 100), (300, 100), (500, 30)]
    ours, peer = (side._get_num_multimodal_tokens(image_sizes=sizes) for side in (PROCESSOR, PEER))
    assert (ours.num_image_tokens, ours.num_image_patches) == (peer.num_image_tokens, peer.num_image_patches)
    assert PROCESSOR._get_num_multimodal_tokens().num_image_tokens is None
    alone, expected = (PROCESSOR(images=WIDE, return_tensors="pt", **more) for more in ({}, {"text": "<image>"}))
    assert list(alone) == ["pixel_values", "image_sizes"]
    assert torch.equal(alone["pixel_values"], expected["pixel_values"])


def test_tokenized_chats_in_a_batch():
    talks = [[said("user", shown(WIDE), "a")], [said("user", "b")], [said("user", shown(TALL), shown(WIDE))]]
    output = chat(talks, padding=True, split_special_tokens=True)
    assert output["image_sizes"] == [(16, 24), (32, 16), (16, 24)]
    inside = [picture(2, 3) + "a", "b", picture(4, 2) + picture(2, 3)]
    for row, mask, text in zip(output["input_ids"], output["attention_mask"], inside, strict=True):
        expected = f"<|extra_203|>You are a helpful assistant. USER: {text}. ASSISTANT:"
        assert spelled([token for token, seen in zip(row, mask, strict=True) if seen]) == expected


def test_arguments_of_the_processor_pass_through_a_chat():
    options = {"padding": "max_length", "max_length": 60, "padding_side": "right", "add_special_tokens": False}
    given = chat([said("user", "a")], processor_kwargs=options)
    assert given == PROCESSOR(text="You are a helpful assistant. USER: a. ASSISTANT:", **options)
    assert given == chat([said("user", "a")], **options)
    pixels = chat([said("user", shown(WIDE))], images_kwargs={"do_normalize": False}, do_rescale=False)["pixel_values"]
    np.testing.assert_array_equal(pixels[0].transpose(1, 2, 0), np.array(WIDE))


def test_ids_alone_without_return_dict():
    ids = PROCESSOR.apply_chat_template([said("user", "a")], tokenize=True)
    assert ids == PROCESSOR(text="You are a helpful assistant. USER: a.")["input_ids"]


@settings(max_examples=50, deadline=None)
@given(TYPED, TYPED, TYPED)
def test_typed_marks_do_not_count_in_plain_chat(system, before, after):
    conversation = [{"role": "system", "content": system}, said("user", before, shown(WIDE), after)]
    (ids,) = chat(conversation, split_special_tokens=True)["input_ids"]
    inner = PROCESSOR(text="<image>", images=WIDE, add_special_tokens=False)["input_ids"][0]
    head = encode_plain(TOKENIZER, f"{system} USER: {before}")
    tail = encode_plain(TOKENIZER, f"{after}. ASSISTANT:")
    assert ids == [TOKENIZER.bos_token_id, *head, *inner, *tail]


def test_parsed_chat_counts_typed_marks():
    with pytest.raises(ValueError, match="1 pictures for 2"):
        chat([said("user", shown(WIDE), "and <image>")])


def test_stand_ins_that_someone_typed_are_text():
    text = "\ue0000\ue001 and \ue0001\ue001"
    for plain in (False, True):
        (ids,) = chat([said("user", text)], split_special_tokens=plain)["input_ids"]
        assert spelled(ids) == f"<|extra_203|>You are a helpful assistant. USER: {text}. ASSISTANT:"


@pytest.mark.parametrize(
    ("conversation", "named"),
    [
        ([{"role": "tool", "content": "a"}], "tool"),
        ([said("user", "a"), said("system", "b")], "system"),
        ([said("user", {"type": "video", "video": 1})], "video"),
        ([said("user", {"type": "image", "url": "http://localhost:9/cat.png"})], "cannot read a picture from 'http"),
        ([said("user", shown("cat.png"))], "nor a file here"),
        ([said("user", {"type": "image"})], "0 pictures for 1"),
        ([{"role": "user"}], "no message"),
        ([{"content": "a"}], "no message"),
        ([{"role": "<image>", "content": "a"}], "role <image> is out of place"),
        (["a"], "no message"),
        ([{"role": "user", "content": [WIDE]}], "no content"),
        ([], "empty"),
        (said("user", "a"), "list of messages"),
    ],
)
def test_unusable_messages_are_refused(conversation, named):
    with pytest.raises(ValueError, match=named):
        chat(conversation)


def test_plain_chat_cannot_be_a_string():
    with pytest.raises(ValueError, match="tokenize=True"):
        PROCESSOR.apply_chat_template([said("user", "a")], split_special_tokens=True)


def test_own_template_wins_over_the_default():
    processor = Emu3Processor(PROCESSOR.image_processor, TOKENIZER, chat_template="{{ messages[0]['content'] }}!")
    assert processor.apply_chat_template([{"role": "user", "content": "a"}]) == "a!"


@pytest.mark.parametrize("plain", [False, True])
def test_a_template_that_fails_is_named(plain):
    for template in ("{{ messages[0]['content'] + 1 }}", "{{ 1 // 0 }}"):
        with pytest.raises(ValueError, match="chat template fails at this conversation"):
            PROCESSOR.apply_chat_template(
                [{"role": "user", "content": "a"}], template, tokenize=plain, split_special_tokens=plain
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    pictures = Emu3ImageProcessor(**SMALL, spatial_factor=4, do_pad=False)
    Emu3Processor(pictures, TOKENIZER, image_area=48 * 48).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "emu3"}))
    return path


def test_saved_processor_loads_our_classes(folder):
    loaded = Emu3Processor.from_pretrained(folder)
    assert type(loaded) is Emu3Processor
    assert type(loaded.image_processor) is Emu3ImageProcessor
    assert (loaded.image_processor.spatial_factor, loaded.image_processor.max_pixels) == (4, 32 * 32)
    assert (loaded.image_area, loaded.image_processor.do_pad) == (48 * 48, False)
    assert Emu3Processor.from_pretrained(folder, image_area=9).image_area == 9
    assert loaded.chat_template == CHAT_TEMPLATE
    text = "typed <|image start|> <image>"
    assert loaded(images=TALL, text=text)["input_ids"][0][-3 - 8 * 5 :][1:-2] == [TOKENIZER.image_token_id] * (8 * 5)


def test_transformers_loads_what_we_save(folder):
    loaded = PeerProcessor.from_pretrained(folder)
    assert type(loaded.image_processor) is PeerImageProcessor
    text = "What colour is 12*12?<|image end|>"
    assert loaded(text=text)["input_ids"] == PROCESSOR(text=text)["input_ids"]
    assert loaded.chat_template == CHAT_TEMPLATE


def test_loaded_tokenizers_pad_on_the_left(folder):
    config = folder / "tokenizer_config.json"
    saved = config.read_text()
    config.write_text(saved.replace('"padding_side": "left"', '"padding_side": "right"'))
    assert Emu3Processor.from_pretrained(folder).tokenizer.padding_side == "left"
    assert Emu3Processor.from_pretrained(folder, padding_side="right").tokenizer.padding_side == "right"
    config.write_text(saved)


def test_a_tokenizer_without_end_of_row():
    names = CONTROL_TOKENS.keys() - {"eol_token", "bos_token", "eos_token", "pad_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer,
        bos_token=TOKENIZER.bos_token,
        extra_special_tokens={name: CONTROL_TOKENS[name] for name in sorted(names)},
    )
    processor = Emu3Processor(PROCESSOR.image_processor, tokenizer)
    assert processor(images=WIDE, text="a<image>")["input_ids"] == PROCESSOR(images=WIDE, text="a<image>")["input_ids"]


def test_input_names_equal_transformers():
    assert PROCESSOR.model_input_names == PEER.model_input_names


def test_outputs_are_decoded():
    ids = torch.tensor(PROCESSOR(text=["a red car", "a red cat"])["input_ids"])
    assert PROCESSOR.batch_decode(ids, skip_special_tokens=True) == ["a red car", "a red cat"]
    assert PROCESSOR.decode(ids[0]) == "<|extra_203|>a red car"
    assert PROCESSOR.post_process_multimodal_output(ids) == ["a red car", "a red cat"]
    assert PROCESSOR.post_process_multimodal_output(ids[0], generation_mode="text") == ["a red car"]
    with pytest.raises(ValueError, match="audio"):
        PROCESSOR.post_process_multimodal_output(ids, generation_mode="audio")


def test_pixels_become_pictures():
    pixels = PROCESSOR(images=[WIDE, WIDE], text="<image><image>", return_tensors="pt")["pixel_values"]
    for pictures in (
        PROCESSOR.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"],
        PROCESSOR.post_process_multimodal_output(pixels, generation_mode="image"),
    ):
        assert [np.array(p).tolist() for p in pictures] == [np.array(WIDE).tolist()] * 2
