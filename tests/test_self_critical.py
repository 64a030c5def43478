"""Self-critical training: the gradient is the policy gradient, and what is rewarded becomes likelier."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from mmadapter.data import IGNORE_INDEX, Batch
from mmadapter.generate import Sampler
from mmadapter.model import AdaptedLlama
from training.self_critical import SelfCritical

SHAPE = tiny.config(vocab_size=12)
QUESTION = [3, 7, 5]
LONGEST = 4
STOPS = frozenset({0, 1})  # two, as chat models have: the end of the text and the end of a turn


class Letters:
    """A tokenizer whose token i is the i-th letter; stop tokens are letters as well, so that a stray one is seen."""

    eos_id = 0
    stop_ids = STOPS

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


class Reward:
    """Any function of image and text; it remembers what it was asked."""

    def __init__(self, of) -> None:
        self.of, self.asked = of, []

    def score(self, image: int, text: str) -> float:
        self.asked.append((image, text))
        return float(self.of(image, text))


def varied(image: int, text: str) -> float:
    """Differs between nearly all texts, and between images."""
    return len(text) + 0.7 * text.count("c") - 0.3 * text.count("h") + 0.1 * image * text.count("e") + image


def adapted() -> AdaptedLlama:
    return AdaptedLlama(tiny.llama(SHAPE), tiny.adapter(SHAPE, image=True).requires_grad_(True)).train()


def batch_of(images: list[int]) -> Batch:
    """Only the images matter: captions are drawn, not read."""
    tokens = torch.ones(len(images), 2, dtype=torch.long)
    labels = torch.tensor([[IGNORE_INDEX, 1]]).expand(len(images), -1)
    return Batch(tokens, labels, torch.tensor(images))


def gradients(model: AdaptedLlama, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.adapter.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def drawn(monkeypatch):
    """The tokens that the sampler chooses, by row."""
    answers: dict[int, list[int]] = {}
    step = Sampler.step

    def watched(sampler: Sampler) -> dict[int, int]:
        chosen = step(sampler)
        for row, token in chosen.items():
            answers.setdefault(row, []).append(token)
        return chosen

    monkeypatch.setattr(Sampler, "step", watched)
    return answers


def test_the_gradient_is_that_of_advantage_times_log_probability(drawn):
    """One row at a time, token by token: -1/n sum of (reward - mean of the image's others) * log p(answer).

    Guards against an end of sequence that was never drawn (another stop token was, or the answer filled the room) being
    learnt with the rest, and against a row's advantage meeting another row's tokens.
    """
    images, samples = [4, 9, 2], 5
    model, features = adapted(), tiny.features(3)
    objective = SelfCritical(Letters(), QUESTION, Reward(varied), samples=samples, max_new_tokens=LONGEST)
    loss, figures = objective(model, batch_of(images), features, None, seed=11)
    got = gradients(model, loss)

    assert {answer[-1] for answer in drawn.values()} >= STOPS, "both stop tokens must occur"
    assert any(len(answer) == LONGEST and answer[-1] not in STOPS for answer in drawn.values()), "and one that was cut"
    assert not any(STOPS.intersection(answer[:-1]) for answer in drawn.values()), "each of them ends its answer"
    total, rewards = torch.zeros(()), []
    for place, image in enumerate(images):
        answers = [drawn[place * samples + number] for number in range(samples)]
        texts = [Letters().decode([token for token in answer if token not in STOPS]) for answer in answers]
        scores = [varied(image, text) for text in texts]
        rewards += scores
        for number, answer in enumerate(answers):
            others = [score for index, score in enumerate(scores) if index != number]
            advantage = scores[number] - sum(others) / len(others)
            prompts = model.adapter.prompts(model.llama, features[place : place + 1])
            for index, token in enumerate(answer):
                logits = model.llama(torch.tensor([[*QUESTION, *answer[:index]]]), prompts=prompts)[0, -1]
                total = total - advantage * logits.log_softmax(-1)[token]
    expected = total / (len(images) * samples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert figures["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert_same(got, gradients(model, expected))
    assert all(gradient.abs().sum() > 1e-3 for gradient in got.values())


def test_the_reward_sees_each_image_and_the_text_without_its_stop_token(drawn):
    reward = Reward(varied)
    objective = SelfCritical(Letters(), QUESTION, reward, samples=3, max_new_tokens=LONGEST)
    objective(adapted(), batch_of([8, 6]), tiny.features(2), None, seed=2)
    assert [image for image, _ in reward.asked] == [8, 8, 8, 6, 6, 6]
    assert any(answer[-1] in STOPS for answer in drawn.values())
    expected = [Letters().decode([token for token in drawn[row] if token not in STOPS]) for row in range(6)]
    assert [text for _, text in reward.asked] == expected


def test_advantages_of_an_image_sum_to_zero():
    """A reward that is the same for every text moves nothing, nor does a constant added to an image's rewards."""
    model = adapted()

    def gradient_of(of) -> dict[str, Tensor]:
        objective = SelfCritical(Letters(), QUESTION, Reward(of), samples=4, max_new_tokens=LONGEST)
        return gradients(model, objective(model, batch_of([0, 1]), tiny.features(2), None, seed=5)[0])

    assert all(gradient.abs().max() < 1e-5 for gradient in gradient_of(lambda image, text: 3.0 + image).values())
    assert_same(gradient_of(varied), gradient_of(lambda image, text: varied(image, text) + 100 * image - 7))


def test_rewards_of_two_images_do_not_mix():
    """Half the batch's gradient is that of an image alone, when nothing distinguishes the other image's captions."""
    model, features = adapted(), tiny.features(2)

    def gradient_of(images: list[int], features: Tensor, seed: int) -> dict[str, Tensor]:
        reward = Reward(lambda image, text: 50.0 if image == 0 else varied(image, text))
        objective = SelfCritical(Letters(), QUESTION, reward, samples=4, max_new_tokens=LONGEST)
        return gradients(model, objective(model, batch_of(images), features, None, seed)[0])

    both = gradient_of([0, 1], features, seed=20)
    alone = gradient_of([1], features[1:], seed=24)  # the same streams: row r draws from seed + r
    assert_same(both, {name: gradient / 2 for name, gradient in alone.items()})


def test_what_is_rewarded_becomes_likelier():
    liked = 5
    model, features = adapted(), tiny.features(3)
    reward = Reward(lambda image, text: text.count(Letters().decode([liked])) / max(1, len(text)))
    objective = SelfCritical(Letters(), QUESTION, reward, samples=6, max_new_tokens=LONGEST)
    optimizer = torch.optim.Adam(model.adapter.parameters(), lr=0.03)

    def frequency() -> float:
        reward.asked.clear()
        for seed in range(10):
            objective(model, batch_of([0, 1, 2]), features, None, seed=1_000_000 + 100 * seed)
        text = "".join(text for _, text in reward.asked)
        return text.count(Letters().decode([liked])) / len(text)

    before = frequency()
    for step in range(25):
        loss, _ = objective(model, batch_of([0, 1, 2]), features, None, seed=1000 * step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.3
    assert frequency() > 2 * before + 0.1


def test_sampling_depends_on_the_seed_alone():
    """A resumed run must draw the captions that an uninterrupted one draws."""
    model, features = adapted(), tiny.features(2)

    def draw(seed: int) -> tuple[list[str], dict[str, Tensor]]:
        reward = Reward(varied)
        objective = SelfCritical(Letters(), QUESTION, reward, samples=4, max_new_tokens=LONGEST)
        loss, _ = objective(model, batch_of([0, 1]), features, None, seed)
        return [text for _, text in reward.asked], gradients(model, loss)

    texts, gradient = draw(7)
    torch.manual_seed(123)
    again, same = draw(7)
    assert again == texts
    assert all(torch.equal(gradient[name], same[name]) for name in gradient)
    assert draw(8)[0] != texts
    assert len(set(texts[:4])) > 1, "the samples of one image must differ"


def test_captions_are_drawn_from_the_models_own_distribution(drawn):
    """The policy gradient holds for samples at temperature 1 only: colder ones overrate what is likely already."""
    model, features, samples = adapted(), tiny.features(1), 4000
    objective = SelfCritical(Letters(), QUESTION, Reward(varied), samples=samples, max_new_tokens=1)
    objective(model, batch_of([0]), features, None, seed=1)
    prompts = model.adapter.prompts(model.llama, features)
    logits = model.llama(torch.tensor([QUESTION]), prompts=prompts)[0, -1]
    counts = torch.bincount(torch.tensor([answer[0] for answer in drawn.values()]), minlength=SHAPE.vocab_size)
    off = (counts / samples - logits.softmax(-1)).abs().sum()
    colder = ((logits / 0.7).softmax(-1) - logits.softmax(-1)).abs().sum()
    assert off < 0.06 < colder / 2


def test_a_text_adapter_learns_without_images():
    model = AdaptedLlama(tiny.llama(SHAPE), tiny.adapter(SHAPE))
    objective = SelfCritical(Letters(), QUESTION, Reward(varied), samples=3, max_new_tokens=LONGEST)
    loss, _ = objective(model, batch_of([0, 1]), None, None, seed=1)
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("samples", [1, 0])
def test_fewer_than_two_samples_are_an_error(samples):
    with pytest.raises(ValueError, match=f"two are needed, got {samples}"):
        SelfCritical(Letters(), QUESTION, Reward(varied), samples=samples)
