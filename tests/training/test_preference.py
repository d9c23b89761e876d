"""Learning from pairs and from rewards: the losses against formulas by hand in float64, and what they do to a model."""

import copy
import json
import math
import pickle
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu3.checkpoints.load import load_model
from emu3.data.samples import Part, Sample
from emu3.data.shards import ShardInfo, write_shard
from emu3.generation.sampling import Sampling
from emu3.pipeline import Emu3Pipeline
from emu3.segments import Text, Visual
from emu3.testing import write_tiny_checkpoint
from emu3.training.dpo import DPO, DPOSettings, Pair, PairBatches, batch_of, dpo_losses, pair_of, write_pairs
from emu3.training.grpo import (
    GRPO,
    GRPOSettings,
    PromptBatch,
    advantages_of,
    groups_to_learn,
    load_function,
    policy_losses,
)
from emu3.training.kinds import KINDS
from emu3.training.recipe import run_recipe
from emu3.training.scoring import Answers, Reference, Scores, score

RED, TWO = "a photo of a red car", "a photo of a red car and a cat"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny random checkpoint that draws 4x4 tokens."""
    return Emu3Pipeline.from_pretrained(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), side=16))


@pytest.fixture
def fresh(pipeline):
    """A copy that may be trained."""
    return Emu3Pipeline(copy.deepcopy(pipeline.model), pipeline.processor)


def picture(seed, height=4, width=4):
    return Visual(np.random.default_rng(seed).integers(16, size=(1, height, width)))


@pytest.mark.parametrize(
    "scale, floor, sampling",
    [(1.0, 0.0, Sampling(top_k=0)), (3.0, 0.0, Sampling(1.3, top_k=5, top_p=0.9)), (3.0, 0.7, Sampling(top_k=0))],
)
def test_scores_are_what_the_engine_says(pipeline, scale, floor, sampling):
    """Of pictures of two prompts of different length, padded in one batch."""
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    requests = pipeline.draw_requests([RED, TWO], seed=3, guidance_scale=scale, guidance_floor=floor, **options)
    requests = [replace(request, log_probabilities=True) for request in requests]
    drawn = {event.request: event for event in pipeline.engine.stream(requests) if hasattr(event, "log_probabilities")}
    answers = Answers.of(requests, [drawn[n].ids for n in range(2)], pipeline.layout.vocabulary.pad)
    scores = score(pipeline.model, answers, sampling)
    forced = np.concatenate([np.subtract(*request.grammar.span(np.arange(len(drawn[0].ids)))) for request in requests])
    wanted = np.concatenate([drawn[n].log_probabilities for n in range(2)])[forced != -1]
    alone = [pipeline.probabilities(request, drawn[n].ids) for n, request in enumerate(requests)]
    np.testing.assert_allclose(np.log(np.concatenate(alone))[forced != -1], wanted, atol=1e-5)
    np.testing.assert_allclose(scores.log_probabilities.detach().numpy(), wanted, atol=1e-5)
    assert answers.own.tolist() == [0] * 16 + [1] * 16
    assert (scores.entropies <= math.log(5 if sampling.top_k else 16) + 1e-6).all()
    torch.testing.assert_close(answers.sums(torch.ones(32)), torch.tensor([16.0, 16.0]))


def test_a_token_that_others_overtook_still_has_a_probability(pipeline):
    """Drawn when all ids were allowed, scored where only one is: it stands beside that one."""
    requests = pipeline.draw_requests([RED], seed=3, guidance_scale=1)
    (ids,) = (
        event.ids for event in pipeline.engine.stream(requests) if hasattr(event, "ids") and hasattr(event, "reason")
    )
    answers = Answers.of(requests, [ids], pipeline.layout.vocabulary.pad)
    scores = score(pipeline.model, answers, Sampling(top_k=1))
    assert scores.log_probabilities.isfinite().all() and (scores.log_probabilities < -0.5).any()
    (scores.log_probabilities.sum() + scores.entropies.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pipeline.model.parameters())
    pipeline.model.zero_grad()
    with pytest.raises(ValueError, match="temperature 0 leave nothing to learn"):
        score(pipeline.model, answers, Sampling(temperature=0))


def test_answers_that_do_not_go_together_are_refused(pipeline):
    guided, plain = (pipeline.draw_requests([RED], guidance_scale=scale)[0] for scale in (3.0, 1.0))
    ids = plain.grammar.ids_of(picture(0).codes_THW).tolist()
    with pytest.raises(ValueError, match="guided all or none"):
        Answers.of([guided, plain], [ids, ids], 0)
    floored = pipeline.draw_requests([RED], guidance_scale=3.0, guidance_floor=0.1)[0]
    with pytest.raises(ValueError, match=r"one agreement of guidance, got \[\(0.0, 0.0\), \(0.1, 0.0\)\]"):
        Answers.of([guided, floored], [ids, ids], 0)
    with pytest.raises(ValueError, match="does not allow"):
        Answers.of([plain], [[0, *ids[1:]]], 0)


# ---- pairs


def test_dpo_is_its_formula():
    rng = np.random.default_rng(0)
    chosen, rejected, chosen_start, rejected_start = rng.normal(-40, 5, size=(4, 6))
    beta = 0.3
    margin = beta * ((chosen - chosen_start) - (rejected - rejected_start))
    tensors = [torch.tensor(each, requires_grad=True) for each in (chosen, rejected, chosen_start, rejected_start)]
    losses, margins = dpo_losses(*tensors, beta)
    np.testing.assert_allclose(losses.detach(), np.log1p(np.exp(-margin)), rtol=1e-12)
    np.testing.assert_allclose(margins.detach(), margin, rtol=1e-12)
    losses.sum().backward()
    slope = -beta / (1 + np.exp(margin))  # what raises the margin lowers the loss
    np.testing.assert_allclose(tensors[0].grad, slope, rtol=1e-10)
    np.testing.assert_allclose(tensors[1].grad, -slope, rtol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_objective_of_pairs_is_the_formula_on_whole_pictures(pipeline, fresh, scale):
    """Against `Emu3Pipeline.probabilities`, of a model that has moved from its start; pictures of two sizes."""
    settings = DPOSettings(beta=0.2, guidance_scale=scale, sft=0.5)
    pairs = [Pair("a", RED, picture(1), picture(2)), Pair("b", TWO, picture(3, 3, 4), picture(4, 3, 4))]
    batch = batch_of(pairs, pipeline.layout, settings)
    objective = DPO(fresh.model, settings, Reference(fresh.model, pipeline.model))
    assert float(objective(batch).loss.detach()) == pytest.approx(_dpo_by_hand(pipeline, pipeline, pairs, settings))
    with torch.no_grad():
        for parameter in fresh.model.model.text_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    result = objective(batch)
    assert float(result.loss.detach()) == pytest.approx(_dpo_by_hand(fresh, pipeline, pairs, settings), rel=1e-4)
    assert float(result.weight) == 2
    assert set(result.metrics) == {"loss", "margin", "told_apart", "chosen_gain", "rejected_gain"}


def _dpo_by_hand(now, start, pairs, settings):
    total = 0.0
    for pair in pairs:
        sums = {}
        for name, visual in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            codes = visual.codes_THW[0]
            size = {"height": 4 * codes.shape[0], "width": 4 * codes.shape[1]}
            (request,) = now.draw_requests(pair.prompt, guidance_scale=settings.guidance_scale, top_k=0, **size)
            ids = request.grammar.ids_of(codes[None]).tolist()
            sums[name] = [np.log(each.probabilities(request, ids).astype(np.float64)).sum() for each in (now, start)]
        margin = settings.beta * ((sums["chosen"][0] - sums["chosen"][1]) - (sums["rejected"][0] - sums["rejected"][1]))
        total += math.log1p(math.exp(-margin)) - settings.sft * sums["chosen"][0] / pair.chosen.codes_THW.size
    return total


def test_a_model_learns_a_preference(pipeline, fresh):
    settings = DPOSettings(beta=0.5)
    batch = batch_of([Pair(str(n), RED, picture(n), picture(n + 9)) for n in range(3)], pipeline.layout, settings)
    objective = DPO(fresh.model, settings, Reference(fresh.model, pipeline.model))
    objective.train()
    assert not fresh.model.training
    optimizer = torch.optim.AdamW(fresh.model.model.text_model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        result = objective(batch)
        (result.loss / result.weight).backward()
        optimizer.step()
    margin, told_apart = (float(torch.div(*result.metrics[name])) for name in ("margin", "told_apart"))
    assert told_apart == 1 and margin > 2


def test_adapters_that_are_switched_off_are_the_model_at_the_start(pipeline, fresh):
    """And merged, they are what the engine draws with."""
    from peft import LoraConfig, inject_adapter_in_model

    reference, settings = Reference(fresh.model, None), DPOSettings()
    answers = batch_of([Pair("a", RED, picture(1), picture(2))], pipeline.layout, settings).answers
    with pytest.raises(ValueError, match=r"no adapters to switch off; .* or compare with a copy"):
        reference.score(answers, settings.sampling)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False), fresh.model)
    wanted = score(pipeline.model, answers, settings.sampling).log_probabilities
    torch.testing.assert_close(reference.score(answers, settings.sampling).log_probabilities, wanted)
    assert (score(fresh.model, answers, settings.sampling).log_probabilities - wanted).abs().max() > 0.01
    result = GRPO(fresh, GRPOSettings(group=4), brightness, reference)(prompts(0))
    assert float(torch.div(*result.metrics["moved"])) < 1e-4 < float(torch.div(*result.metrics["kl"]))


def test_pairs_come_from_shards(pipeline, tmp_path):
    info = ShardInfo(tokenizer="t", codebook_size=16, settings="s", source="pairs")
    samples = [_sample(n) for n in range(5)]
    write_shard(tmp_path / "0.parquet", info, samples[:2])
    write_shard(tmp_path / "1.parquet", info, samples[2:])
    paths = (tmp_path / "0.parquet", tmp_path / "1.parquet")
    make_batch = PairBatches(paths, pipeline.layout, DPOSettings(), seed=1, batch_size=6)
    batch = make_batch(3, 0)
    places = [key.split(":", 2) for key in batch.keys]  # file, place in all, the pair's own key
    assert len(places) == 6
    found = [samples[int(index)] for _, index, _ in places]
    assert [sample.key for sample in found] == [own for _, _, own in places]
    pairs = [pair_of(sample) for sample in found]
    assert torch.equal(batch.answers.ids_BS, batch_of(pairs, pipeline.layout, DPOSettings()).answers.ids_BS)
    again = pickle.loads(pickle.dumps(make_batch))(3, 0)
    assert again.keys == batch.keys and torch.equal(again.answers.ids_BS, batch.answers.ids_BS)
    assert make_batch(3, 1).keys != batch.keys
    with pytest.raises(ValueError, match="'half' is no pair"):
        pair_of(Sample("half", samples[0].parts[:2]))
    with pytest.raises(ValueError, match="no pairs in"):
        PairBatches((), pipeline.layout, DPOSettings())(0, 0)


def _sample(n):
    return Sample(
        f"pair {n}", (Part("prompt", Text(RED)), Part("draw", picture(n)), Part("draw", picture(n + 50), train=False))
    )


# ---- rewards


def test_advantages_and_the_groups_that_teach():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    wanted = [[0.5, 0.5, -0.5, -0.5], [0.0] * 4, [0.75, -0.25, -0.25, -0.25]]
    torch.testing.assert_close(advantages_of(rewards, divide=False), torch.tensor(wanted))
    divided = advantages_of(rewards, divide=True)
    torch.testing.assert_close(divided[0], torch.tensor([1.0, 1.0, -1.0, -1.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(divided[2, 0], torch.tensor(3**0.5), atol=1e-4, rtol=0)
    assert groups_to_learn(rewards, None) == [0, 2]
    assert groups_to_learn(rewards, 1) == [0]


def test_grpo_is_its_formula():
    rng = np.random.default_rng(1)
    new, reference = rng.normal(-2, 0.5, size=(2, 40))
    old = new + rng.normal(0, 0.3, size=40)
    advantages, entropies = rng.normal(size=40), rng.uniform(size=40)
    settings = GRPOSettings(clip_low=0.2, clip_high=0.28, kl=0.1, entropy=0.05)
    new_T = torch.tensor(new, requires_grad=True)
    others = [torch.tensor(each) for each in (entropies, old, advantages, reference)]
    losses, metrics = policy_losses(Scores(new_T, others[0]), *others[1:3], settings, others[3])
    ratio = np.exp(new - old)
    gain = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.28) * advantages)
    kl = ratio * (np.exp(reference - new) - (reference - new) - 1)
    np.testing.assert_allclose(losses.detach(), -gain + 0.1 * kl - 0.05 * entropies, rtol=1e-10)
    clipped = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    np.testing.assert_array_equal(metrics["clipped"], clipped)
    losses.sum().backward()
    slope = np.where(clipped, 0, -ratio * advantages) + 0.1 * ratio * (new - reference)  # that of the distance itself
    np.testing.assert_allclose(new_T.grad, slope, rtol=1e-9, atol=1e-12)


def brightness(prompt, image):
    """A reward that any model can earn."""
    return float(np.asarray(image).mean()) / 255


def brightness_apart(prompt, images):
    means = [float(np.asarray(image).mean()) / 255 for image in images]
    return [sum(abs(one - other) for other in means) for one in means]


def prompts(step, part=0):
    return PromptBatch(step, part, [RED, TWO], 1000 * step)


def test_the_first_loss_moves_nothing_by_itself(fresh, pipeline):
    """New and old probabilities agree, so the loss is the mean of advantages, and the distance is zero."""
    objective = GRPO(fresh, GRPOSettings(group=4), brightness, Reference(fresh.model, pipeline.model))
    result = objective(prompts(0))
    assert float(torch.div(*result.metrics["moved"])) < 1e-5
    assert float(torch.div(*result.metrics["kl"])) < 1e-6
    assert abs(float(result.loss.detach() / result.weight)) < 1e-4
    assert float(result.metrics["reward"][1]) == 8
    assert set(dict(objective.named_parameters())) == {f"model.{name}" for name, _ in fresh.model.named_parameters()}


def test_pictures_are_drawn_once_for_all_updates_of_a_rollout(fresh):
    settings = GRPOSettings(group=4, critical=0.25, most_groups=1)
    objective = GRPO(fresh, settings, brightness)
    results = [objective(prompts(number, part)) for number, part in ((0, 0), (0, 1), (0, 0))]
    assert ["reward" in result.metrics for result in results] == [True, True, False]
    assert torch.equal(results[0].loss, results[2].loss)
    learned = [float(result.weight) for result in results if result.size]
    assert learned and all(8 <= weight <= 20 for weight in learned)  # a quarter of 4 pictures of 16 tokens, and ties
    with torch.no_grad():
        fresh.model.model.text_model.norm.weight.mul_(0.5)
    moved = objective(prompts(0)).metrics["moved"]
    assert float(torch.div(*moved)) > 0.01


def test_a_model_learns_what_is_rewarded(fresh, pipeline):
    """And a group reward changes what is learned from."""
    settings = GRPOSettings(group=8, kl=0.01, guidance_scale=2.0, decoding="raster", divide=True)
    objective = GRPO(fresh, settings, brightness, Reference(fresh.model, pipeline.model))
    optimizer = torch.optim.AdamW(fresh.model.model.text_model.parameters(), lr=5e-3)
    rewards = []
    for step in range(8):
        optimizer.zero_grad()
        result = objective(prompts(step))
        rewards.append(float(torch.div(*result.metrics["reward"])))
        (result.loss / result.weight).backward()
        optimizer.step()
    assert np.mean(rewards[-3:]) > max(rewards[:3])
    apart = GRPO(fresh, GRPOSettings(group=4, group_reward=0.5), lambda *_: 1.0, None, brightness_apart)(prompts(99))
    assert float(apart.metrics["reward"][0]) == 8 and float(apart.metrics["group_reward"][0]) > 0 and apart.size > 0


def test_all_right_teaches_nothing(fresh):
    result = GRPO(fresh, GRPOSettings(group=2), lambda *_: 1.0)(prompts(0))
    assert (float(result.loss.detach()), float(result.weight), result.size) == (0, 1, 0)
    result.loss.backward()


def test_functions_by_name(tmp_path, monkeypatch):
    assert load_function("math:sqrt") is math.sqrt
    (tmp_path / "rewards_of_mine.py").write_text("def five(prompt, picture):\n    return 5.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    assert load_function("rewards_of_mine:five")("a cat", None) == 5
    for name in ("math", "math:nothing", "nowhere.at.all:f", "math:pi"):
        with pytest.raises(ValueError, match="give module:function"):
            load_function(name)


# ---- recipes


def run(folder, kinds, **fields):
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items() if not isinstance(value, dict)]
    tables = [
        f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(each)}" for key, each in value.items())
        for name, value in fields.items()
        if isinstance(value, dict)
    ]
    path = folder / "recipe.toml"
    path.write_text("\n".join(['kind = "preference"', 'output = "out"', "warmup = 1", *lines, *tables]))
    return run_recipe(path, kinds)


def test_recipe_of_rewards(pipeline, tmp_path):
    """Draws and learns, leaves a checkpoint whose embeddings are as they were, and refuses what cannot run."""
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", side=16)
    (tmp_path / "words.txt").write_text(f"{RED}\n\n {TWO}\n")
    fields = {"checkpoint": str(checkpoint), "method": "grpo", "prompts": "words.txt", "steps": 2, "batch_size": 1}
    fields |= {"reward": "tests_of_rewards:brightness", "learning_rate": 1e-2, "report_every": 1}
    fields["grpo"] = {"group": 4, "divide": True}
    module = types.ModuleType("tests_of_rewards")
    module.brightness = brightness
    sys.modules[module.__name__] = module
    try:
        out = run(tmp_path, KINDS, **fields)
    finally:
        del sys.modules[module.__name__]
    trained = Emu3Pipeline.from_pretrained(out)
    assert torch.equal(trained.model.lm_head.weight, pipeline.model.lm_head.weight)
    changed = trained.model.model.text_model.layers[0].mlp.up_proj.weight
    assert (changed - pipeline.model.model.text_model.layers[0].mlp.up_proj.weight).abs().max() > 1e-3
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"reward", "right", "kl", "clipped", "entropy", "seconds_drawing"} <= set(log[0])
    for wrong, message in (
        ({"reward": "math:pi"}, "is no function"),
        ({"prompts": "nowhere.txt"}, "no such file"),
        ({"method": "ppo"}, "method"),
        ({"method": "dpo"}, "data is missing"),
        ({"method": "dpo", "data": ["nowhere"]}, "holds no shards"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, KINDS, **{**fields, "reward": "math:sqrt", **wrong})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by old names
def test_recipe_of_pairs(tmp_path):
    """With adapters: leaves PEFT's two files."""
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", side=16)
    tokenizer = load_model(checkpoint).model.vqmodel
    write_pairs(tmp_path / "pairs", [pair_of(_sample(n)) for n in range(2)], tokenizer)
    fields = {"checkpoint": str(checkpoint), "method": "dpo", "data": ["pairs"], "steps": 6, "batch_size": 2}
    out = run(tmp_path, KINDS, **fields, rank=2, learning_rate=3e-2, report_every=2, dpo={"beta": 0.5})
    assert (out / "adapter_model.safetensors").is_file() and (out / "adapter_config.json").is_file()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > log[-1]["loss"] and log[-1]["margin"] > 0
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1)
    write_pairs(tmp_path / "pairs", [pair_of(_sample(n)) for n in range(2)], tokenizer)
    with pytest.raises(ValueError, match="shards of another tokenizer"):
        run(tmp_path, KINDS, **fields)
