"""The training loop: schedule, optimizer, gradients, learning, validation, log."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny_engine import CALM, all_tensors, config_of, different, model_of, rows, trainer
from tiny_training import log_of

from mmadapter.data import IGNORE_INDEX, Example, RowOrder, collate
from training.config import RunConfig
from training.engine import Trainer, learning_rate, make_optimizer
from training.processes import Processes

V2 = "prompts+bias+scale+norm"

# ---------------------------------------------------------------------------------------------- schedule and optimizer


def test_the_learning_rate_warms_up_linearly_then_falls_as_half_a_cosine():
    rates = [learning_rate(step, 2.0, 4, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[14] == pytest.approx(1.0)  # half way down
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert learning_rate(24, 2.0, 4, 24) == pytest.approx(0)


def test_the_learning_rate_is_symmetric_about_the_middle_of_its_fall():
    for step in range(10):
        assert learning_rate(step, 1.0, 0, 20) + learning_rate(20 - step, 1.0, 0, 20) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [5, 50])
def test_a_run_that_is_all_warm_up_has_a_rate_at_every_step(warmup):
    """steps - warmup of zero or less must not divide by zero."""
    rates = [learning_rate(step, 1.0, warmup, 5) for step in range(5)]
    assert rates == pytest.approx([(step + 1) / warmup for step in range(5)])


def groups_of(**changes: object) -> dict[str, dict]:
    """The optimizer's group of each parameter; each is in one."""
    config = config_of(**{"weight_decay": 0.3, "lr": 0.01, "gate_lr": 0.05, **changes})
    adapter = model_of(config).adapter
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    groups = make_optimizer(adapter, config).param_groups
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_only_matrices_of_the_projection_are_decayed_and_gates_have_a_rate_of_their_own():
    """Decayed gates and prompts are one of the published code's mistakes."""
    of = groups_of(tune=V2)
    decayed = {name: group["weight_decay"] for name, group in of.items() if group["weight_decay"]}
    assert decayed == {"projection.hidden.weight": 0.3, "projection.output.weight": 0.3}
    assert {name for name, group in of.items() if group["peak"] == 0.05} == {"gate"}
    assert {group["peak"] for name, group in of.items() if name != "gate"} == {0.01}
    assert {group["betas"] for group in of.values()} == {(0.9, 0.95)}


def test_everything_is_decayed_as_the_official_code_does_where_it_is_asked_for():
    of = groups_of(tune=V2, decay="all")
    assert {"gate", "prompt", "projection.hidden.bias", "tuning.scale.wq"} <= of.keys()
    assert {group["weight_decay"] for group in of.values()} == {0.3}
    assert {name for name, group in of.items() if group["peak"] == 0.05} == {"gate"}


def test_the_rates_are_scaled_by_the_batch_where_it_is_asked_for():
    """The official code's rate is that of a batch of 256: 9e-3 at a batch of 64 trains at 2.25e-3."""
    of = groups_of(lr=9e-3, gate_lr=9e-3, batch_size=64, scale_lr=True)
    assert {group["peak"] for group in of.values()} == {2.25e-3}
    assert {group["peak"] for group in groups_of(lr=9e-3, gate_lr=9e-3, batch_size=64).values()} == {9e-3}


def test_a_text_adapter_has_no_empty_group():
    config = config_of()
    groups = make_optimizer(model_of(config, images=False).adapter, config).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]


@pytest.mark.parametrize("settings", [{"steps": 5, "warmup": 2}, {"steps": 0, "epochs": 0.5, "warmup": 0}])
def test_the_schedule_is_what_the_optimizer_takes(tmp_path, settings):
    run = trainer(tmp_path, **settings, warmup_epochs=0.2)
    taken = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: taken.append([g["lr"] for g in optimizer.param_groups]))
    run.train()
    peaks = [group["peak"] for group in run.optimizer.param_groups]
    assert taken == [[learning_rate(step, peak, 2, 5) for peak in peaks] for step in range(5)]


# ----------------------------------------------------------------------------------------------------------- gradients


def gradients(run: Trainer, examples: list[Example]) -> dict[str, torch.Tensor]:
    run.accumulate(examples)
    return {name: parameter.grad.clone() for name, parameter in run.adapter.named_parameters()}


