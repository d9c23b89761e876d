"""Words to pictures and pictures to words with a tiny random model: what is asked for is what the model is fed."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emu3
from emu3.configuration import Emu3Config
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, RowDone, Started
from emu3.image_processing import Emu3ImageProcessor
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.pipeline import Emu3Pipeline
from emu3.processing import Emu3Processor
from emu3.results import Result
from emu3.tokenization import train_tokenizer, vocabulary_map

FACTOR = 2
CODES = 24
CONTEXT = 300


def tiny_pipeline():
    tokenizer = train_tokenizer(["a photo of a red cat", "You are a helpful assistant. USER: ASSISTANT:"], 270, CODES)
    vision = {"codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(
        Emu3Config(
            text_config=text | {"max_position_embeddings": CONTEXT},
            vq_config=vision | {"hidden_size": 32, "attn_resolutions": []},
            vocabulary_map=vocabulary_map(tokenizer),
        )
    )
    vision_tokenizer = model.eval().model.vqmodel
    with torch.no_grad():
        # Code vectors among the latents, so that different pictures have different codes.
        _, latents_BTZhw = vision_tokenizer.latents(torch.rand(4, 3, 8, 8) * 2 - 1)
        vectors = latents_BTZhw.movedim(2, -1).reshape(-1, latents_BTZhw.shape[2])
        vision_tokenizer.quantize.embedding.weight.copy_(vectors[:CODES])
    images = Emu3ImageProcessor(
        image_mean=0.5, image_std=0.5, min_pixels=16, max_pixels=400, spatial_factor=FACTOR, do_resize=True
    )
    return Emu3Pipeline(model, Emu3Processor(images, tokenizer))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def requests(monkeypatch):
    """The requests that reach the engine."""
    seen, stream = [], Engine.stream

    def spy(self, requests):
        seen.extend(requests)
        return stream(self, requests)

    monkeypatch.setattr(Engine, "stream", spy)
    return seen


def picture(seed, height=8, width=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def arrays(pictures):
    return [np.asarray(picture).tolist() for picture in pictures]


SMALL = {"height": 8, "width": 6}


def test_pictures_have_the_size_asked_for(pipeline):
    one = pipeline.image("a red cat", **SMALL, seed=0)
    two = pipeline.image(["a cat", "a dog"], ratio="2:1", image_area=128, seed=0)
    assert [picture.size for picture in one] == [(6, 8)]
    assert [picture.size for picture in two] == [(16, 8)] * 2
    assert {picture.mode for picture in one + two} == {"RGB"}


def test_same_seed_same_picture(pipeline):
    """Alone, and in a batch of four, where picture i has seed + i."""
    prompts = ["a cat", "a red photo of a dog", "b", "four"]
    batch = arrays(pipeline.image(prompts, **SMALL, seed=5))
    for index, prompt in enumerate(prompts):
        assert arrays(pipeline.image(prompt, **SMALL, seed=5 + index)) == [batch[index]]
    assert arrays(pipeline.image(prompts[::-1], **SMALL, seed=[8, 7, 6, 5])) == batch[::-1]
    assert arrays(pipeline.image("a cat", **SMALL, seed=6)) != [batch[0]]


def test_same_seed_same_picture_in_another_process(pipeline):
    program = f"""
import runpy
test = runpy.run_path({__file__!r})
print(test["arrays"](test["tiny_pipeline"]().image("a cat", **test["SMALL"], seed=5)))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(emu3.__file__).parent.parent)}
    command = [sys.executable, "-c", program]
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert elsewhere.strip() == str(arrays(pipeline.image("a cat", **SMALL, seed=5)))


def test_without_a_seed_pictures_differ(pipeline, requests):
    pipeline.image(["a", "a"], **SMALL)
    pipeline.image("a", **SMALL)
    assert len({request.seed for request in requests}) == 3


