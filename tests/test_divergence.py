"""KL to the reference on the policy's own answers: by hand, without bias, and over a run."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import mesh, tiny_config, write_model
from refusals import ended
from running import arguments, environment, launch, launch_several, metrics_of, untimed

from alignjax import divergence
from alignjax.config import Compute
from alignjax.generation.native import generate
from alignjax.models import decoder
from alignjax.models.decoder import hidden_states
from alignjax.sharding import place

pytestmark = pytest.mark.slow  # minutes

F32 = Compute(dtype="float32", remat="none")
PROMPTS = [[5, 9, 33], [7], [40, 41, 42, 43, 44, 45, 46], [99, 3]]
END = 2


def model_of(factor: float = 1.0):
    """Weights of one seed, scaled: the larger, the surer is the model of its answers."""
    return jax.tree.map(lambda w: factor * w, decoder.init(tiny_config(), jax.random.key(1)))


def log_softmax(model, ids: list[int]) -> np.ndarray:
    """Log-probs of what follows each token, float64 [T, V]."""
    tokens = np.array([ids], np.int32)
    where = np.arange(len(ids), dtype=np.int32)[None]
    h = hidden_states(model, *place((tokens, where, np.ones_like(tokens)), "batch", None), F32)
    logits = np.float64(h[0]) @ np.float64(model.embed).T
    top = logits.max(1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def by_hand(policy, reference, prompt: list[int], answer: list[int]) -> float:
    ids, places = [*prompt, *answer], range(len(prompt), len(prompt) + len(answer))
    pi, ref = (log_softmax(model, ids) for model in (policy, reference))
    return sum(pi[i - 1, ids[i]] - ref[i - 1, ids[i]] for i in places)


def log_ratios(policy, reference, answers, rows: int = 2) -> np.ndarray:
    data = divergence.with_prompts(PROMPTS, answers)
    pi, ref = (divergence.log_probs(m, data, 64, rows, F32) for m in (policy, reference))
    return pi - ref


def test_log_ratios_by_hand_and_none_before_training():
    policy, reference = model_of(3.0), model_of(2.5)
    answers = generate(policy, PROMPTS, [END], 9, 1.0, 0, 4, F32, keep_end=True)
    got = log_ratios(policy, reference, answers)
    expected = [by_hand(policy, reference, *one) for one in zip(PROMPTS, answers, strict=True)]
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(log_ratios(policy, policy, answers), 0)


def test_devices_change_no_log_ratio():
    answers = [[3, 4, 5], [END], [8] * 20, [1, 2]]
    one = log_ratios(model_of(3.0), model_of(2.5), answers)
    host = [jax.tree.map(np.asarray, model_of(by)) for by in (3.0, 2.5)]
    mesh(1, 4, 2)
    like = model_of()
    models = [jax.tree.map(lambda w, a: jax.device_put(a, w.sharding), like, m) for m in host]
    np.testing.assert_allclose(log_ratios(*models, answers, rows=4), one, atol=2e-5)


def test_the_mean_is_the_divergence_but_for_its_spread():
    """Of answers of one token, whose divergence is a sum over the vocabulary."""
    policy, reference, count = model_of(3.0), model_of(2.0), 1000
    prompts = [PROMPTS[0]] * count
    answers = generate(policy, prompts, [END], 1, 1.0, 0, count, F32, keep_end=True)
    data = divergence.with_prompts(prompts, answers)
    pi, ref = (divergence.log_probs(m, data, 128, 8, F32) for m in (policy, reference))
    pi_V, ref_V = (log_softmax(m, PROMPTS[0])[-1] for m in (policy, reference))
    exact = (np.exp(pi_V) * (pi_V - ref_V)).sum()
    assert abs((pi - ref).mean() - exact) < 4 * (pi - ref).std() / np.sqrt(count) < exact


def test_metrics_of_answers():
    answers = [{"log_ratio": 0.5, "tokens": 4}, {"log_ratio": -0.25, "tokens": 1}]
    assert divergence.metrics(answers) == {"samples/kl": 0.125, "samples/kl_per_token": 0.05}
    assert divergence.metrics([{"answer": "of a run that measures none"}]) == {}


MEASURED = ("--samples.kl", "--samples.prompts=3", "--samples.temperature=1")
MEASURED += ("--samples.max-tokens=8", "--batch.max-steps=4", "--checkpoint.every=2")
MEASURED += ("--log.eval-every=2", "--optimizer.learning-rate=1e-2")


@pytest.fixture(scope="module")
def measured(root):
    """The directory of a run of 4 steps, evaluated after 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, None, root, root / "kl", *MEASURED) == (0, "")
    return root / "kl"


def test_a_run_logs_the_divergence_of_its_evaluations(measured):
    lines = {line["step"]: line for line in metrics_of(measured)}
    assert [step for step, line in lines.items() if "samples/kl" in line] == [2, 4]
    for step in (2, 4):
        answers = json.loads((measured / f"samples/step-{step}.json").read_text())
        assert len(answers) == 3 and all(1 <= one["tokens"] <= 8 for one in answers)
        found = divergence.metrics(answers)
        assert {name: lines[step][name] for name in found} == found
        assert abs(found["samples/kl"]) > 1e-4
    assert "log_ratio" not in (measured / "samples/step-0.json").read_text()


def test_it_goes_on_with_the_same_numbers_and_from_the_same_weights_alone(
    root, measured, monkeypatch, capsys
):
    again = root / "kl-again"
    shutil.copytree(measured, again)
    for name in ("checkpoints/4", "samples/step-4.json", "eval/step-4.npy"):
        shutil.rmtree(again / name) if (again / name).is_dir() else (again / name).unlink()
    write_model(root / "other", tiny_config(layers=1), seed=5)
    code, said = ended(
        monkeypatch, capsys, root, again, *MEASURED, f"--model.path={root / 'other'}"
    )
    assert (code, said) == (
        2,
        f"error: {again}: this run is at step 2 of other weights than those of {root / 'other'}; "
        "name the model that it started from, or choose another --run_dir.\n",
    )
    assert ended(monkeypatch, capsys, root, again, *MEASURED) == (0, "")
    assert untimed(again) == untimed(measured)
    one, other = ((run / "samples/step-4.json").read_bytes() for run in (again, measured))
    assert one == other


def test_two_processes_measure_what_one_does(root, measured, tmp_path):
    launch(arguments(root, "kl-one", *MEASURED), environment(tmp_path / "one", 2))
    command = arguments(root, "kl-two", *MEASURED)
    launch_several(command, environment(tmp_path / "two"), 2, tmp_path / "logs")
    one, two = (metrics_of(root / name)[-1]["samples/kl"] for name in ("kl-one", "kl-two"))
    assert two == pytest.approx(one, rel=2e-3, abs=2e-5)
