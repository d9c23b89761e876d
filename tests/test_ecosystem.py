"""The tools that people train and quantize models with work on these classes as on those of transformers."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TorchAoConfig, Trainer, TrainingArguments

from emu3 import Emu3ForConditionalGeneration, Emu3Pipeline, Emu3Processor
from emu3.checkpoints import resolve
from emu3.icons.scenes import Scene, SceneObject, render

# Their own warnings are theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

PICTURES = [
    Image.fromarray(render(Scene((SceneObject(noun, color, 8, 16),), "white")))
    for noun, color in (("cat", "red"), ("dog", "blue"), ("car", "red"), ("tree", "blue"))
]
ANSWERS = ["a red cat", "a blue dog", "a red car", "a blue tree"]

RUN = {
    "max_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def conversation(answer):
    asked = {"role": "user", "content": "What is it?"}
    return [asked, {"role": "assistant", "content": answer}]


def losses(folder: Path):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(tiny_checkpoint, tmp_path):
    processor = Emu3Processor.from_pretrained(tiny_checkpoint)

    def samples(pairs):
        turns = [
            [
                {"role": "user", "content": [{"type": "image", "image": picture}]},
                {"role": "assistant", "content": answer},
            ]
            for picture, answer in pairs
        ]
        batch = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        return {**batch, "labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}

    def run(folder, checkpoint=None):
        model = Emu3ForConditionalGeneration.from_pretrained(tiny_checkpoint)
        arguments = TrainingArguments(str(folder), **RUN, save_steps=2, learning_rate=1e-2, remove_unused_columns=False)
        data = list(zip(PICTURES, ANSWERS, strict=True))
        Trainer(model, arguments, train_dataset=data, data_collator=samples).train(resume_from_checkpoint=checkpoint)
        return model

    before = Emu3ForConditionalGeneration.from_pretrained(tiny_checkpoint).state_dict()
    whole = run(tmp_path / "whole").state_dict()
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2")).state_dict()
    saved = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-4").state_dict()
    fell = losses(tmp_path / "whole" / "checkpoint-4")
    assert fell[-1] < fell[0] - 0.3
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
        assert torch.equal(tensor, saved[name]), name
        assert torch.equal(tensor, before[name]) == (".vqmodel." in name), name


def test_trl_fine_tunes_on_pairs_of_picture_and_text(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def rows(pictures):
        pairs = zip(pictures, ANSWERS, strict=True)
        return Dataset.from_list([{"messages": conversation(answer), "images": [shown]} for shown, answer in pairs])

    folder = resolve("nano")
    processor = Emu3Processor.from_pretrained(folder)
    model = Emu3ForConditionalGeneration.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = SFTConfig(str(tmp_path), **RUN, save_steps=4, learning_rate=1e-3, bf16=False)
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows(PICTURES), processing_class=processor)
    batches = [trainer.data_collator(list(rows(pictures))) for pictures in (PICTURES, PICTURES[::-1])]
    with torch.no_grad():
        first, swapped = (float(model.eval()(**batch).loss) for batch in batches)
    assert abs(first - swapped) > 1e-3  # the pictures reach the model
    trainer.train()
    fell = losses(tmp_path / "checkpoint-4")
    assert fell[-1] < fell[0]
    tuned = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    processor = Emu3Processor.from_pretrained(tmp_path / "checkpoint-4")
    assert processor.image_processor.spatial_factor == 4
    assert {name for name in tuned if not torch.equal(tuned[name], before[name])} == {
        name for name in tuned if ".vqmodel." not in name
    }


def test_torchao_quantizes_the_matrices_of_the_layers_only():
    from torchao.quantization import Int8WeightOnlyConfig

    folder = resolve("nano")
    plain = Emu3ForConditionalGeneration.from_pretrained(folder)
    quantized = Emu3ForConditionalGeneration.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    ordinary = {name for name, weight in quantized.named_parameters() if type(weight.data) is torch.Tensor}
    converted = {name for name, _ in plain.named_parameters()} - ordinary
    layers = plain.model.text_model.layers
    assert converted == {
        f"model.text_model.layers.{name}" for name, weight in layers.named_parameters() if weight.ndim == 2
    }
    processor = Emu3Processor.from_pretrained(folder)
    asked = ("What is in the picture?", PICTURES[:1])
    answers = {Emu3Pipeline(model.eval(), processor).chat(asked) for model in (plain, quantized)}
    assert len(answers) == 1
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = plain(ids).logits, quantized(ids).logits
    assert not torch.equal(expected, found)
    assert (expected - found).norm() / expected.norm() < 0.02
