"""Clips from words, clips that go on, pictures drawn anew: what is asked for is what the model is fed."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.clips import Clip, moves, read_clip
from emu3.options import Draw
from emu3.pipeline import Emu3Pipeline
from emu3.results import Result
from emu3.segments import Shape, Text, Visual
from emu3.testing import write_tiny_checkpoint
from emu3.video_processing import Emu3VideoProcessor


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny random checkpoint that draws 4x4 tokens, with code vectors among its latents."""
    made = Emu3Pipeline.from_pretrained(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), side=16))
    vqmodel = made.model.model.vqmodel
    with torch.no_grad():
        latents = vqmodel.latents(torch.rand(8, 3, 16, 16) * 2 - 1)[1].movedim(2, -1)
        vectors = latents.reshape(-1, latents.shape[-1])
        vqmodel.quantize.embedding.weight.copy_(vectors[: len(vqmodel.quantize.embedding.weight)])
    return made


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_a_clip_has_the_frames_and_rate_that_are_asked_for(pipeline):
    one, other = pipeline.video(["a cat", "a dog"], frames=8, fps=6, seed=3)
    assert one.frames_THWC.shape == other.frames_THWC.shape == (8, 16, 16, 3)
    assert one.frames_per_second == 6
    assert not np.array_equal(one.frames_THWC, other.frames_THWC)
    assert np.array_equal(one.frames_THWC, pipeline.video("a cat", frames=8, fps=6, seed=3)[0].frames_THWC)
    assert pipeline.video("a cat", frames=8, height=16, width=8, seed=0)[0].frames_THWC.shape == (8, 16, 8, 3)


@pytest.mark.parametrize("decoding", ["raster", "predictive"])
def test_a_clip_is_what_its_ids_decode_to(pipeline, decoding):
    requests = pipeline.video_requests("a cat", frames=12, fps=5, seed=1, decoding=decoding)
    (result,) = pipeline.results(requests)
    opening = pipeline.layout.prompt("a cat", Shape(4, 4, 3, 5.0))
    assert list(requests[0].prompt_ids) == opening
    assert pipeline.layout.words.decode(opening[opening.index(pipeline.layout.vocabulary.boi) + 1 : -1]) == (
        "3*4*4, 5 fps, 2.4 s"
    )
    assert result.codes_HW is None and result.codes_THW.shape == (3, 4, 4)
    with torch.inference_mode():
        pixels = pipeline.model.model.vqmodel.decode(torch.tensor(result.codes_THW)[None])
    (clip,) = Emu3VideoProcessor.of(pipeline.processor.image_processor).postprocess(pixels)
    assert np.array_equal(clip.frames_THWC, result.output.frames_THWC)
    assert result._repr_html_().startswith("<img") and result._repr_png_() is None
    raster = pipeline.results(pipeline.video_requests("a cat", frames=12, fps=5, seed=1, decoding="raster"))[0]
    assert raster.ids == result.ids


def test_what_a_clip_begins_with_stays(pipeline):
    frames = noise(9, 16, 16)
    start = pipeline.encode_visual(Clip(frames, 5.0))
    assert start.shape == Shape(4, 4, 2, 5.0)  # the ninth frame fills no code
    with torch.inference_mode():
        inputs = Emu3VideoProcessor.of(pipeline.processor.image_processor)(frames, return_tensors="pt")
        (codes,) = pipeline.model.model.vqmodel.encode(inputs["pixel_values_videos"], [[16, 16]]).image_tokens
    assert np.array_equal(start.codes_THW, codes)
    for given in (Clip(frames, 5.0), list(frames), frames, start):
        requests = pipeline.video_requests("", frames=16, start=given, seed=2)
        (result,) = pipeline.results(requests)
        assert np.array_equal(result.codes_THW[:2], start.codes_THW)
    longer = pipeline.extend(Clip(frames, 5.0), "a cat", frames=8, seed=2)
    assert (len(longer), longer.frames_per_second) == (16, 5)
    words = pipeline.video("a cat", frames=16, fps=5, start=Clip(frames, 5.0), seed=2)[0]
    assert np.array_equal(words.frames_THWC, longer.frames_THWC)


