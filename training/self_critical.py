"""Self-critical training of a caption adapter: captions are sampled and the better ones made likelier.

The gradient is that of the expected CIDEr-D (arXiv 1612.00563), with the mean reward of an image's other samples as the
baseline of each (arXiv 2003.09971). It starts from an adapter that was trained on the references.

Shapes: B images, n samples an image, T tokens, F width of the image features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmadapter.adapter import select_prompts
from mmadapter.data import IGNORE_INDEX, Batch, Example, collate
from mmadapter.generate import Sampler, Sampling
from mmadapter.loss import cross_entropy_sum
from mmadapter.model import AdaptedLlama
from mmadapter.tokenizer import Tokenizer
from training.cider import CiderD


class SelfCritical:
    """The loss of one step.

    Args:
        question: Prompt tokens, the same for every image.
        reward: CIDEr-D over the training images.
        samples: Captions drawn for each image, n.
        max_new_tokens: Longest caption in tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, question: list[int], reward: CiderD, *, samples: int, max_new_tokens: int = 30
    ) -> None:
        if samples < 2:
            raise ValueError(f"each sample is compared with the image's others, so two are needed, got {samples}")
        self.tokenizer, self.question, self.reward = tokenizer, question, reward
        self.samples, self.max_new_tokens = samples, max_new_tokens

    def __call__(
        self, model: AdaptedLlama, batch: Batch, features: Tensor | None, has_image: Tensor | None, seed: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, a mean over samples, and the mean reward; see `engine.Objective`."""
        images = batch.images.tolist()
        prompts = model.adapter.prompts(model.llama, features, has_image=has_image)
        rows = torch.arange(len(images)).repeat_interleave(self.samples)  # [B * n]
        with torch.no_grad():
            answers = self._sample(model, select_prompts(prompts, rows), len(rows), seed)
        stops = self.tokenizer.stop_ids
        texts = [self.tokenizer.decode([token for token in answer if token not in stops]) for answer in answers]
        rewards = torch.tensor([self.reward.score(images[row], text) for row, text in zip(rows, texts, strict=True)])
        rewards = rewards.view(len(images), self.samples)
        others = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        advantages = (rewards - others).flatten()  # [B * n]

        drawn = collate([Example((*self.question, *answer), len(self.question)) for answer in answers])
        targets = drawn.labels[:, 1:]
        wanted = targets != IGNORE_INDEX
        hidden = model.llama.hidden(drawn.tokens[:, :-1], prompts=select_prompts(prompts, rows))
        share = advantages[wanted.nonzero()[:, 0]] / len(rows)  # [targets]
        loss = cross_entropy_sum(hidden[wanted], model.llama.output_weight, targets[wanted], scale=share)
        return loss, {"reward": rewards.mean().item()}

    def _sample(self, model: AdaptedLlama, prompts, count: int, seed: int) -> list[list[int]]:
        """`count` captions drawn at temperature 1, with the stop token that ended each, if one did."""
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=1.0)
        sampler = Sampler(
            model.llama, [self.question] * count, sampling, prompts, seeds=[seed + row for row in range(count)]
        )
        answers: list[list[int]] = [[] for _ in range(count)]
        for _ in range(self.max_new_tokens):
            chosen = sampler.step()
            for row, token in chosen.items():
                answers[row].append(token)
            sampler.drop({row for row, token in chosen.items() if token in self.tokenizer.stop_ids})
            if not sampler.active:
                break
        return answers