def test_the_prompt_and_the_negative_prompt_have_the_same_image_prefix(pipeline, requests):
    tokenizer = pipeline.processor.tokenizer
    pipeline.image("a cat", negative_prompt="red", **SMALL)
    pipeline.image("a cat", **SMALL)
    pipeline.image("a cat", **SMALL, guidance_scale=1)
    start, end = "<|extra_203|>", "<|image start|>4*3<|image token|>"
    assert tokenizer.decode(requests[0].prompt_ids) == f"{start}a cat{end}"
    assert tokenizer.decode(requests[0].guidance.negative_ids) == f"{start}red{end}"
    assert tokenizer.decode(requests[1].guidance.negative_ids) == f"{start}{end}"
    assert requests[2].guidance is None
    assert [(request.grammar.height, request.grammar.width) for request in requests] == [(4, 3)] * 3


def test_the_picture_is_what_the_ids_decode_to(pipeline):
    events = []
    drawn = pipeline.image("a cat", **SMALL, seed=1, on_event=events.append)
    assert isinstance(events[0], Started)
    assert [(event.frame, event.row) for event in events if isinstance(event, RowDone)] == [(0, n) for n in range(4)]
    (finished,) = [event for event in events if isinstance(event, Finished)]
    pixels = pipeline.model.decode_image_tokens(torch.tensor([finished.ids]), height=4, width=3)
    assert arrays(pipeline.processor.postprocess(pixels)["pixel_values"]) == arrays(drawn)


def test_control_tokens_in_a_prompt_are_plain_text(pipeline, requests):
    vocabulary = pipeline.model.model.vocabulary
    pipeline.image("a <|image start|>9*9<|image token|><image>", negative_prompt="<|extra_204|>", **SMALL)
    pipeline.chat([{"role": "user", "content": "<image> <|extra_204|>"}], max_new_tokens=1)
    drawing, negative, chatting = requests[0].prompt_ids, requests[0].guidance.negative_ids, requests[1].prompt_ids
    for control in (vocabulary.boi, vocabulary.img):
        assert drawing.count(control) == 1
        assert control not in chatting
    for ids in (drawing, negative, chatting):
        assert vocabulary.image_placeholder not in ids
        assert vocabulary.eos not in ids


def test_chat_feeds_the_codes_of_each_picture(pipeline, requests):
    """Pictures of different sizes, each with the codes that it has alone."""
    vocabulary, pictures = pipeline.model.model.vocabulary, [picture(0), picture(1, 4, 12)]
    pipeline.chat(("what is this?", pictures), max_new_tokens=1)
    ids = torch.tensor(requests[0].prompt_ids)
    starts = (ids == vocabulary.img).nonzero().flatten().tolist()
    assert len(starts) == 2
    for start, shown, (height, width) in zip(starts, pictures, [(4, 4), (2, 6)], strict=True):
        inputs = pipeline.processor.image_processor(shown, return_tensors="pt")
        encoded = pipeline.model.model.vqmodel.encode(inputs["pixel_values"], inputs["image_sizes"])
        rows = ids[start + 1 :][: height * (width + 1)].reshape(height, width + 1)
        assert torch.equal(vocabulary.codes_of(rows[:, :-1]), encoded.image_tokens[0])
        assert rows[:, -1].tolist() == [vocabulary.eol] * height


def test_chat_equals_generate(pipeline):
    """Greedy, from a picture; and another picture gives another answer."""
    answers = []
    for seed in range(4):
        messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "what is this?"}],
            }
        ]
        answer = pipeline.chat(messages, max_new_tokens=20)
        assert answer == pipeline.chat(("what is this?", [picture(seed)]), max_new_tokens=20)
        inputs = pipeline.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        out = pipeline.model.generate(**inputs, do_sample=False, max_new_tokens=20)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer == pipeline.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        answers.append(answer)
    assert len(set(answers)) > 1


def test_chat_answers_several_conversations(pipeline):
    """Each as alone, whichever way it is given; seeds count up."""
    asked = [
        ("what is this?", [picture(0)]),
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": picture(1)}]}],
    ]
    assert pipeline.chat(asked, max_new_tokens=9) == [pipeline.chat(each, max_new_tokens=9) for each in asked]
    warm = {"max_new_tokens": 9, "temperature": 2.0}
    expected = [pipeline.chat(each, **warm, seed=5 + number) for number, each in enumerate(asked)]
    assert pipeline.chat(asked, **warm, seed=5) == pipeline.chat(asked, **warm, seed=[5, 6, 7]) == expected
    assert pipeline.chat(asked[1:2], max_new_tokens=9) == [pipeline.chat(asked[1], max_new_tokens=9)]
    with pytest.raises(ValueError, match="2 seeds for 3"):
        pipeline.chat(asked, seed=[1, 2])