def test_a_picture_is_animated(pipeline):
    picture = Image.fromarray(noise(16, 16))
    (result,) = pipeline.results(pipeline.video_requests("a cat", frames=8, start=picture, seed=0))
    assert np.array_equal(result.codes_THW[:1], pipeline.encode_visual(picture).codes_THW)
    assert len(pipeline.extend(picture, frames=4, seed=0)) == 8


def test_an_edit_is_fed_the_picture_and_the_words(pipeline):
    first, second = Image.fromarray(noise(16, 16)), Image.fromarray(noise(16, 16)[::-1].copy())
    given = pipeline.given_for([[first, second]], "make it blue")
    assert [each.codes_THW.shape for each in given[0]] == [(1, 4, 4)] * 2
    (request,) = pipeline.draw_requests("make it blue", given=given, seed=0)
    segments = pipeline.layout.read(request.prompt_ids)
    assert [type(each) for each in segments] == [Visual, Visual, Text]
    for visual, picture in zip(segments, (first, second), strict=False):
        assert np.array_equal(visual.codes_THW, pipeline.encode_visual(picture).codes_THW)
    assert segments[2].text.startswith("make it blue")
    without = pipeline.layout.read(request.guidance.negative_ids)
    assert [type(each) for each in without[:2]] == [Visual, Visual]
    (alone,) = pipeline.draw_requests("make it blue", given=given, seed=0, picture_guidance=True)
    assert not any(isinstance(each, Visual) for each in pipeline.layout.read(alone.guidance.negative_ids))
    (edited,) = pipeline.edit([[first, second]], ["make it blue"], seed=0)
    (expected,) = pipeline.results([request])
    assert np.array_equal(np.asarray(edited), np.asarray(expected.output))


def test_edits_have_the_size_of_their_picture(pipeline):
    wide = Image.fromarray(noise(8, 32))
    assert pipeline.edit(wide, "make it blue", seed=0)[0].size == (32, 8)
    assert pipeline.edit(wide, "make it blue", height=16, width=16, seed=0)[0].size == (16, 16)
    assert pipeline.edit(wide, "make it blue", ratio="2:1", image_area=512, seed=0)[0].size == (32, 16)
    square = Image.fromarray(noise(16, 16))
    assert [each.size for each in pipeline.edit(square, ["a", "b"], seed=0)] == [(16, 16)] * 2
    with pytest.raises(ValueError, match="pictures are of several sizes"):
        pipeline.edit([wide, square], ["a", "b"])


def test_previews_of_a_clip_show_the_frame_it_has_come_to(pipeline):
    requests = pipeline.video_requests("a cat", frames=8, seed=0)
    (result,) = pipeline.results(requests)
    grid = requests[0].grammar
    grey = (128, 128, 128)
    begun = np.asarray(pipeline.preview(grid, result.ids[: grid.frame_length + 5]))
    assert (begun[4:] == grey).all() and not (begun[:4] == grey).all()
    whole = pipeline.preview(grid, result.ids[: grid.frame_length])
    first = pipeline.decode(Visual(result.codes_THW[:1]))
    assert np.array_equal(np.asarray(whole), np.asarray(first))


def test_a_stream_gives_clips(pipeline):
    requests = pipeline.video_requests("a cat", frames=8, seed=0)
    (made,) = [event for event in pipeline._run(requests) if isinstance(event, Result)]
    assert isinstance(made.output, Clip)


def test_clips_of_a_checkpoint(tmp_path):
    """Its own rate, length and text of clips, from config.json."""
    folder = write_tiny_checkpoint(tmp_path / "tiny", side=16)
    config = json.loads((folder / "config.json").read_text())
    config["clips"] = {"frames": 8, "fps": 5, "text": "{frames}*{height}*{width}"}
    (folder / "config.json").write_text(json.dumps(config))
    pipeline = Emu3Pipeline.from_pretrained(folder)
    (clip,) = pipeline.video("a cat", seed=0, guidance_scale=1)
    assert (len(clip), clip.frames_per_second) == (8, 5)
    (request,) = pipeline.video_requests("a cat")
    ids, v = list(request.prompt_ids), pipeline.layout.vocabulary
    assert pipeline.layout.words.decode(ids[ids.index(v.boi) + 1 : -1]) == "2*4*4"
    for wrong in ({"fps": 0}, {"frames": "many"}, {"text": 3}, {"independent_groups": 1}):
        (folder / "config.json").write_text(json.dumps(config | {"clips": wrong}))
        with pytest.raises(ValueError, match="clips"):
            Emu3Pipeline.from_pretrained(folder)