@pytest.mark.parametrize("tune", ["prompts", V2])
def test_any_number_of_passes_gives_the_same_gradient(tmp_path, tune):
    """A mean over passes weighs the targets of a short pass more than those of a long one."""
    examples = rows(6) + rows(5, images=False)
    found = {}
    for batch_tokens in (0, 1, 20, 33, 64, 10**6):
        run = trainer(tmp_path, batch_tokens=batch_tokens, tune=tune, **CALM)
        run.features = lambda index, generator: tiny.features(9)[index]
        found[batch_tokens] = gradients(run, examples)
        losses, cut, targets = run.accumulate(examples)
        assert targets == sum(len(row.tokens) - 3 for row in examples)
        assert len(cut) == len(losses)
        assert (len(cut) == 1) == (batch_tokens in (0, 10**6))
    whole = found.pop(0)
    for name in whole:
        largest = whole[name].abs().max()
        assert largest > 1e-4, f"{name} would be alike in any case"
        for batch_tokens, cut in found.items():
            assert (cut[name] - whole[name]).abs().max() <= 1e-6 * max(1, largest), (name, batch_tokens)


def test_the_gradient_is_that_of_the_mean_loss_of_all_target_tokens(tmp_path):
    """Of target tokens, not of rows: a short answer must not weigh as much as a long one."""
    run = trainer(tmp_path, images=False, label_smoothing=0.3)
    examples = rows(6, images=False)
    found = gradients(run, examples)
    batch = collate(examples)
    logits = run.model.llama(batch.tokens[:, :-1], prompts=run.adapter.prompts(run.model.llama))
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), label_smoothing=0.3)
    wanted = torch.autograd.grad(expected, list(run.adapter.parameters()))
    for gradient, name in zip(wanted, found, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert run._step(examples, {})["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("tune", ["prompts", V2])
def test_checkpointing_computes_again_and_changes_no_gradient(tmp_path, tune):
    """With dropout: what is computed again must draw what was drawn before."""
    found, calls = [], []
    for checkpointing in (False, True):
        run, count = trainer(tmp_path, tune=tune, checkpointing=checkpointing), []
        run.model.llama.layers[-1].attention.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append(gradients(run, rows(6)))
        calls.append(len(count))
    assert calls[1] == 2 * calls[0] > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_clipped_to_the_norm_and_logged_as_it_was(tmp_path):
    run = trainer(tmp_path, clip=1e-3)
    norm = run._step(rows(6), {})["grad_norm"]
    clipped = torch.stack([parameter.grad.norm() for parameter in run.adapter.parameters()]).norm()
    assert norm > 2e-3
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_clip_of_zero_is_no_clipping(tmp_path):
    run = trainer(tmp_path, clip=0.0)
    norm = run._step(rows(6), {})["grad_norm"]
    kept = torch.stack([parameter.grad.norm() for parameter in run.adapter.parameters()]).norm()
    assert norm > 0
    assert kept.item() == pytest.approx(norm)


def test_rows_with_and_without_image_train_in_one_batch(tmp_path):
    """A text row has no row in the feature table; -1 must not be taken for the last picture, nor any for it."""
    run = trainer(tmp_path, images=True)
    run.model.eval()
    photos, texts = rows(2), rows(2, images=False)
    mixed, seen, unseen = (run.loss_of(part, None, smoothing=False) for part in ([*photos, *texts], photos, texts))
    batch = collate(texts)
    alone = run.model(batch.tokens, batch.labels)  # no features at all
    assert unseen.item() == pytest.approx(alone.item(), rel=1e-6)
    assert mixed.item() == pytest.approx((seen + alone).item(), rel=1e-5)
    assert seen.item() != pytest.approx(alone.item(), rel=1e-3)


def test_each_pass_draws_other_views_and_the_same_ones_in_another_run(tmp_path):
    """A generator made anew from one number shows row r of every batch the same view, for ever."""

    def seeds_of(folder: Path, **changes: object) -> list[int]:
        run, seeds = trainer(folder, steps=6, **changes), []
        lookup = run.features

        def watched(index: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            seeds.extend([] if generator is None else [generator.initial_seed()])
            return lookup(index, generator)

        run.features = watched
        run.train()
        return seeds

    seeds = seeds_of(tmp_path / "one")
    assert len(set(seeds)) == len(seeds) > 6
    assert seeds_of(tmp_path / "two") == seeds
    assert set(seeds_of(tmp_path / "three", seed=1)).isdisjoint(seeds)


def test_the_steps_take_rows_of_similar_length_in_the_order_of_the_seed(tmp_path):
    run, taken = trainer(tmp_path, steps=4), []
    accumulate = run.accumulate
    run.accumulate = lambda examples: taken.append(examples) or accumulate(examples)
    run.train()
    order = RowOrder([len(row.tokens) for row in rows(40)], 4, 0, pool=2)
    assert taken == [[rows(40)[index] for index in order.step(step)] for step in range(4)]


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("images", [True, False])
def test_a_few_steps_lower_the_loss(tmp_path, images):
    run = trainer(tmp_path, images=images, steps=50, eval_every=50, save_every=50, lr=0.1, gate_lr=0.2, **CALM)
    loss = run.train()
    assert loss < 0.95 * log_of(tmp_path)[1]["val_loss"]


@pytest.mark.parametrize("tune", ["prompts", V2])
def test_an_adapter_in_float32_trains_over_a_base_in_bfloat16(tmp_path, tune):
    config = config_of(steps=40, eval_every=40, lr=0.05, gate_lr=0.2, dtype="bfloat16", tune=tune, **CALM)
    model = model_of(config, images=False)
    model.llama.to(torch.bfloat16)
    before = copy.deepcopy(model.llama.state_dict())
    run = Trainer(model, config, tmp_path, train=rows(40, images=False), validation=rows(5, 1, images=False))
    assert run.train() < 0.95 * log_of(tmp_path)[1]["val_loss"]
    assert {tensor.dtype for tensor in all_tensors(run).values()} == {torch.float32}
    assert model.llama.dtype == torch.bfloat16
    assert not different(before, model.llama.state_dict())


def test_the_base_is_not_touched(tmp_path):
    run = trainer(tmp_path)
    before = copy.deepcopy(run.model.llama.state_dict())
    run.train()
    assert not different(before, run.model.llama.state_dict())
    assert not any(parameter.requires_grad for parameter in run.model.llama.parameters())


@pytest.mark.parametrize("tune", ["prompts", V2])
def test_every_parameter_still_trains_after_a_validation(tmp_path, tune):
    """Prompt keys cached under no_grad, or a model left in evaluation mode, would end the training silently."""
    run = trainer(tmp_path, tune=tune)
    run._validate()
    before = {name: p.detach().clone() for name, p in run.adapter.named_parameters()}
    run._step(rows(6), {})
    assert run.model.training
    assert different(before, dict(run.adapter.named_parameters())) == list(before)
    assert all(parameter.grad.abs().sum() > 0 for parameter in run.adapter.parameters())


def test_the_running_mean_is_warmed_up_then_decays(tmp_path):
    """Mean after step t: m + (1 - min(ema, t / (t + 10))) (w - m)."""
    run = trainer(tmp_path, steps=20, ema=0.5, eval_every=100, save_every=100)
    expected = {name: p.detach().clone() for name, p in run.adapter.named_parameters()}
    for step in range(1, 16):
        run._step(rows(4, seed=step), {})
        decay = min(0.5, step / (step + 10))
        for name, parameter in run.adapter.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, tensor in expected.items():
        torch.testing.assert_close(run.mean[name], tensor)


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("batch_tokens", [0, 20])
def test_validation_takes_the_kept_weights_and_leaves_the_training_weights(tmp_path, batch_tokens):
    """Under EMA the two differ; validating one and shipping the other would make the score a lie."""
    run = trainer(tmp_path, steps=4, batch_tokens=batch_tokens)
    run.train()
    before = all_tensors(run)
    assert different(run.mean, dict(run.adapter.named_parameters())) == list(run.mean)
    loss = run._validate()
    assert not different(before, all_tensors(run))

    def plain_loss(state: dict[str, torch.Tensor]) -> float:
        model = copy.deepcopy(run.model).eval()
        model.adapter.load_state_dict(state)
        total, count = 0.0, 0
        for row in rows(5, seed=1):
            batch = collate([row])
            with torch.no_grad():
                total += model(batch.tokens, batch.labels, run.features(batch.images, None)).item()
            count += int((batch.labels != IGNORE_INDEX).sum())
        return total / count

    assert loss == pytest.approx(plain_loss(run.kept_state()), rel=1e-5)
    assert loss != pytest.approx(plain_loss(run.adapter.state_dict()), rel=1e-5)


def test_without_ema_the_last_weights_are_kept(tmp_path):
    run = trainer(tmp_path, steps=3, ema=0.0)
    run.train()
    assert not different(run.kept_state(), run.adapter.state_dict())


def test_validation_is_the_same_each_time_and_unsmoothed(tmp_path):
    run = trainer(tmp_path)
    plain = trainer(tmp_path / "plain", **CALM)
    (tmp_path / "plain").mkdir()
    assert run._validate() == run._validate() == plain._validate()


@pytest.mark.parametrize(("wanted", "there", "taken"), [(3, 9, [0, 3, 6]), (4, 6, [0, 1, 3, 4]), (10, 3, [0, 1, 2])])
def test_validation_rows_are_evenly_spread_and_no_more_than_asked(tmp_path, wanted, there, taken):
    """A plain stride takes 1,500 of 1,500 rows where 1,000 were asked for."""
    config = config_of(validation_rows=wanted)
    examples = rows(there)
    run = Trainer(model_of(config), config, tmp_path, train=rows(2), validation=examples)
    assert run.validation_examples == [examples[index] for index in taken]


@pytest.mark.parametrize(("train", "validation"), [(0, 2), (2, 0)])
def test_no_rows_are_an_error(tmp_path, train, validation):
    config = config_of()
    with pytest.raises(ValueError, match=f"there are {train} rows to train on and {validation} to validate on"):
        Trainer(model_of(config), config, tmp_path, train=rows(train), validation=rows(validation, seed=1))


def test_processes_that_do_not_divide_the_batch_are_an_error(tmp_path):
    config = config_of()
    three = Processes(count=3)
    with pytest.raises(ValueError, match="3 processes do not divide batch_size 4; change --batch-size"):
        Trainer(model_of(config), config, tmp_path, train=rows(4), validation=rows(2), processes=three)


# ----------------------------------------------------------------------------------------------------- log and display


def test_the_log_holds_settings_a_line_for_each_step_and_validations(tmp_path):
    run = trainer(tmp_path, steps=11, eval_every=4, record={"data_hash": "abc", "rows": 40})
    loss = run.train()
    first, *lines = log_of(tmp_path)
    assert (first["event"], first["step"], first["steps"], first["warmup"]) == ("start", 0, 11, 2)
    assert RunConfig(**{**first["config"], "scales": tuple(first["config"]["scales"])}) == run.config
    assert first["config"] == json.loads(json.dumps(dataclasses.asdict(run.config)))
    assert (first["data_hash"], first["rows"], first["processes"], first["base_layers"]) == ("abc", 40, 1, 3)
    assert first["versions"]["torch"] == torch.__version__
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    for line in steps:
        assert line.keys() == {"step", "loss", "grad_norm", "lr", "tokens_per_s", "time"}
        assert line["lr"] == learning_rate(line["step"] - 1, 1e-2, 2, 11)
        assert line["tokens_per_s"] > 0
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [0, 4, 8, 11]
    assert validations[-1]["val_loss"] == loss
    assert [len(layer) for layer in validations[-1]["gates"]] == [4, 4]
    shown = torch.tensor(validations[-1]["gates"])
    torch.testing.assert_close(shown, run.mean["gate"].tanh(), rtol=0, atol=6e-5)


def test_a_user_sees_loss_speed_and_time_left(tmp_path, capsys):
    trainer(tmp_path, steps=3).train()
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "loss " in shown.err
    assert "tokens/s" in shown.err
    assert "<" in shown.err  # tqdm: [elapsed<left]
    assert "step 0: validation loss" in shown.out + shown.err
