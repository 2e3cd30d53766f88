"""transformers' Trainer and its models: as torch's optimizer and scheduler, as a plain loop, and pleasant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_without_cuda  # noqa: F401  # which transformers imports
from helpers import assert_same
from pages import run_page
from rule_table import RULES, assert_same_run

import fastlr

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

from fastlr.integrations.transformers import RangeTest, optimizers  # noqa: E402

UPDATES, SIZE, WORDS = 12, 4, 32
POLICY = fastlr.LinearRamp(0.0, 0.02, 3).then(fastlr.Cosine(0.02, 0.0, UPDATES - 3), at=3)
ADAMW = RULES["AdamW"]

pytestmark = pytest.mark.usefixtures("_accelerate_state")


def bert(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def gpt2(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def data(causal: bool = False, samples: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(1, WORDS, (samples, 8), generator=generator)
    return [{"input_ids": row, "labels": row if causal else row[0] % 3} for row in words]


class InOrder(transformers.Trainer):
    """Does not shuffle, so that a plain loop can do the same."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=UPDATES,
        logging_steps=1,
        per_device_train_batch_size=SIZE,
        dataloader_pin_memory=False,
        weight_decay=0.1,
        adam_beta2=0.95,
        **{"save_strategy": "no", **options},
    )


def run(model: Any, args: Any, made: tuple[Any, Any], *, kind: Any = InOrder, **options: Any) -> Any:
    """What Trainer logged, after training."""
    causal = hasattr(model, "lm_head")
    trainer = kind(
        model=model, args=args, train_dataset=data(causal), optimizers=made, **{"callbacks": [], **options}
    )
    trainer.train(resume_from_checkpoint=getattr(args, "resumed", None))
    return trainer


def rates(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def by_torch(model: Any, args: Any) -> tuple[Any, Any]:
    """Groups as Trainer makes them, by itself; the rate by LambdaLR."""
    groups = transformers.Trainer(model=model, args=args).create_optimizer().param_groups
    opt = ADAMW.make_torch(
        [{key: group[key] for key in ("params", "weight_decay")} for group in groups],
        lr=1.0,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    return opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda update: POLICY(update))


# -- in place of optimizer and scheduler -------------------------------------------------------------------

ACCUMULATION = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 3}
BF16 = {"max_grad_norm": 0.0, "bf16": True}
CASES = {
    "plain": (bert, {"max_grad_norm": 0.0}),
    "accumulation": (bert, ACCUMULATION),
    "accumulation, a mean over words": (gpt2, ACCUMULATION),
    "clipping": (gpt2, {"max_grad_norm": 0.05}),
    "bf16": (gpt2, BF16),
}


@pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES.keys())
def test_it_trains_and_logs_as_torchs_do(tmp_path: Path, make: Callable[[], Any], options: Any) -> None:
    args = arguments(tmp_path, **options)
    model, theirs = make(), make()
    opt, scheduler = optimizers(model, args, fastlr.FusedAdamW, lr=POLICY)
    made = by_torch(theirs, args)
    ours, reference = run(model, args, (opt, scheduler)), run(theirs, args, made)
    assert opt.clock() == (UPDATES, 0)
    assert rates(ours) == rates(reference) == POLICY.values(0, UPDATES).tolist()
    assert_same_run(ADAMW, (made[0], list(theirs.parameters())), (opt, list(model.parameters())))