def test_groups_of_frames_are_clips_of_their_own_where_the_checkpoint_says_so(pipeline):
    own = Emu3Pipeline(copy.deepcopy(pipeline.model), pipeline.processor)
    own.model.config.clips = {"independent_groups": True}
    clip = Clip(noise(12, 16, 16), own.layout.clips.fps)
    groups = [Clip(frames) for frames in np.split(clip.frames_THWC, 3)]
    read = own.encode_visual(clip)
    alone = [pipeline.encode_visual(group).codes_THW for group in groups]
    assert np.array_equal(read.codes_THW, np.concatenate(alone))
    assert not np.array_equal(read.codes_THW, pipeline.encode_visual(clip).codes_THW)
    assert (own.encode_start(clip).codes_THW == read.codes_THW).all()

    (asked,) = own.answer_requests([("What is it?", [clip])])
    (heard,) = (each for each in own.layout.read(asked.request.prompt_ids) if isinstance(each, Visual))
    assert np.array_equal(heard.codes_THW, read.codes_THW)

    vqmodel, videos = own.model.model.vqmodel, Emu3VideoProcessor.of(own.processor.image_processor)
    (result,) = own.results(own.video_requests("a cat", frames=16, start=clip, seed=0))
    assert np.array_equal(result.codes_THW[:3], read.codes_THW)
    with torch.inference_mode():
        frames = [
            videos.postprocess(vqmodel.decode(torch.tensor(codes)[None, None]))[0].frames_THWC
            for codes in result.codes_THW
        ]
    assert np.array_equal(result.output.frames_THWC, np.concatenate(frames))
    joint = pipeline.decode(Visual(result.codes_THW))
    assert not np.array_equal(result.output.frames_THWC, joint.frames_THWC)


@pytest.mark.parametrize(
    ("call", "options", "reason"),
    [
        ("video", {"frames": 6}, "frames must be a positive multiple of 4 frames, got 6; nearest: 4 or 8"),
        ("video", {"frames": 4}, "frames is 4, which share one code, as a picture; ask for 8"),
        ("video", {"frames": 0}, "frames must be a whole number, at least 1"),
        ("video", {"fps": -1}, "fps must be a finite number"),
        ("video", {"frames": 4000}, "context"),
        ("video", {"frames": 8, "start": noise(16, 16, 16)}, "the start has 16 already; ask for more"),
        (
            "video",
            {"start": noise(4, 16, 16), "height": 8, "width": 8},
            "with 4x4 tokens, and 2x2 are asked for",
        ),
        ("video", {"start": "nowhere.mp4"}, "no file 'nowhere.mp4'"),
        ("video", {"start": []}, "no frames"),
    ],
)
def test_what_is_refused(pipeline, call, options, reason):
    with pytest.raises(ValueError, match=reason):
        getattr(pipeline, call)("a cat", **options)


def test_wrong_edits(pipeline):
    picture = Image.fromarray(noise(16, 16))
    for pictures, prompts, reason in (
        ([picture], ["a", "b"], "1 pictures and 2 prompts"),
        ([[]], ["a"], "no picture"),
        (picture, "", "must not be empty"),
        (None, "a", "is no picture"),
        ([], "a", "no picture"),
    ):
        with pytest.raises(ValueError, match=reason):
            pipeline.edit(pictures, prompts)


