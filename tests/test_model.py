"""The training loss is the plain cross-entropy, computed where there is a label and nowhere else."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from torch import Tensor

from mmadapter import model as model_module
from mmadapter.config import TUNES
from mmadapter.data import IGNORE_INDEX
from mmadapter.model import AdaptedLlama, target_count


def adapted(*, layers: int = 2, image: bool = True, tied: bool = False, tune: str = "prompts") -> AdaptedLlama:
    llama = tiny.llama(tiny.config(tied=tied))
    return AdaptedLlama(llama, tiny.adapter(llama.config, layers=layers, image=image, tune=tune))


def batch() -> tuple[Tensor, Tensor]:
    """Three rows padded on the right: real lengths 8, 5, 6; labels in scattered places, the first row's token 0 too."""
    tokens, labels = tiny.tokens(3, 8), torch.full((3, 8), IGNORE_INDEX)
    for row, places in enumerate(([0, 3, 4, 7], [4], [2, 3, 5])):
        labels[row, places] = tokens[row, places]
    tokens[1, 5:] = tokens[2, 6:] = 0
    return tokens, labels


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradients_are_plain_cross_entropy(smoothing: float, tied: bool, tune: str) -> None:
    tokens, labels = batch()
    features, has_image = tiny.features(3), torch.tensor([True, False, True])
    model, plain = (adapted(tied=tied, tune=tune) for _ in range(2))
    loss = model(tokens, labels, features, has_image, label_smoothing=smoothing)
    loss.backward()
    logits = plain.llama(tokens, prompts=plain.adapter.prompts(plain.llama, features, has_image=has_image))
    criterion = torch.nn.CrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    expected = criterion(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad.any(), name
        torch.testing.assert_close(
            parameter.grad, plain.adapter.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name
        )


def test_smoothing_changes_the_loss() -> None:
    tokens, labels = batch()
    assert adapted()(tokens, labels) != adapted()(tokens, labels, label_smoothing=0.1)


@torch.no_grad()
def test_a_batch_loses_what_its_rows_lose() -> None:
    """Padding on the right, of whatever tokens, changes nothing."""
    model, (tokens, labels) = adapted(), batch()
    rows = [(0, 8), (1, 5), (2, 6)]
    alone = sum(model(tokens[row : row + 1, :length], labels[row : row + 1, :length]) for row, length in rows)
    torch.testing.assert_close(model(tokens, labels), alone)


def test_logits_are_computed_at_labels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a whole batch are its largest tensor: vocabulary times tokens."""
    model, (tokens, labels) = adapted(), batch()
    seen = []
    plain = model_module.cross_entropy_sum
    monkeypatch.setattr(
        model_module,
        "cross_entropy_sum",
        lambda hidden, weight, targets, **options: (
            seen.append((hidden.shape, targets.tolist())) or plain(hidden, weight, targets, **options)
        ),
    )
    monkeypatch.setattr(model.llama, "logits", lambda hidden: pytest.fail("logits of all positions"))
    model(tokens, labels)
    wanted = [*labels[0, [3, 4, 7]].tolist(), *labels[1, [4]].tolist(), *labels[2, [2, 3, 5]].tolist()]
    assert target_count(labels) == len(wanted)  # not the label of token 0, which no position predicts
    assert seen == [((7, 24), wanted)]


def test_the_last_token_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No position after it predicts anything."""
    model, (tokens, labels) = adapted(), batch()
    seen, hidden = [], model.llama.hidden
    monkeypatch.setattr(
        model.llama, "hidden", lambda tokens, **options: seen.append(tokens.shape) or hidden(tokens, **options)
    )
    model(tokens, labels)
    assert seen == [(3, 7)]


@pytest.mark.parametrize(
    ("tokens", "labels", "row"),
    [
        (tiny.tokens(3, 4), [[IGNORE_INDEX, 1, 2, 3], [IGNORE_INDEX] * 4, [IGNORE_INDEX, 1, 2, 3]], 1),
        (tiny.tokens(2, 3), [[5, IGNORE_INDEX, 5], [5, IGNORE_INDEX, IGNORE_INDEX]], 1),  # the first token only
        (tiny.tokens(1, 1), [[5]], 0),
    ],
)
def test_a_row_without_a_target_is_named(tokens: Tensor, labels: list[list[int]], row: int) -> None:
    """A mean over no target is NaN, and one such batch ends a training run."""
    with pytest.raises(ValueError, match=f"nothing to predict in row {row} of the batch: all its labels are -100"):
        adapted()(tokens, torch.tensor(labels))


def test_the_base_is_frozen_and_gets_no_gradient() -> None:
    llama = tiny.llama().requires_grad_(True)
    model = AdaptedLlama(llama, tiny.adapter(llama.config))
    tokens, labels = batch()
    model(tokens, labels).backward()
    assert not any(parameter.requires_grad for parameter in llama.parameters())
    assert all(parameter.grad is None for parameter in llama.parameters())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["adapter.prompt", "adapter.gate"]


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("with_features", [False, True], ids=["text", "image"])
def test_checkpointing_gives_the_same_gradients_and_runs_each_block_again(with_features: bool, tune: str) -> None:
    (tokens, labels), features = batch(), tiny.features(3) if with_features else None
    found = []
    for checkpointing in (False, True):
        model, runs = adapted(image=with_features, tune=tune), Counter()
        for index, block in enumerate(model.llama.layers):
            block.register_forward_pre_hook(lambda *_, key=index, runs=runs: runs.update([key]))
        loss = model(tokens, labels, features, checkpointing=checkpointing)
        forward = dict(runs)
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in model.adapter.named_parameters()}))
        again = {index: runs[index] - forward[index] for index in range(3)}
        trains = [tune != "prompts", True, True]  # nothing trains in layer 0 without tuning
        assert forward == {0: 1, 1: 1, 2: 1}
        assert again == {index: int(checkpointing and trains[index]) for index in range(3)}
    (loss, gradients), (other_loss, other_gradients) = found
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, other_gradients[name]), name


