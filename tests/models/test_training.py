"""Loss and gradients, under what trainers do to a model: checkpointing, autocast, accumulation, adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from statex.families import get_family
from statex.models import load
from tests.models.build import DESCRIPTIONS, build, every_model, tokens


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_next_token_where_labels_are_set() -> None:
    model, ids = build("gla"), tokens(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.past_key_values is None


@torch.no_grad()
def test_num_items_in_batch_divides_the_summed_loss() -> None:
    model, ids = build("mamba2"), tokens(2, 9)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(32)).loss, mean * 16 / 32)


@torch.no_grad()
def test_logits_to_keep_gives_the_last_logits_or_those_asked_for() -> None:
    model, ids = build("gla"), tokens(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]])


@every_model
@torch.no_grad()
def test_hidden_states_and_tuples_come_back_when_asked_for(name: str) -> None:
    model, ids = build(name), tokens(1, 5)
    outputs = model(ids, output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == 3 * [(1, 5, 32)]
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert model(ids, return_dict=False)[0].equal(outputs.logits)


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, ids = build(name).train(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    plain = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(grad is not None and grad.any() for grad in plain.values())
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=True).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key])


@every_model
def test_under_autocast_decays_and_states_are_fp32_and_the_loss_stays_close(name: str) -> None:
    model, ids = build(name), tokens(2, 9)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, use_cache=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert {state.recurrent.dtype for state in outputs.past_key_values.layers} == {torch.float32}
    assert (outputs.loss - exact).abs() < 0.03 * exact
    outputs.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gla-expanded", "mamba2-expanded", "hgrn-expanded", "hgrn2-expanded", "mamba-expanded"])
@torch.no_grad()
def test_a_bf16_model_runs_and_stays_close(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens(2, 9)
    model.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    logits, exact = half(ids).logits, model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.05 * exact.norm()
    assert half.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)


@every_model
def test_every_adapter_on_an_adaptable_module_gets_a_gradient(name: str) -> None:
    peft = pytest.importorskip("peft")
    family = get_family(DESCRIPTIONS[name].family)
    adapted = peft.get_peft_model(build(name), peft.LoraConfig(r=2, target_modules=list(family.adaptable), init_lora_weights=False))
    ids = tokens(2, 9)
    adapted(input_ids=ids, labels=ids).loss.backward()
    adapters = {key: parameter for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    present = {module for module in family.adaptable for key in adapters if f".{module}.lora_A" in key}
    # HGRN's layers have a gate or, once they are HGRN2's, a query of their own.
    alternatives = {"q_proj", "g_proj"} if family.name == "hgrn" else set()
    assert present | alternatives == set(family.adaptable)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters.values())


@pytest.mark.parametrize("name", ["gla-expanded", "mamba2-expanded"])
def test_trainer_steps_equally_with_and_without_gradient_accumulation(name: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 9)]
    for row in rows[:2]:
        row["labels"] = row["labels"].masked_fill(torch.arange(9) < 6, -100)  # micro-batches of unequal weight
    trained = []
    for size, accumulation in ((4, 1), (1, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"{size}"), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            max_steps=2, optim="sgd", learning_rate=0.5, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
            gradient_checkpointing=size == 1,
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(build(name)), arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model()
        trained.append(load(arguments.output_dir))
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert trained[0].config.description == DESCRIPTIONS[name]
    assert not trained[0].lm_head.weight.equal(build(name).lm_head.weight)


@pytest.mark.parametrize("name", ["gla-expanded", "mamba2-expanded", "hgrn-expanded", "hgrn2-expanded", "mamba-expanded"])
def test_compiling_the_model_breaks_no_graph(name: str) -> None:
    model, ids = build(name), tokens(2, 9)
    explained = torch._dynamo.explain(model)(ids, labels=ids)
    assert explained.graph_break_count == 0, explained.break_reasons