def test_a_text_with_pictures_in_it(pipeline):
    """The head is made to like boi and eos, so that pictures and ends come."""
    pipeline = Emu3Pipeline(copy.deepcopy(pipeline.model), pipeline.processor)
    v = pipeline.layout.vocabulary
    with torch.no_grad():
        pipeline.model.lm_head.weight[v.boi] *= 12
    options = {"max_new_tokens": 160, "temperature": 1.0}
    answers = [pipeline.tell("Tell a story.", seed=seed, **options) for seed in range(6)]
    assert any(isinstance(part, Image.Image) and part.size == (16, 16) for parts in answers for part in parts)
    assert any(isinstance(part, str) for parts in answers for part in parts)
    asked = pipeline.answer_requests("Tell a story.", drawing=Draw(), seed=2, **options)
    (result,) = pipeline.results([asked[0].request])
    ids = np.array(result.ids)
    opening = pipeline.layout.opening(Shape(4, 4))
    for start in np.flatnonzero(ids == v.boi):
        body = [*ids[start:]][: len(opening) + 4 * 5 + 2]
        assert body[: len(opening)] == opening[: len(body)]
        if len(body) > len(opening) + 21:
            assert body[-2:] == [v.eof, v.eoi]
    several = pipeline.tell([[{"role": "user", "content": "Hi"}]] * 2, seed=1, **options)
    assert len(several) == 2 and all(isinstance(parts, list) for parts in several)
    wide = pipeline.tell("Tell a story.", drawing=Draw(height=8, width=16), seed=2, **options)
    assert {part.size for part in wide if isinstance(part, Image.Image)} <= {(16, 8)}


@pytest.mark.parametrize(
    ("call", "arguments", "said"),
    [
        ("video", ("a cat",), "does not make clips"),
        ("edit", (Image.new("RGB", (16, 16)), "make it blue"), "does not draw pictures from pictures"),
        ("tell", ("Tell a story.",), "does not put pictures into its answers"),
    ],
)
def test_what_a_checkpoint_has_not_learned_is_refused(call, arguments, said):
    nano = Emu3Pipeline.from_pretrained("nano")
    nano.model.config.abilities = ["draw", "read"]
    with pytest.raises(ValueError, match=f"{said}, says its config.json"):
        getattr(nano, call)(*arguments)
    nano.model.config.abilities = ["draw", "read", "edit", "film", "tell"]
    nano.draw_requests("a photo of a cat")


