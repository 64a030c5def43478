"""One loaded model for every use: logits, captions, answers, chat.

A `Session` holds the base, the tokenizer, the adapter in use and its image encoder. Switching adapters leaves the base
where it is, and sessions with other adapters can share it (`with_adapter`). Image features are kept for the last
images, so that many questions about one image encode it once. What is asked in which words stands in `wording`.

Shapes: B batch, T tokens, C width, V vocabulary, F width of the image features.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mmadapter import generate as decoding
from mmadapter import wording
from mmadapter.adapter import Adapter, Prompts
from mmadapter.checkpoint import AdapterFile, Fingerprint, find_adapter, load_adapter
from mmadapter.choices import log_likelihoods
from mmadapter.config import VisionConfig
from mmadapter.features import KeptFeatures
from mmadapter.generate import Generated
from mmadapter.image import ImageSource
from mmadapter.llama import Llama
from mmadapter.quantised import check_dtype, load_llama
from mmadapter.sampling import Sampling
from mmadapter.tokenizer import Tokenizer
from mmadapter.vision import ImageEncoder, load_encoder
from mmadapter.weights import open_weights
from mmadapter.wording import Prepared

KEPT_IMAGES = 64  # images whose features a session keeps


class Choice(NamedTuple):
    """An answer out of given choices.

    Attributes:
        text: The choice.
        index: Its place in the list.
        probabilities: Of each choice, summing to 1.
    """

    text: str
    index: int
    probabilities: list[float]


def load(
    llama: str = "smollm2-135m",
    adapter: str | Path | None = None,
    vision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    prompt_length: int = 10,
    gate: str = "tanh",
) -> Session:
    """Loads a base model and, if wanted, an adapter with its image encoder.

    Args:
        llama: Spec of the base (DESIGN, section 4): a store name, `hf:ORG/NAME`, a folder or a file.
        adapter: Name, folder or file of an adapter; None is the base model alone.
        vision: Spec of the image encoder, in place of the one that the adapter names.
        device: Such as "cpu", "cuda", "cuda:1".
        dtype: "float32" or "bfloat16", of base and encoder; "int8" or "int4" for a base whose weights stay packed
            (`quantised`), beside an encoder in bfloat16.
        prompt_length: K of an official LLaMA-Adapter `.pth`, which does not name it.
        gate: Gate variant of such a file: "tanh", "identity" or "scalar".

    Raises:
        FileNotFoundError: A file, folder or adapter is not there.
        ValueError: Weights are damaged or do not fit together, or an argument is out of range.
        ConnectionError: Weights have to be fetched and there is no network.
    """
    check_dtype(dtype, device)
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if adapter is not None:
        find_adapter(adapter)  # a name that is not there is told before the base is fetched and loaded
    weights = open_weights(llama)
    model = load_llama(weights, dtype, place)
    session = Session(model, weights.tokenizer(), spec=llama, vision=vision, prompt_length=prompt_length, gate=gate)
    session.adapter(adapter)
    return session


class Session:
    """See the module; `load` makes one.

    Attributes:
        strength: Factor on the gates and on what the tuning changes: 0 is the base model, 1 the adapter as trained.
        adapter_name: Of the adapter in use, None for the base model.
        adapter_module: Its parameters, None for the base model.
        about: The metadata of that adapter, None for the base model.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        spec: str = "",
        vision: str | None = None,
        prompt_length: int = 10,
        gate: str = "tanh",
    ) -> None:
        self.llama, self.spec = llama, spec
        self._tokenizer = tokenizer
        self.fingerprint = Fingerprint.of(llama.config, tokenizer.tokens() if tokenizer is not None else None)
        self.strength = 1.0
        self.adapter_name: str | None = None
        self.about: AdapterFile | None = None
        self.adapter_module: Adapter | None = None
        self._encoder: ImageEncoder | None = None
        self._vision, self._prompt_length, self._gate = vision, prompt_length, gate
        self._features = KeptFeatures()
        self._encoders: WeakValueDictionary[VisionConfig, ImageEncoder] = WeakValueDictionary()  # of all siblings

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer.

        Raises:
            ValueError: The base came without one.
        """
        if self._tokenizer is None:
            raise ValueError(f"{self.spec} has no tokenizer, so it takes token ids only (Session.logits)")
        return self._tokenizer

    @property
    def encoder(self) -> ImageEncoder:
        """The image encoder of the adapter in use.

        Raises:
            ValueError: No adapter is in use, or it does not see.
        """
        if self.adapter_module is None:
            raise ValueError("the base model alone cannot see; load an adapter with an image encoder (caption)")
        if self._encoder is None:
            raise ValueError(f"adapter {self.adapter_name} was trained without images; load one that sees (caption)")
        return self._encoder

    def adapter(self, name: str | Path | None) -> None:
        """Switches to another adapter, or with None to the base model; the base stays loaded.

        Raises:
            FileNotFoundError, ValueError, ConnectionError: As `load`; the adapter in use then stays.
        """
        if name is None:
            self.adapter_module = self._encoder = self.about = self.adapter_name = None
            return
        adapter, about = load_adapter(
            name, self.llama.config, self.fingerprint, prompt_length=self._prompt_length, gate=self._gate
        )
        encoder = None
        if about.vision is not None:
            vision = dataclasses.replace(about.vision, encoder=self._vision or about.vision.encoder)
            encoder = self._encoders.get(vision)
            if encoder is None:
                encoder = load_encoder(vision, dtype=self.llama.dtype, device=self.llama.device)
            trained = len(adapter.projection.feature_mean)
            if sum(encoder.widths) != trained:
                raise ValueError(
                    f"adapter {name} was trained on {trained} image features of {about.vision.encoder}; "
                    f"{vision.encoder} gives {sum(encoder.widths)}"
                )
            self._encoders[vision] = encoder
        self.adapter_module, self._encoder = adapter.to(self.llama.device), encoder
        self.about, self.adapter_name = about, str(name)

    def with_adapter(self, name: str | Path | None) -> Session:
        """A session of the same strength with another adapter in use, or with None none; this one stays as it is.

        The two share all they can: base, tokenizer, kept image features, and the encoder where both read images alike.

        Raises:
            FileNotFoundError, ValueError, ConnectionError: As `load`.
        """
        sibling = copy.copy(self)
        if name is None or str(name) != self.adapter_name:
            sibling.adapter(name)
        return sibling

    @torch.inference_mode()
    def logits(self, token_ids: Tensor, images: Sequence[ImageSource | None] | ImageSource | None = None) -> Tensor:
        """Next-token logits.

        Args:
            token_ids: [B, T].
            images: One for each row, None for a row without; or one image where B is 1.

        Returns:
            float32 [B, T, V].

        Raises:
            ValueError: The ids are not [B, T] or outside the vocabulary, or the images are not one a row.
        """
        if not isinstance(token_ids, Tensor):
            raise ValueError(f"token_ids must be a LongTensor [B, T], got a {type(token_ids).__name__}")
        if token_ids.ndim != 2 or token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"token_ids must be a LongTensor [B, T], got {token_ids.dtype} of shape {tuple(token_ids.shape)}"
            )
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.llama.config.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.llama.config.vocab_size - 1}")
        rows = images if isinstance(images, (list, tuple)) else [images] * (1 if images is not None else len(token_ids))
        if len(rows) != len(token_ids):
            raise ValueError(f"{len(token_ids)} rows of tokens need as many images (None for none), got {len(rows)}")
        prompts = self.prompts(rows)
        return self.llama(token_ids.to(self.llama.device), prompts=prompts)

    @torch.inference_mode()
    def prompts(self, images: Sequence[ImageSource | None]) -> Prompts | None:
        """Adaption prompts for a batch, one row for each entry; without any image one row that all share.

        Raises:
            ValueError: There is an image and no adapter that sees.
        """
        if all(image is None for image in images):
            made = self.adapter_module
            return None if made is None else made.prompts(self.llama, strength=self.strength)
        seen = self.features([image for image in images if image is not None])
        has_image = torch.tensor([image is not None for image in images], device=self.llama.device)
        features = torch.zeros(len(images), seen.shape[1], device=self.llama.device)
        features[has_image] = seen
        return self.adapter_module.prompts(self.llama, features, has_image=has_image, strength=self.strength)

    @torch.inference_mode()
    def features(self, images: Sequence[ImageSource]) -> Tensor:
        """Image features, float32 [B, F]; those of images seen lately are not computed again.

        Raises:
            FileNotFoundError, ValueError: An image cannot be read, or the adapter in use does not see.
        """
        return self._features.of(self.encoder, images, KEPT_IMAGES)

    def caption(
        self,
        images: Sequence[ImageSource] | ImageSource,
        *,
        batch_size: int = 32,
        progress: bool = False,
        examples: Sequence[str] | None = None,
        **settings: object,
    ) -> list[str]:
        """Captions one image or many.

        Args:
            images: A path, PIL image, array or bytes, or a list of them.
            batch_size: Images at a time.
            progress: Shows a bar on standard error.
            examples: Captions put before the question, for a base model that learns in context. With a list, be it
                empty, the base model is asked although it cannot see: a baseline.
            **settings: Fields of `sampling.Sampling`; None or absent takes the adapter's default.

        Raises:
            FileNotFoundError, ValueError: An image cannot be read, no adapter that sees is loaded, or a setting is
                unknown or out of range.
        """
        from tqdm import tqdm

        encoder = None if self.adapter_module is None and examples is not None else self.encoder
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        many = list(images) if isinstance(images, (list, tuple)) else [images]
        tokens, sampling = self.prepare("caption", settings, examples=examples or ())
        captions: list[str] = []
        with tqdm(total=len(many), unit="image", disable=not progress) as bar:
            for start in range(0, len(many), batch_size):
                batch = many[start : start + batch_size]
                prompts = None if encoder is None else self.prompts(batch)
                answers = self.generate([tokens] * len(batch), sampling, prompts)
                captions += [wording.tidy("caption", answer.text) for answer in answers]
                bar.update(len(batch))
        return captions

    def answer(
        self,
        image: ImageSource | None,
        question: str,
        choices: Sequence[str] | None = None,
        **settings: object,
    ) -> str | Choice:
        """Answers a question about an image, or without one.

        Args:
            choices: Possible answers; the likeliest one is taken, by its mean log-probability a token.
            **settings: Fields of `sampling.Sampling`; absent ones take the adapter's default.

        Returns:
            The text; with choices a `Choice`.

        Raises:
            ValueError: The question is empty, there are not two choices or one is empty, a setting is unknown or out of
                range, or the text is too long for the model's context.
        """
        if choices is None:
            tokens, sampling = self.prepare("answer", settings, question=question)
            answer = self.generate([tokens], sampling, self.prompts([image]))[0]
            return wording.tidy("answer", answer.text)
        self.sampling("answer", settings)
        tokens, endings = wording.choice_tokens(self.tokenizer, self.about, question, choices)
        means = log_likelihoods(self.llama, [tokens], [endings], self.prompts([image]))[0].mean()
        index = int(means.argmax())
        return Choice(choices[index], index, torch.softmax(means, dim=0).tolist())

    def chat(
        self,
        messages: str | Sequence[dict],
        image: ImageSource | None = None,
        stream: bool = False,
        cancelled: Event | None = None,
        **settings: object,
    ) -> str | Iterator[str]:
        """Continues a conversation.

        Without an adapter, the model's own chat template is used where it has one. An adapter is asked in the template
        it was trained with: the last message is the instruction and earlier ones are its input.

        Args:
            messages: One text, or `{"role": ..., "content": ...}` in order, the last from the user.
            image: What the conversation is about.
            stream: Gives an iterator of text pieces, which joined are the text, instead of the text.
            cancelled: Set from another thread to stop.
            **settings: Fields of `sampling.Sampling`; absent ones take the adapter's default.

        Raises:
            ValueError: A message is not of that form, the last one is not the user's or empty, no adapter that sees the
                image is loaded, a setting is unknown or out of range, or the text is too long for the model's context.
        """
        tokens, sampling = self.prepare("chat", settings, messages=messages)
        prompts = self.prompts([image])
        if stream:
            return _stripped(decoding.stream(self.llama, self.tokenizer, tokens, sampling, prompts, cancelled))
        return wording.tidy("chat", self.generate([tokens], sampling, prompts, cancelled)[0].text)

    def prepare(self, task: str, settings: Mapping[str, object] | None = None, **content: object) -> Prepared:
        """What `caption`, `answer` and `chat` give to the model, in their words; nothing is computed yet.

        Args:
            task: "caption", "answer" or "chat".
            settings: Fields of `sampling.Sampling`; None or absent takes the adapter's default.
            **content: `examples` of a caption, `question` of an answer, `messages` of a chat.

        Raises:
            ValueError: As those methods; an unknown task.
        """
        return wording.prepare(self.tokenizer, self.about, task, settings or {}, **content)

    def chat_tokens(self, messages: str | Sequence[Mapping]) -> list[int]:
        """The prompt of a conversation, as `chat` gives it to the model.

        Raises:
            ValueError: A message is not of that form, or the last one is not the user's or empty.
        """
        return wording.chat_tokens(self.tokenizer, self.about, messages)

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: Prompts | None = None,
        cancelled: Event | None = None,
    ) -> list[Generated]:
        """Answers a batch of token rows; see `generate.generate`."""
        return decoding.generate(self.llama, self.tokenizer, rows, sampling, prompts, cancelled)

    def sampling(self, task: str, settings: Mapping[str, object]) -> Sampling:
        """Decoding settings of a task: those given, then the adapter's own, then the task's.

        Raises:
            ValueError: An unknown task or setting, or a setting out of range.
        """
        return wording.task_sampling(self.about, task, settings)


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without the white space at the end of the text."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = text[len(text.rstrip()) :]
        if len(text) > len(held):
            yield text.rstrip()
