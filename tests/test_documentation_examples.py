"""The examples of transformers' documentation page on Emu3, with `emu3` for `transformers`.

They are as printed there, but for: a small local checkpoint in the place of the released ones, no network (`requests`
is a stand-in that gives a picture), `sdpa` where the flash-attn package is not installed, fewer new tokens of text, and
the full-size models of the configurations' examples on the meta device.
"""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers.utils import is_flash_attn_2_available

CAT = Image.radial_gradient("L").resize((60, 40)).convert("RGB")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`requests.get(url, stream=True).raw` is a file that holds a picture."""
    file = io.BytesIO()
    CAT.save(file, "PNG")
    module = ModuleType("requests")
    module.get = lambda url, stream: SimpleNamespace(raw=io.BytesIO(file.getvalue()))
    monkeypatch.setitem(sys.modules, "requests", module)
    return module


def test_text_generation_inference(tiny_checkpoint, requests):
    import torch
    from PIL import Image

    from emu3 import Emu3ForConditionalGeneration, Emu3Processor

    processor = Emu3Processor.from_pretrained(tiny_checkpoint)
    model = Emu3ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16, device_map="auto")

    # prepare image and text prompt
    url = "http://images.cocodataset.org/val2017/000000039769.jpg"
    image = Image.open(requests.get(url, stream=True).raw)
    prompt = "What do you see in this image?<image>"

    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, dtype=torch.bfloat16)

    # autoregressively complete prompt
    output = model.generate(**inputs, max_new_tokens=5)
    text = processor.decode(output[0], skip_special_tokens=True)

    assert inputs["pixel_values"].shape == (1, 3, 36, 56)
    assert inputs["input_ids"].eq(model.vocabulary_mapping.image_token_id).sum() == 9 * 15
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 5
    assert text.startswith("What do you see in this image?")


@torch.no_grad()
def test_image_generation_inference(tiny_checkpoint, tmp_path):
    from emu3 import Emu3ForConditionalGeneration, Emu3Processor

    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match=r"(?i)flash.?attention"):
            Emu3ForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="flash_attention_2")
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    torch.manual_seed(0)

    processor = Emu3Processor.from_pretrained(tiny_checkpoint)
    model = Emu3ForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype="bfloat16", device_map="auto", attn_implementation=attention
    )

    inputs = processor(
        text=["a portrait of young girl. masterpiece, film grained, best quality.", "a dog running under the rain"],
        padding=True,
        return_tensors="pt",
        return_for_image_generation=True,
    )
    inputs = inputs.to(device=model.device, dtype=torch.bfloat16)

    neg_prompt = (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
        "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    neg_inputs = processor(text=[neg_prompt] * 2, return_tensors="pt").to(device=model.device)

    image_sizes = inputs.pop("image_sizes")
    HEIGHT, WIDTH = image_sizes[0]
    VISUAL_TOKENS = model.vocabulary_mapping.image_tokens

    def prefix_allowed_tokens_fn(batch_id, input_ids):
        height, width = HEIGHT, WIDTH
        visual_tokens = VISUAL_TOKENS
        image_wrapper_token_id = torch.tensor([processor.tokenizer.image_wrapper_token_id], device=model.device)
        eoi_token_id = torch.tensor([processor.tokenizer.eoi_token_id], device=model.device)
        eos_token_id = torch.tensor([processor.tokenizer.eos_token_id], device=model.device)
        pad_token_id = torch.tensor([processor.tokenizer.pad_token_id], device=model.device)
        eof_token_id = torch.tensor([processor.tokenizer.eof_token_id], device=model.device)
        eol_token_id = processor.tokenizer.encode("<|extra_200|>", return_tensors="pt")[0]

        position = torch.nonzero(input_ids == image_wrapper_token_id, as_tuple=True)[0][0]
        offset = input_ids.shape[0] - position
        if offset % (width + 1) == 0:
            return (eol_token_id,)
        elif offset == (width + 1) * height + 1:
            return (eof_token_id,)
        elif offset == (width + 1) * height + 2:
            return (eoi_token_id,)
        elif offset == (width + 1) * height + 3:
            return (eos_token_id,)
        elif offset > (width + 1) * height + 3:
            return (pad_token_id,)
        else:
            return visual_tokens

    out = model.generate(
        **inputs,
        max_new_tokens=50_000,  # make sure to have enough tokens for one image
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        return_dict_in_generate=True,
        negative_prompt_ids=neg_inputs.input_ids,  # indicate for Classifier-Free Guidance
        negative_prompt_attention_mask=neg_inputs.attention_mask,
    )

    image = model.decode_image_tokens(out.sequences[:, inputs.input_ids.shape[1] :], height=HEIGHT, width=WIDTH)
    images = processor.postprocess(
        list(image.float()), return_tensors="PIL.Image.Image"
    )  # internally we convert to np but it's not supported in bf16 precision
    for i, image in enumerate(images["pixel_values"]):
        image.save(tmp_path / f"result{i}.png")

    drawn = out.sequences[:, inputs.input_ids.shape[1] :]
    assert drawn.shape == (2, 12 * 13 + 3)
    rows = drawn[:, :-3].reshape(2, 12, 13)
    assert rows[..., -1].eq(model.vocabulary_mapping.eol_token_id).all()
    assert set(rows[..., :-1].flatten().tolist()) <= set(VISUAL_TOKENS)
    codes = model.vocabulary_mapping.convert_bpe2img(rows)
    expected = processor.postprocess(model.model.vqmodel.decode(codes))["pixel_values"]
    for i in range(2):
        saved = Image.open(tmp_path / f"result{i}.png")
        assert saved.size == (48, 48)
        assert saved.tobytes() == expected[i].tobytes()
        assert len(saved.getcolors(48 * 48)) > 100


def test_vision_configuration():
    from emu3 import Emu3VQVAE, Emu3VQVAEConfig

    with torch.device("meta"):
        # Initializing a video VQ model of Emu3 configuration
        configuration = Emu3VQVAEConfig()

        # Initializing a model from the Emu3 VQ model style configuration
        model = Emu3VQVAE(configuration)

        # Accessing the model configuration
        configuration = model.config

    assert isinstance(configuration, Emu3VQVAEConfig)
    assert model.quantize.embedding.weight.shape == (32768, 4)


def test_whole_configuration():
    from emu3 import Emu3Config, Emu3Model

    with torch.device("meta"):
        # Initializing a Emu3-community/Emu3-Chat-hf style configuration
        configuration = Emu3Config()

        # Initializing a model from the Emu3-community/Emu3-Chat-hf style configuration
        model = Emu3Model(configuration)

        # Accessing the model configuration
        configuration = model.config

    assert isinstance(configuration, Emu3Config)
    assert model.text_model.embed_tokens.weight.shape == (184622, 4096)


def test_causal_language_model(tiny_checkpoint):
    from emu3 import Emu3ForCausalLM, Emu3ForConditionalGeneration, Emu3Processor

    model = Emu3ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    processor = Emu3Processor.from_pretrained(tiny_checkpoint)

    inputs = processor(text=["Can you write me a poem about winter."], return_tensors="pt").to(model.device)

    generated_ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]

    assert text.startswith("Can you write me a poem about winter.")
    whole = Emu3ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert whole.generate(**inputs, max_new_tokens=10, do_sample=False).tolist() == generated_ids.tolist()


def test_conditional_generation(tiny_checkpoint, requests):
    import torch
    from PIL import Image

    from emu3 import Emu3ForConditionalGeneration, Emu3Processor

    model = Emu3ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    processor = Emu3Processor.from_pretrained(tiny_checkpoint)

    conversation = [
        {
            "role": "system",
            "content": [
                {"type": "text", "text": "You are a helpful assistant."},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "Please describe the image."},
            ],
        },
    ]

    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    image = Image.open(requests.get("https://www.ilankelman.org/stopsigns/australia.jpg", stream=True).raw)

    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device, torch.bfloat16)

    generated_ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]

    # The picture's placeholders are special tokens; its size is text.
    assert text.startswith("You are a helpful assistant. USER: 9*14Please describe the image.. ASSISTANT:")
    assert 1 <= generated_ids.shape[1] - inputs["input_ids"].shape[1] <= 10