def test_it_is_a_plain_loop(tmp_path: Path) -> None:
    model = bert()
    opt, _ = optimizers(model, None, lr=POLICY, weight_decay=0.1, betas=(0.9, 0.95))
    model.train()
    for update in range(UPDATES):
        batch = [data()[(update * SIZE + k) % 40] for k in range(SIZE)]
        inputs = {key: torch.stack([sample[key] for sample in batch]) for key in batch[0]}
        model(**inputs).loss.backward()
        opt.step()
        opt.zero_grad()
    trained = bert()
    args = arguments(tmp_path, max_grad_norm=0.0)
    run(trained, args, optimizers(trained, args, lr=POLICY))
    assert_same(model.parameters(), trained.parameters())


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 9:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("make", "accumulate"), [(bert, 1), (gpt2, 2)])
def test_an_aborted_run_is_resumed_to_the_bit(
    tmp_path: Path, make: Callable[[float], Any], accumulate: int
) -> None:
    """With shuffled data and dropout, and the rate in the middle of its decay."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=7, gradient_accumulation_steps=accumulate)

    def trained(**options: Any) -> tuple[Any, Any, Any]:
        model = make(0.2)
        opt, scheduler = optimizers(model, args, lr=POLICY, ema_decay=0.9)
        return model, opt, run(model, args, (opt, scheduler), kind=transformers.Trainer, **options)

    model, opt, trainer = trained()
    (tmp_path / "checkpoint-7").rename(tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        trained(callbacks=[Stop()])
    args.resumed = str(tmp_path / "checkpoint-7")
    resumed, resumed_opt, its_trainer = trained()
    assert rates(its_trainer) == rates(trainer) == POLICY.values(0, UPDATES).tolist()
    assert resumed_opt.clock() == opt.clock() == (UPDATES, 0)
    assert_same(model.parameters(), resumed.parameters())
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert opt.state[p].keys() == resumed_opt.state[q].keys() >= {"exp_avg", "step"}
        assert_same(opt.state[p].values(), [resumed_opt.state[q][name] for name in opt.state[p]])


@pytest.mark.filterwarnings("ignore:the file has no clock:UserWarning")
def test_a_run_of_torchs_goes_on_with_ours(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=7)
    theirs = bert(0.2)
    made = by_torch(theirs, args)
    trainer = run(theirs, args, made, kind=transformers.Trainer)
    args.resumed = str(tmp_path / "checkpoint-7")
    model = bert(0.2)
    opt, scheduler = optimizers(model, args, lr=POLICY)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            opt.set_clock(updates=state.global_step)

    resumed = run(model, args, (opt, scheduler), kind=transformers.Trainer, callbacks=[Clock()])
    assert rates(resumed) == rates(trainer)
    assert_same_run(ADAMW, (made[0], list(theirs.parameters())), (opt, list(model.parameters())))


def test_trainers_own_scheduler_drives_a_fixed_rate(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.5, lr_scheduler_type="cosine", warmup_steps=3)
    model, theirs = bert(), bert()
    opt, _ = optimizers(model, args, lr=0.02)
    reference = by_torch(theirs, args)[0]
    for group in reference.param_groups:
        group["lr"] = group["initial_lr"] = 0.02
    ours, torchs = run(model, args, (opt, None)), run(theirs, args, (reference, None))
    assert rates(ours) == rates(torchs)
    assert len(set(rates(ours))) == UPDATES
    assert_same(model.parameters(), theirs.parameters())


@pytest.mark.parametrize("by_class", [False, True], ids=["optimizers", "optimizer_cls_and_kwargs"])
def test_a_scheduler_of_trainers_own_is_noticed(tmp_path: Path, by_class: bool) -> None:
    model, args = bert(), arguments(tmp_path)
    before = [p.detach().clone() for p in model.parameters()]
    given: dict[str, Any] = {"optimizers": (optimizers(model, args, lr=POLICY)[0], None)}
    if by_class:
        given = {"optimizer_cls_and_kwargs": (fastlr.FusedAdamW, {"lr": fastlr.Constant(0.5)})}
        args.warmup_steps = 5
    trainer = InOrder(model=model, args=args, train_dataset=data(), **given)
    with pytest.raises(RuntimeError, match=r"a schedule owns it.*ReadOnlyScheduler"):
        trainer.train()
    if by_class:
        assert_same(before, model.parameters())


# -- the groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, gpt2])
def test_groups_and_options_are_trainers(tmp_path: Path, make: Callable[[], Any]) -> None:
    model, args = make(), arguments(tmp_path)
    next(model.parameters()).requires_grad_(False)
    theirs = transformers.Trainer(model=model, args=args).create_optimizer()
    opt, _ = optimizers(model, args, lr=POLICY)
    for ours, group in zip(opt.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in group["params"]]
        assert {key: ours[key] for key in ("weight_decay", "betas", "eps")} == {
            key: group[key] for key in ("weight_decay", "betas", "eps")
        }


def test_what_is_given_stands_above_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    decay = fastlr.Cosine(0.2, 0.0, UPDATES)
    opt, scheduler = optimizers(
        bert(), args, fastlr.FusedCyclicAdamW, base_lr=0.001, max_lr=0.01, weight_decay=decay, eps=1e-6
    )
    first, second = opt.param_groups
    assert (first["weight_decay_schedule"], second["weight_decay"]) == (decay, 0.0)
    assert (first["eps"], first["betas"], scheduler.get_last_lr()) == (1e-6, (0.9, 0.95), [0.001, 0.001])
    opt, _ = optimizers(bert(), args, fastlr.FusedSGD, lr=0.1, momentum=0.9)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert optimizers(bert(), lr=0.1)[0].param_groups[0]["weight_decay"] == 0.01  # AdamW's own


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lr is missing.*LinearRamp\(5e-5, 0\.0, number_of_updates\)"):
        optimizers(bert(), weight_decay=0.1)
    with pytest.raises(
        TypeError, match=r"a class of fastlr's, such as fastlr\.FusedAdamW, got <class 'torch"
    ):
        optimizers(bert(), None, torch.optim.AdamW, lr=0.1)
    with pytest.raises(TypeError, match=r"args must be TrainingArguments or None, got .*comes behind it"):
        optimizers(bert(), fastlr.FusedSGD, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        RangeTest(steps=3)
    with pytest.raises(ValueError, match="the model is frozen"):
        optimizers(bert().requires_grad_(False), lr=0.1)


# -- the range test ------------------------------------------------------------------------------------

SWEEP = {"num_steps": 20, "end_lr": 1.0, "progress": False}


@pytest.mark.parametrize(
    ("torchs", "options"), [(False, ACCUMULATION), (True, BF16)], ids=["fastlr, accumulation", "torch, bf16"]
)
def test_a_range_test_before_training_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torchs: bool, options: dict[str, Any]
) -> None:
    """With shuffling and dropout, whose random numbers go on as if nothing had been."""
    args = arguments(tmp_path, **options)

    def trained(callbacks: list[Any]) -> tuple[Any, list[float]]:
        model = gpt2(0.2)
        made = by_torch(model, args) if torchs else optimizers(model, args, lr=POLICY)
        trainer = run(model, args, made, kind=transformers.Trainer, callbacks=callbacks)
        return model, [entry.get("loss") for entry in trainer.state.log_history]

    plain, losses = trained([])
    capsys.readouterr()
    test = RangeTest(**SWEEP)
    tested, other_losses = trained([test])
    assert len(test.result.losses) > 10
    assert test.result.summary() in capsys.readouterr().out
    assert losses == other_losses
    assert_same(plain.parameters(), tested.parameters())


def test_a_range_test_on_its_batches_leaves_no_trace(tmp_path: Path) -> None:
    args, trained = arguments(tmp_path), []
    for tested in (False, True):
        model = gpt2(0.2)
        made = optimizers(model, args, lr=POLICY)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=data(True), optimizers=made)
        loader = trainer.get_train_dataloader()
        if tested:
            assert len(fastlr.range_test(model, made[0], train_loader=loader, **SWEEP).losses) > 10
        trainer.train()
        trained.append(model)
    assert_same(*(model.parameters() for model in trained))


def test_a_resumed_training_is_not_tested_again(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=7)
    model = bert()
    run(model, args, optimizers(model, args, lr=POLICY))
    args.resumed = str(tmp_path / "checkpoint-7")
    model, test = bert(), RangeTest(**SWEEP)
    run(model, args, optimizers(model, args, lr=POLICY), callbacks=[test])
    assert test.result is None


def begin(test: RangeTest, kind: Any = fastlr.FusedAdamW, own: Any = None, **args: Any) -> Any:
    """As the Trainer calls it."""
    model = bert()
    collate = transformers.default_data_collator
    test.on_train_begin(
        SimpleNamespace(
            **{
                "world_size": 1,
                "fp16": False,
                "max_grad_norm": None,
                "gradient_accumulation_steps": 1,
                "device": torch.device("cpu"),
            }
            | args
        ),
        SimpleNamespace(global_step=0),
        None,
        model=model,
        optimizer=optimizers(model, None, kind, lr=0.01, max_grad_norm=own)[0],
        train_dataloader=torch.utils.data.DataLoader(data(), SIZE, collate_fn=collate),
    )
    return test.result


def test_options_are_the_range_tests(capsys: pytest.CaptureFixture[str]) -> None:
    val = torch.utils.data.DataLoader(data(), 8, collate_fn=transformers.default_data_collator)
    test = RangeTest(show=False, val_loader=val, val_every=5, **SWEEP)
    assert begin(test).metric_name == "accuracy"
    assert capsys.readouterr().out == ""


def test_half_precision_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def noted(*args: Any, **options: Any) -> Any:
        given.append(options)
        return fastlr.range_test(*args, **options)

    monkeypatch.setattr("fastlr.integrations.transformers.range_test", noted)
    plain, scaled = (begin(RangeTest(show=False, **SWEEP), fp16=fp16) for fp16 in (False, True))
    assert "scaler" not in given[0]
    assert isinstance(given[1]["scaler"], fastlr.GradScaler)
    np.testing.assert_allclose(scaled.losses, plain.losses, rtol=1e-4)


@pytest.mark.parametrize("fp16", [False, True])
def test_gradients_are_clipped_as_in_training(fp16: bool) -> None:
    """Of SGD, whose steps are as long as its gradients: here as by the optimizer itself."""

    def losses(**options: Any) -> Any:
        return begin(
            RangeTest(show=False, **SWEEP, start_lr=0.1), fastlr.FusedSGD, fp16=fp16, **options
        ).losses

    own, by_trainer, unclipped = losses(own=0.05), losses(max_grad_norm=0.05), losses(max_grad_norm=0.0)
    np.testing.assert_allclose(by_trainer, own, rtol=1e-5)
    assert np.abs(unclipped[-1] - own[-1]) > 0.01


def test_several_processes_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"cannot test on 2 processes.*call fastlr\.range_test\(\) before"):
        begin(RangeTest(**SWEEP), world_size=2)


# -- its models and batches elsewhere --------------------------------------------------------------------


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, **{f"w{k}": k for k in range(1, WORDS)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]")


def uneven(samples: int = 24) -> list[dict[str, Any]]:
    """Rows of 2 to 8 words, without padding."""
    rows = [sample["input_ids"][: 2 + k % 7].tolist() for k, sample in enumerate(data(samples=samples))]
    return [{"input_ids": r, "attention_mask": [1] * len(r), "labels": r[0] % 3} for r in rows]


def test_a_range_test_takes_its_models_and_padded_batches() -> None:
    collate = transformers.DataCollatorWithPadding(tokenizer())
    loader = torch.utils.data.DataLoader(uneven(), 6, collate_fn=collate)
    assert isinstance(next(iter(loader)), transformers.BatchEncoding)
    model = bert()
    opt, _ = optimizers(model, lr=0.01)
    found = fastlr.range_test(
        model, opt, train_loader=loader, val_loader=loader, num_steps=60, end_lr=1.0, progress=False
    )
    assert found.metric_name == "accuracy"
    assert len(found.losses) > 20
    causal = gpt2()
    opt, _ = optimizers(causal, lr=0.01)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    rows = [{"input_ids": row["input_ids"]} for row in uneven()]
    loader = torch.utils.data.DataLoader(rows, 6, collate_fn=collate)
    assert len(fastlr.range_test(causal, opt, train_loader=loader, **SWEEP).losses) > 5


def test_growing_batches_of_its_collators_are_whole_batches() -> None:
    """Padded by micro-batch and weighted by their words, they train as batches that fit in at once."""
    plan = fastlr.BatchPlan.from_phases([(0, 6), (1, 12)], dataset_size=24, epochs=2, lr=0.01)
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in uneven()]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)

    def predicted(batch: Any) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    models = []
    for micro in (3, 12):
        model = gpt2()
        opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr)
        loader = fastlr.GrowingLoader(rows, plan, micro, collate_fn=collate, count=predicted).bind(opt)
        for batch in loader:
            placed = batch.to("meta").data
            assert type(placed) is type(batch.data)
            assert {value.device.type for value in placed.values()} == {"meta"}
            (model(**batch.to("cpu").data).loss * batch.weight).backward()
            if batch.ends_update:
                opt.step()
                opt.zero_grad()
        models.append(model)
        assert opt.clock() == (6, 48)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# -- the page --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true:UserWarning")  # where no GPU is
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("frameworks/transformers.md", model=bert(), dataset=data())
    assert names["optimizers"][0].clock() == (60, 0)
    assert (tmp_path / "range_test.json").exists()
    trainer, optimizer = names["trainer"], names["by_tokens"][0]
    words = 8 * names["args"].per_device_train_batch_size  # of each update
    schedule = optimizer.param_groups[0]["lr_schedule"]
    assert optimizer.clock() == (30, 30 * words)
    assert optimizer.clock().tokens == trainer.state.num_input_tokens_seen
    assert rates(trainer) == [schedule((update - 1) * words) for update in (10, 20, 30)]
    epochs, updates = names["by_epochs"][0], len(trainer.get_train_dataloader())
    assert epochs.clock() == (3 * updates, 3)
    assert epochs.param_groups[0]["lr"] == 1e-3 * 0.5**3
    file = torch.load(tmp_path / "epochs" / f"checkpoint-{2 * updates}" / "optimizer.pt", weights_only=True)
    assert {(group["clock_unit"], group["samples"]) for group in file["param_groups"]} == {("epoch", 2)}