def test_checkpointing_keeps_less() -> None:
    (tokens, labels), kept = batch(), []
    for checkpointing in (False, True):
        model, sizes = adapted(image=False, tune=TUNES[1]), []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(tokens, labels, checkpointing=checkpointing)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_below_the_first_adapted_one_build_no_graph(layers: int, tune: str) -> None:
    """They would keep their activations for a backward pass that nothing under them needs; tuning needs them all."""
    model, (tokens, labels) = adapted(layers=layers, tune=tune), batch()
    tracked: dict[str, bool] = {}
    for index, block in enumerate(model.llama.layers):
        for name in ("attention", "feed_forward"):
            getattr(block, name).register_forward_hook(
                lambda _module, _args, out, key=f"{index}.{name}": tracked.update({key: out.requires_grad})
            )
    model(tokens, labels)
    first = 3 - layers if tune == "prompts" else 0
    assert tracked == {f"{i}.{name}": i >= first for i in range(3) for name in ("attention", "feed_forward")}


def test_the_mean_loss_of_an_untrained_model_is_that_of_chance() -> None:
    """The sum over targets, divided by their count, starts near log V: a guard against a shifted or doubled sum."""
    llama = tiny.llama()
    with torch.no_grad():
        llama.output.weight.mul_(0.01)
    model = AdaptedLlama(llama, tiny.adapter(llama.config))
    tokens, labels = batch()
    mean = model(tokens, labels) / target_count(labels)
    assert mean.item() == pytest.approx(torch.tensor(53.0).log().item(), abs=0.05)


def test_an_adapter_of_another_base_is_refused() -> None:
    model = AdaptedLlama(tiny.llama(), tiny.adapter(tiny.config(layers=4)))
    with pytest.raises(ValueError, match="an adapter for a base of 4 layers does not fit one of 3"):
        model(*batch())