def test_chat_looks_whether_pictures_fit_before_it_encodes_them(pipeline, monkeypatch):
    def encode(*arguments):
        pytest.fail("a picture was encoded")

    monkeypatch.setattr(pipeline.model.model.vqmodel, "encode", encode)
    with pytest.raises(ValueError, match="do not fit the model's context of 300"):
        pipeline.chat(("what is this?", [picture(seed, 32, 32) for seed in range(9)]))


def test_a_processor_of_another_factor_is_refused(pipeline):
    pictures = Emu3ImageProcessor(spatial_factor=16)
    with pytest.raises(ValueError, match="spatial_factor=16, the model's vision tokenizer 2 pixels a token"):
        Emu3Pipeline(pipeline.model, Emu3Processor(pictures, pipeline.processor.tokenizer))


def test_chat_at_a_temperature_follows_its_seed(pipeline):
    def answer(seed):
        return pipeline.chat([{"role": "user", "content": "hello"}], max_new_tokens=20, temperature=2.0, seed=seed)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 8}, "both height and width"),
        ({"height": 9, "width": 8}, "height must be a positive multiple of 2 pixels, got 9; nearest: 8 or 10"),
        ({"height": 8, "width": 0}, "width must be a whole number, from 1 to 1048576, got 0"),
        ({"height": 2, "width": 402}, "more than 200 times longer"),
        ({"ratio": "0:1"}, 'ratio must be "width:height" in positive integers, such as "16:9", got .0:1.'),
        ({"ratio": "wide"}, "ratio must be .*, got 'wide'"),
        ({"image_area": 0}, "image_area must be a whole number, from 1 to .*, got 0"),
        ({"height": 40, "width": 40}, r"\d+ tokens \(\d+ of prompt\) do not fit the model's context of 300"),
        ({"ratio": "1:1"}, r"do not fit the model's context of 300"),
        ({**SMALL, "prompts": "long " * 300}, r"do not fit the model's context of 300; shorten the prompt"),
        ({**SMALL, "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({**SMALL, "seed": -1}, r"seed must be a whole number, from 0 to 2\*\*63 - 1, got"),
        ({**SMALL, "seed": 2**63}, r"seed must be a whole number, from 0 to 2\*\*63 - 1, got"),
        ({**SMALL, "seed": 1.5}, r"seed must be a whole number, from 0 to 2\*\*63 - 1, got"),
        ({**SMALL, "temperature": -1.0}, "temperature"),
        ({**SMALL, "prompts": None}, "prompts must be a string or a non-empty list of strings, got None"),
        ({**SMALL, "prompts": []}, "prompts must be a string"),
        ({**SMALL, "prompts": ""}, "prompt must not be empty, got ''"),
        ({**SMALL, "prompts": ["a cat", " \n"]}, r"prompt must not be empty, got ' \\n'"),
        ({**SMALL, "negative_prompt": ["dog"]}, r"negative_prompt must be a string, got \['dog'\]"),
        ({"height": 8.0, "width": 8}, "height must be a whole number, from 1 to 1048576, got 8.0"),
        ({"ratio": (4, 3)}, r"ratio must be .*, got \(4, 3\)"),
        ({**SMALL, "guidance_scale": float("nan")}, "guidance_scale must be a finite number from"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipeline, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipeline.image(**{"prompts": "a cat"} | wrong)


def test_guidance_0_draws_the_negative_prompt_and_1_the_prompt(pipeline):
    cat, red = (arrays(pipeline.image(prompt, **SMALL, seed=3, guidance_scale=1)) for prompt in ("a cat", "red"))
    assert cat != red
    for prompt in ("a cat", "four"):
        assert arrays(pipeline.image(prompt, negative_prompt="red", **SMALL, seed=3, guidance_scale=0)) == red
    assert arrays(pipeline.image("a cat", negative_prompt="", **SMALL, seed=3)) == arrays(
        pipeline.image("a cat", **SMALL, seed=3)
    )


def test_the_parameters_of_layers_in_8_bits_count(tiny_checkpoint):
    count = f"{Emu3Pipeline.from_pretrained(tiny_checkpoint).model.num_parameters():,} parameters"
    assert f"({count}, torch.float32, on cpu)" in repr(Emu3Pipeline.from_pretrained(tiny_checkpoint))
    quantized = Emu3Pipeline.from_pretrained(tiny_checkpoint, int8=True)
    assert f"({count}, torch.float32, layers in 8 bits, on cpu)" in repr(quantized)


def test_a_pipeline_can_be_copied_when_it_has_drawn(pipeline, tmp_path):
    expected = pipeline.image("a cat", **SMALL, seed=2)
    again = copy.deepcopy(pipeline)
    assert again.engine is not pipeline.engine
    assert arrays(again.image("a cat", **SMALL, seed=2)) == arrays(expected)
    path = tmp_path / "picture.png"
    picture(3).save(path)
    assert pipeline.chat("what?", [path], max_new_tokens=4) == pipeline.chat("what?", [picture(3)], max_new_tokens=4)


def test_a_call_that_ends_early_leaves_nothing_behind(pipeline):
    """A schedule that fails, a listener that raises, and a stream that nobody reads to its end."""
    prompts = ["a cat", "a dog"]
    with pytest.raises(ValueError, match="guidance schedule fails at token 4"):
        pipeline.image(prompts, **SMALL, guidance_scale=lambda progress: 2 if progress < 0.15 else 1 / 0)
    assert pipeline.engine.idle

    def interrupt(event):
        if isinstance(event, RowDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.image(prompts, **SMALL, on_event=interrupt)
    assert pipeline.engine.idle
    stream = pipeline.stream(prompts, **SMALL, seed=1)
    next(stream)
    stream.close()
    assert pipeline.engine.idle
    results = [event for event in pipeline.stream(prompts, **SMALL, seed=1) if isinstance(event, Result)]
    expected = pipeline.image(prompts, **SMALL, seed=1)
    assert arrays([event.output for event in sorted(results, key=lambda event: event.request)]) == arrays(expected)
    (answer,) = [
        event.output for event in pipeline.stream("what?", [picture(3)], max_new_tokens=4) if isinstance(event, Result)
    ]
    assert answer == pipeline.chat("what?", [picture(3)], max_new_tokens=4)


def test_a_stream_refuses_at_the_call_and_runs_nothing_before_it_is_read(pipeline):
    with pytest.raises(ValueError, match="do not fit the model's context of 300"):
        pipeline.stream("long " * 300, **SMALL)
    with pytest.raises(ValueError, match="do not fit the model's context of 300"):
        pipeline.stream("long " * 300, [])
    unread, closed = pipeline.stream("a cat", **SMALL), pipeline.stream("a dog", **SMALL)
    assert pipeline.engine.idle
    closed.close()
    assert pipeline.engine.idle
    del unread
    assert pipeline.engine.idle


@pytest.mark.parametrize("question", ["", " ", ("", ["picture.png"]), [("what?", None), ("\n", None)]])
def test_an_empty_question_is_refused(pipeline, question):
    with pytest.raises(ValueError, match="question must not be empty"):
        pipeline.chat(question)


def test_what_cannot_be_answered_is_refused(pipeline):
    with pytest.raises(ValueError, match="do not fit the model's context of 300"):
        pipeline.chat([{"role": "user", "content": "long " * 300}])
    with pytest.raises(ValueError, match="no picture"):
        pipeline.chat(("what?", ["picture.png"]))
    with pytest.raises(ValueError, match="is no content"):
        pipeline.chat([{"role": "user", "content": [{"type": "image"}]}])
    for nothing in (None, [], {"role": "user", "content": "what?"}, 5):
        with pytest.raises(ValueError, match=r"is no conversation; give a question with its pictures"):
            pipeline.chat(nothing)
    with pytest.raises(ValueError, match="pictures go with one question"):
        pipeline.chat([{"role": "user", "content": "what?"}], [picture(3)])


def test_a_question_about_one_picture_needs_no_list(pipeline):
    answers = [
        pipeline.chat("what?", picture(3), max_new_tokens=8),
        pipeline.chat("what?", [picture(3)], max_new_tokens=8),
        pipeline.chat(("what?", picture(3)), max_new_tokens=8),
        pipeline.chat([("what?", [picture(3)])], max_new_tokens=8)[0],
        pipeline.chat((("what?", [picture(3)]), ("who?", None)), max_new_tokens=8)[0],
    ]
    assert len(set(answers)) == 1
    assert pipeline.chat("what?", max_new_tokens=8) == pipeline.chat(
        [{"role": "user", "content": "what?"}], max_new_tokens=8
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="device='cuda', but"):
        Emu3Pipeline.from_pretrained(tiny_checkpoint, device="cuda")


def test_saved_and_loaded_draws_the_same(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    loaded = Emu3Pipeline.from_pretrained(tmp_path)
    assert arrays(loaded.image("a cat", **SMALL, seed=2)) == arrays(pipeline.image("a cat", **SMALL, seed=2))
    assert loaded.chat(("what?", [picture(3)]), max_new_tokens=8) == pipeline.chat(
        "what?", [picture(3)], max_new_tokens=8
    )


def test_unknown_checkpoints_are_refused():
    with pytest.raises(ValueError, match="unknown checkpoint"):
        Emu3Pipeline.from_pretrained("no such thing")


def test_guidance_is_the_checkpoints_own_unless_asked_for(tiny_checkpoint, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / "config.json"

    def guidances(drawing, **asked):
        path.write_text(json.dumps(json.loads((tiny_checkpoint / "config.json").read_text()) | {"drawing": drawing}))
        (request,) = Emu3Pipeline.from_pretrained(folder).draw_requests("a cat", height=16, width=16, **asked)
        return request.guidance and (request.guidance.scale, request.guidance.floor)

    assert guidances(None) == (3.0, 0.0)
    assert guidances({"guidance_floor": 0.1}) == (3.0, 0.1)
    assert guidances({"guidance_scale": 1.5, "guidance_floor": 0.1, "other": 1}) == (1.5, 0.1)
    assert guidances({"guidance_scale": 1.5, "guidance_floor": 0.1}, guidance_scale=2, guidance_floor=0) == (2.0, 0.0)
    assert guidances({"guidance_scale": 1.0}) is None
    with pytest.raises(ValueError, match=r"config\.json says drawing\.guidance_floor=3, which must be"):
        guidances({"guidance_floor": 3})
    with pytest.raises(ValueError, match=r"config\.json says drawing=\[1\], which must be an object"):
        guidances([1])


@pytest.mark.parametrize(
    ("abilities", "lacking", "said"),
    [
        (["draw"], "read", "does not answer or read pictures, says its config.json; load one that does, as Emu3-Chat"),
        (["read"], "draw", "does not draw pictures, says its config.json; load one that does, as Emu3-Gen"),
        (["draw", "read"], None, None),
        (None, None, None),
    ],
)
def test_what_a_checkpoint_is_not_trained_for_is_refused(tiny_checkpoint, tmp_path, abilities, lacking, said):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"abilities": abilities} if abilities else {})))
    loaded = Emu3Pipeline.from_pretrained(folder)
    calls = {
        "draw": lambda: loaded.image("a cat", height=16, width=16, seed=0),
        "read": lambda: loaded.chat(("What is it?", [picture(0)]), max_new_tokens=1),
    }
    for ability, call in calls.items():
        if ability == lacking:
            with pytest.raises(ValueError, match=f"^this checkpoint {said}$"):
                call()
        else:
            call()


def test_the_documented_classes_do_not_look_for_nano_on_the_hub() -> None:
    for kind in (Emu3ForConditionalGeneration, Emu3Processor):
        with pytest.raises(ValueError, match=r'emu3\.checkpoints\.resolve\("nano"\)'):
            kind.from_pretrained("nano")


def test_a_conversation_ends_with_a_question(pipeline) -> None:
    with pytest.raises(ValueError, match="its last message must be a question"):
        pipeline.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "cat"}])
    with pytest.raises(ValueError, match="one of the pictures is None"):
        pipeline.chat("What is it?", [None])
