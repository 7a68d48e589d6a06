"""One step here and in TRL's trainers: the same weights and rows, loss, gradient and metrics.

Needs trl (the extra `parity`). Both sides read the rows as text, pack or pad them in their own way,
and log the step.
"""

import numpy as np
import pytest
from conftest import write_model
from tokencases import make, write

pytest.importorskip("trl", reason="the extra `parity` is not installed")

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from presets import tiny  # noqa: E402

from alignjax import config as configs  # noqa: E402
from alignjax import optim  # noqa: E402
from alignjax.data.batches import packed_steps  # noqa: E402
from alignjax.data.packing import plan_training  # noqa: E402
from alignjax.evaluation import score  # noqa: E402
from alignjax.sharding import place_rows  # noqa: E402
from alignjax.stages import stage_of  # noqa: E402
from alignjax.step import init_state, train_step  # noqa: E402
from alignjax.weights.loading import load  # noqa: E402
from alignjax.weights.safetensors import open_directory  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

F32 = configs.Compute(dtype="float32", remat="none", vocab_chunk=64)
ROW = 256
PAIRS = [
    {"prompt": "Why is it so? ", "chosen": "Because it is.", "rejected": "No."},
    {"prompt": "How? ", "chosen": "Like this", "rejected": "In some way, one should think."},
    {"prompt": "Which one is it? ", "chosen": "The red one", "rejected": "The blue one"},
    {"prompt": "When does it begin? ", "chosen": "At nine, or later.", "rejected": "It has begun."},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a policy, a reference and a reward model of two layers."""
    root = tmp_path_factory.mktemp("models")
    c = tiny("llama2_7b", layers=2)
    for seed, name in enumerate(("policy", "reference", "reward")):
        own = tiny("llama2_7b", layers=2, scored=True) if name == "reward" else c
        write_model(root / name, own, seed)
    return root


def our_tokens(root, rows, stage: str, cache):
    from alignjax.data import chat

    path = write(cache / "rows.jsonl", rows)
    tokenizer = chat.load_tokenizer(root / "policy")
    return make(path, tokenizer, root / "policy", cache, stage, strings="plain", max_length=ROW)


def our_step(config, model, data, ref=None) -> dict[str, float]:
    """What a step on all the rows logs."""
    kind = "sequences" if isinstance(config, configs.SFT) else "pairs"
    batch = configs.Batch(**{kind: len(data)}, row_length=ROW)
    steps = packed_steps(data, plan_training(data.lengths(), batch, 0), 4, ref)
    tx = optim.optimizer(config.optimizer, 1)
    static = {"stage": stage_of(config), "compute": F32, "tx": tx}
    placed = place_rows(steps[0], 4)
    micro = np.int32(steps.micro_batches(0))
    _, metrics = train_step(init_state(model, tx), placed, micro, np.int32(0), **static)
    return {name: float(value) for name, value in metrics.items()} | {
        "num_tokens": float(steps.useful_tokens()[0])
    }


def tokenizer_of(root):
    """Padding has a token of its own, since a reward of transformers is told by it."""
    found = transformers.AutoTokenizer.from_pretrained(root / "policy")
    found.pad_token = "<|endoftext|>"
    return found


def their_step(trainer_type, config_type, model, root, rows, directory, more=None, **settings):
    """What TRL's trainer logs of a step on all the rows."""
    config = config_type(
        output_dir=str(directory),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_type(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(root),
        **(more or {}),
    )
    trainer.train()
    return trainer.state.log_history[0]


def causal(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def assert_same(ours: dict[str, float], theirs: dict[str, float], names: list[str]) -> None:
    assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, 1e-5, 1e-5)


SHARED = [
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "num_tokens",
]


def smoothed(e: float) -> dict:
    """TRL has no label smoothing of its sigmoid loss; it is what these two of its kinds make."""
    return {
        "loss_type": ["sigmoid", "robust"],
        "loss_weights": [2 * (1 - e), -(1 - 2 * e)],
        "label_smoothing": e,
    }


KINDS = {
    "sigmoid": ({"loss": "sigmoid"}, {"loss_type": ["sigmoid"]}),
    "another beta": ({"loss": "sigmoid", "beta": 0.5}, {"loss_type": ["sigmoid"], "beta": 0.5}),
    "conservative": ({"label_smoothing": 0.2}, smoothed(0.2)),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
    ),
    "hinge": ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
}


def their_dpo(models, tmp_path, **settings) -> dict[str, float]:
    """A step of TRL's DPO on PAIRS."""
    return their_step(
        trl.DPOTrainer,
        trl.DPOConfig,
        causal(models / "policy"),
        models,
        PAIRS,
        tmp_path,
        {"ref_model": causal(models / "reference")},
        **settings,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dpo(models, tmp_path, kind):
    changes, settings = KINDS[kind]
    data = our_tokens(models, PAIRS, "dpo", tmp_path)
    reference = load(open_directory(models / "reference"))
    ref = score(reference, data, ROW, 4, F32)
    ours = our_step(configs.DPO(**changes), load(open_directory(models / "policy")), data, ref)
    theirs = their_dpo(models, tmp_path, **settings)
    assert 0 < theirs["rewards/accuracies"] < 1
    assert_same(ours, theirs, SHARED)


def test_dpo_with_an_sft_term(models, tmp_path):
    data = our_tokens(models, PAIRS, "dpo", tmp_path)
    assert len(set(data.trained_counts()[:, 0])) > 1  # a mean over tokens is none over pairs
    ref = score(load(open_directory(models / "reference")), data, ROW, 4, F32)
    config = configs.DPO(sft_weight=0.3)
    ours = our_step(config, load(open_directory(models / "policy")), data, ref)
    theirs = their_dpo(models, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    assert_same(ours, theirs, SHARED)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_simpo(models, tmp_path, e):
    """TRL logs mean log-probs a token for it, where we log sums; they are its rewards / beta."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    data = our_tokens(models, PAIRS, "dpo", tmp_path)
    config = configs.DPO(loss="simpo", beta=2.0, margin=0.7, label_smoothing=e)
    ours = our_step(config, load(open_directory(models / "policy")), data)
    theirs = their_step(
        CPOTrainer,
        CPOConfig,
        causal(models / "policy"),
        models,
        PAIRS,
        tmp_path,
        loss_type="simpo",
        cpo_alpha=0.0,
        simpo_gamma=0.7,
        beta=2.0,
        label_smoothing=e,
        max_length=ROW,
    )
    assert_same(ours, theirs, SHARED[:6])


@pytest.mark.parametrize("centering", [0.0, 0.05])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0, -1.0]])
def test_reward_models(models, tmp_path, centering, margins):
    rows = PAIRS
    if margins:
        rows = [pair | {"margin": m} for pair, m in zip(PAIRS, margins, strict=True)]
    data = our_tokens(models, rows, "rm", tmp_path)
    config = configs.RM(centering=centering)
    model = load(open_directory(models / "reward"))
    rewards = score(model, data, ROW, 4, F32, scores=stage_of(config).scores)
    ours = our_step(config, model, data)
    theirs = their_step(
        trl.RewardTrainer,
        trl.RewardConfig,
        transformers.AutoModelForSequenceClassification.from_pretrained(
            models / "reward", dtype=torch.float32
        ),
        models,
        rows,
        tmp_path,
        center_rewards_coefficient=centering or None,
    )
    renamed = {
        "accuracy": ours["rewards/accuracies"],
        "margin": ours["rewards/margins"],
        "mean_reward": (ours["rewards/chosen"] + ours["rewards/rejected"]) / 2,
        "min_reward": float(rewards.min()),
        "max_reward": float(rewards.max()),
    }
    assert 0 < theirs["accuracy"] < 1
    assert_same(ours | renamed, theirs, ["loss", "grad_norm", "num_tokens", *renamed])


def test_sft(models, tmp_path):
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    data = our_tokens(models, rows, "sft", tmp_path)
    ours = our_step(configs.SFT(), load(open_directory(models / "policy")), data)
    theirs = their_step(
        trl.SFTTrainer, trl.SFTConfig, causal(models / "policy"), models, rows, tmp_path
    )
    assert_same(ours, theirs, ["loss", "grad_norm", "num_tokens"])