def test_a_part_is_drawn_anew_and_the_rest_keeps_its_tokens(pipeline):
    picture = Image.fromarray(noise(16, 16))
    codes = pipeline.encode_visual(picture).codes_THW[0]
    mask = np.zeros((16, 16), bool)
    mask[5:7, 9:] = True  # within row 1, columns 2 and 3
    expected = np.zeros((4, 4), bool)
    expected[1, 2:] = True
    holes = Image.fromarray(np.dstack([noise(16, 16), np.where(mask, 0, 255).astype(np.uint8)]), "RGBA")
    grey = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    for given in (mask, mask.astype(float), holes, grey, expected):
        (request,) = pipeline.complete_requests(picture, "a cat", mask=given, seed=1)
        (result,) = pipeline.results([request])
        assert (result.codes_HW[~expected] == codes[~expected]).all()
        lo, hi = request.grammar.span(np.arange(request.grammar.length))
        assert (hi - lo > 1).sum() == 2
    large, large_mask = picture.resize((64, 64)), np.kron(mask, np.ones((4, 4), bool))  # which is read at 16x16
    for given in (large_mask, mask):
        (request,) = pipeline.complete_requests(large, "a cat", mask=given, seed=1)
        lo, hi = request.grammar.span(np.arange(request.grammar.length))
        assert (hi - lo > 1).nonzero()[0].tolist() == [7, 8]
    (longer,) = pipeline.complete(picture, "a cat", below=8, seed=1)
    assert longer.size == (16, 24)
    (made,) = pipeline.results(pipeline.complete_requests(picture, "a cat", below=8, seed=1))
    assert (made.codes_HW[:4] == codes).all() and made.codes_HW.shape == (6, 4)
    for options, reason in (
        ({}, "nothing is to be drawn"),
        ({"mask": np.zeros((16, 16))}, "nothing is to be drawn"),
        ({"mask": np.zeros((16, 12))}, "the mask has 12x16 pixels, and the picture 16x16"),
        ({"mask": np.zeros((16, 16, 3))}, "a mask is a picture or an array"),
        ({"below": 3}, "below must be a positive multiple of 4 pixels, got 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            pipeline.complete(picture, "a cat", **options)


def test_a_start_is_brought_to_the_rate(pipeline):
    frames = noise(16, 16, 16)
    (clip,) = pipeline.video("a cat", frames=24, start=Clip(frames, 30.0), seed=0)
    assert clip.frames_per_second == 30
    half = pipeline.encode_start(Clip(frames, 30.0), 15.0)
    assert half.shape == Shape(4, 4, 2, 15.0)
    assert np.array_equal(half.codes_THW, pipeline.encode_visual(Clip(frames[::2], 15.0)).codes_THW)
    assert pipeline.extend(Clip(frames, 30.0), frames=4, fps=15, seed=0).frames_per_second == 15
    with pytest.raises(ValueError, match="frames must be a positive multiple of 4 frames, got 6; nearest: 4 or 8"):
        pipeline.extend(Clip(frames, 30.0), frames=6)
    with pytest.raises(ValueError, match="prompt must be a string"):
        pipeline.extend(Clip(frames, 30.0), ["a", "b"])
    path = Image.fromarray(frames[0])
    assert np.array_equal(pipeline.encode_start(path).codes_THW, pipeline.encode_start(frames[0]).codes_THW)


def test_a_picture_that_does_not_fit_is_not_begun(pipeline):
    pipeline = Emu3Pipeline(copy.deepcopy(pipeline.model), pipeline.processor)
    with torch.no_grad():
        pipeline.model.lm_head.weight[pipeline.layout.vocabulary.boi] *= 12
    for seed in range(6):
        parts = pipeline.tell("Tell a story.", seed=seed, max_new_tokens=25, temperature=1.0)
        assert not any("4*4" in part for part in parts if isinstance(part, str))
        assert "" not in parts


def test_how_far_a_clip_goes_on(pipeline):
    """As far as the longest that was learned; a group of frames at least; 16 where nothing is listed."""
    own = Emu3Pipeline(copy.deepcopy(pipeline.model), pipeline.processor)
    for clips, frames in (({}, 24), ({"lengths": [8, 12]}, 12), ({"lengths": [8]}, 12)):
        own.model.config.clips = clips | {"frames": 8}
        assert len(own.extend(Clip(noise(8, 16, 16), 24.0), "a cat", seed=0)) == frames
        assert len(own.video("a cat", start=Clip(noise(8, 16, 16), 24.0), seed=0)[0]) == frames
        assert len(own.video("a cat", start=noise(16, 16), seed=0)[0]) == 8


def test_a_file_that_moves_is_a_clip(pipeline, tmp_path):
    clip = Clip(noise(8, 16, 16), 20.0)
    for name in ("a.gif", "a.webp", "a.mp4"):
        clip.save(tmp_path / name)
        asked = [("What is it?", [tmp_path / name]), ("What is it?", [read_clip(tmp_path / name)])]
        named, given = (request.request.prompt_ids for request in pipeline.answer_requests(asked))
        assert named == given
        with pytest.raises(ValueError, match="only pictures are edited"):
            pipeline.edit(tmp_path / name, "make it blue")
    Image.fromarray(noise(16, 16)).save(tmp_path / "still.gif")
    with Image.open(tmp_path / "a.gif") as opened, Image.open(tmp_path / "still.gif") as still:
        assert moves(opened) and not moves(still) and not moves(tmp_path / "still.gif") and not moves("no.gif")


def test_a_clip_in_a_conversation(pipeline):
    """It stands where its message has it, in the codes and at the rate at which the checkpoint reads clips."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    clip, picture = Clip(noise, pipeline.layout.clips.fps), Image.fromarray(noise[0])
    parts = [
        {"type": "image", "image": picture},
        {"type": "video", "video": clip},
        {"type": "text", "text": "a <image>"},
    ]
    (asked,) = pipeline.answer_requests([{"role": "user", "content": parts}])
    read = [each for each in pipeline.layout.read(pipeline.encode(asked).prompt_ids) if isinstance(each, Visual)]
    expected = [pipeline.encode_visual(picture), pipeline.encode_visual(clip)]
    assert [each.codes_THW.tolist() for each in read] == [each.codes_THW.tolist() for each in expected]
    assert [each.shape for each in read] == [each.shape for each in expected]
    (pair,) = pipeline.answer_requests([("a <image>", [picture, clip])])
    assert pair.request.prompt_ids == asked.request.prompt_ids
    with pytest.raises(ValueError, match="'video': clip"):
        pipeline.answer_requests([{"role": "user", "content": [{"type": "video"}]}])
