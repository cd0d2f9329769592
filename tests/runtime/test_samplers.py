"""The samplers and the schedule against k-diffusion's own, step by step, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.engines.errors import UserError
from dit_trt.exporters.dit import OBJECTIVES as EXPORTED
from dit_trt.runtime.samplers import DETERMINISTIC, OBJECTIVE_OF, SAMPLERS, SAMPLERS_OF, sample_dpmpp_2m
from dit_trt.runtime.schedule import OBJECTIVES, flow_sigmas, polyexponential_sigmas, sigma_to_t, v_scalings
from dit_trt.runtime.settings import Settings
from peers import k_diffusion, stable_audio_tools

SHAPE = (2, 4, 9)
RUNS = [
    ("dpmpp-3m-sde", "sample_dpmpp_3m_sde"),
    ("dpmpp-2m-sde", "sample_dpmpp_2m_sde"),
    ("dpmpp-2m", "sample_dpmpp_2m"),
]


def toy_velocity(x, t):
    """A nonlinear stand-in for the network, on torch or numpy alike; t broadcasts over x."""
    lib = torch if isinstance(x, torch.Tensor) else np
    return lib.sin(3 * x + 5 * t) + 0.3 * lib.cos(x * x) - 0.5 * t * x


def our_v_denoise(x, sigma, step):
    c_skip, c_out, c_in = (float(c) for c in v_scalings(sigma))
    return toy_velocity(x * c_in, float(sigma_to_t(sigma))) * c_out + x * c_skip


def our_flow_denoise(x, sigma, step):
    return x - toy_velocity(x, sigma) * sigma


def start(steps, rng, dtype=np.float64, rho=1.0, flow=False):
    sigmas = flow_sigmas(steps) if flow else polyexponential_sigmas(steps, rho=rho)
    normals = rng.standard_normal((steps, *SHAPE)).astype(dtype)
    return sigmas, (rng.standard_normal(SHAPE) * sigmas[0]).astype(dtype), normals


def closest(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("steps", [7, 25, 100])
@pytest.mark.parametrize("rho", [1.0, 2.0, 0.6])  # 1 has equal steps, which hides their ratios h1 / h
@pytest.mark.parametrize(("name", "reference"), RUNS)
def test_every_step_equals_k_diffusion(name, reference, rho, steps):
    sampling, external = k_diffusion("sampling"), k_diffusion("external")
    sigmas, x, normals = start(steps, np.random.default_rng(steps), rho=rho)

    theirs = []
    wrapped = external.VDenoiser(lambda x, t: toy_velocity(x, t[:, None, None]))
    extra = {} if name == "dpmpp-2m" else {"noise_sampler": lambda *_: torch.from_numpy(next(pending))}
    pending = iter(normals)
    final = getattr(sampling, reference)(
        wrapped,
        torch.from_numpy(x),
        torch.from_numpy(sigmas),
        callback=lambda state: theirs.append((state["x"].numpy(), state["denoised"].numpy())),
        disable=True,
        **extra,
    )

    ours, denoised = [], []

    def recorded(x, sigma, step):
        ours.append(x)
        return our_v_denoise(x, sigma, step)

    result = SAMPLERS[name](recorded, x, sigmas, lambda step: normals[step], lambda step, sigma, d: denoised.append(d))
    assert len(ours) == len(theirs) == steps
    for step, (expected_x, expected_denoised) in enumerate(theirs):
        assert closest(ours[step], expected_x) < 1e-6, step
        assert closest(denoised[step], expected_denoised) < 1e-6, step
    assert closest(result, final) < 1e-6
    assert not np.allclose(ours[-1], x)


def test_the_samplers_differ_from_each_other():
    """Guards the comparison above: a swapped entry of the table would show."""
    sigmas, x, normals = start(25, np.random.default_rng(0))
    results = [SAMPLERS[name](our_v_denoise, x, sigmas, lambda step: normals[step]) for name, _ in RUNS]
    assert all(closest(a, b) > 1e-3 for a, b in [results[:2], results[1:], results[::2]])


@pytest.mark.parametrize("steps", [1, 8, 30])
@pytest.mark.parametrize("sigma_max", [1.0, 0.6])
@pytest.mark.parametrize("name", ["pingpong", "euler"])
def test_flows_equal_stable_audio_tools(name, sigma_max, steps, monkeypatch):
    """Its sample_rf: the levels, the mix of sound and noise at the start, and every latent after it."""
    theirs = stable_audio_tools("inference.sampling")
    rng = np.random.default_rng(steps)
    clean, noise = (rng.standard_normal((1, *SHAPE)) for _ in range(2))
    normals = rng.standard_normal((steps, 1, *SHAPE))
    pending = iter(normals)
    monkeypatch.setattr(theirs.torch, "randn_like", lambda x: torch.from_numpy(next(pending)))
    monkeypatch.setattr(theirs, "trange", lambda n, **_: range(n))
    seen = []

    def velocity(x, t, **_):
        seen.append((float(t[0]), x.numpy().copy()))
        return toy_velocity(x, t[:, None, None, None])

    expected = theirs.sample_rf(
        velocity,
        torch.from_numpy(noise),
        init_data=torch.from_numpy(clean) if sigma_max < 1 else None,
        steps=steps,
        sampler_type=name,
        sigma_max=sigma_max,
    )
    flow = OBJECTIVES["rf_denoiser"]
    sigmas = flow.sigmas(steps, 0.3, sigma_max)
    assert flow.interpolates and flow.time(sigmas[0]) == sigma_max
    ours = []

    def denoise(x, sigma, step):
        c_skip, c_out, c_in = (float(c) for c in flow.scalings(sigma))
        ours.append((float(flow.time(sigma)), x))
        return x * c_skip + toy_velocity(x * c_in, float(flow.time(sigma))) * c_out

    begin = noise if sigma_max == 1 else clean * (1 - sigma_max) + noise * sigma_max
    result = SAMPLERS[name](denoise, begin, sigmas, lambda step: normals[step])
    assert len(ours) == len(seen) == steps
    for (t, x), (expected_t, expected_x) in zip(ours, seen):
        assert t == pytest.approx(expected_t, rel=1e-5)  # theirs are float32
        assert closest(x, expected_x) < 1e-5
    assert closest(result, expected) < 1e-5


def test_every_objective_that_is_exported_can_be_sampled():
    assert set(EXPORTED) == set(OBJECTIVES) == set(SAMPLERS_OF) == set(DETERMINISTIC)
    assert all(Settings.of_objective(name).objective is OBJECTIVES[name] for name in OBJECTIVES)


def test_settings_know_whose_samplers_they_are():
    assert Settings.of_objective("v") == Settings()
    own = Settings.of_objective("rf_denoiser")
    assert (own.steps, own.sampler, own.cfg_scale) == (8, "pingpong", 1)
    assert own.sigmas[0] == 1 and own.sigmas[-1] == 0 and len(own.sigmas) == 9
    assert Settings(sampler="euler", steps=8).sigmas.tolist() == own.sigmas.tolist(), "no level of a flow is above 1"
    assert Settings(sampler="euler", sigma_max=0.2).sigmas[0] == 0.2, "sigma_min is not one of a flow's"
    assert (np.diff(Settings(sampler="euler", sigma_max=0.12).sigmas) < 0).all()
    flow = {"sampler": "pingpong", "sigma_max": 1}
    assert Settings.of_schedule(flow, steps=4).steps == 4
    with pytest.raises(UserError, match="the sampler pingpong takes no sigma_min"):
        Settings.of_schedule(flow, sigma_min=0.3)
    with pytest.raises(UserError, match=r"sigma_max 0\.1 is below 0\.12"):
        Settings(sampler="euler", sigma_max=0.1)
    with pytest.raises(UserError, match=r"sigma_min 0\.3 and sigma_max 0\.2"):
        Settings(sigma_max=0.2)
    assert {OBJECTIVE_OF[name]: name for name in DETERMINISTIC.values()} == DETERMINISTIC


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_stays_float32_and_near_float64(name):
    flow = OBJECTIVE_OF[name] != "v"
    our_denoise = our_flow_denoise if flow else our_v_denoise
    sigmas, x, normals = start(25, np.random.default_rng(3), flow=flow)
    exact = SAMPLERS[name](our_denoise, x, sigmas, lambda step: normals[step])
    single = normals.astype(np.float32)
    dtypes = []
    result = SAMPLERS[name](
        our_denoise,
        x.astype(np.float32),
        sigmas,
        lambda step: single[step],
        lambda step, sigma, denoised: dtypes.append(denoised.dtype),
    )
    assert result.dtype == np.float32
    assert set(dtypes) == {np.dtype(np.float32)}
    assert closest(result, exact) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
@given(steps=st.integers(1, 40), seed=st.integers(0, 999))
def test_a_denoiser_that_knows_the_answer_reaches_it(name, steps, seed):
    rng = np.random.default_rng(seed)
    flow = OBJECTIVE_OF[name] != "v"
    sigmas, x, normals = start(steps, rng, np.float32, flow=flow)
    answer = rng.standard_normal(SHAPE).astype(np.float32)
    seen = []

    def denoise(x, sigma, step):
        seen.append(float(np.abs(x - answer * (1 - sigma if flow else 1)).max()) / sigma)
        return answer

    np.testing.assert_array_equal(SAMPLERS[name](denoise, x, sigmas, lambda step: normals[step]), answer)
    # Beside the answer there is only noise of the step's own level: exact for a constant estimate.
    assert max(seen) < 6.5


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_calls(name):
    events = []

    def denoise(x, sigma, step):
        events.append(("denoise", step, sigma))
        return x * 0 + step

    def noise(step):
        events.append(("noise", step))
        return np.zeros(SHAPE)

    def callback(step, sigma, denoised):
        assert denoised.flat[0] == step
        events.append(("callback", step, sigma))

    sigmas = flow_sigmas(4) if OBJECTIVE_OF[name] != "v" else polyexponential_sigmas(4)
    SAMPLERS[name](denoise, np.ones(SHAPE), sigmas, noise, callback)
    expected = []
    for step, sigma in enumerate(sigmas[:-1]):
        expected += [("denoise", step, sigma), ("callback", step, sigma)]
        if name not in DETERMINISTIC.values() and step < 3:
            expected.append(("noise", step))
    assert events == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_starting_latent_is_left_alone(name):
    x = np.ones(SHAPE)
    SAMPLERS[name](our_v_denoise, x, polyexponential_sigmas(5), lambda step: np.ones(SHAPE))
    assert (x == 1).all()


def test_the_deterministic_sampler_needs_no_noise():
    sigmas, x, _ = start(9, np.random.default_rng(1))

    def refuse(step):
        raise AssertionError("noise was drawn")

    first = sample_dpmpp_2m(our_v_denoise, x, sigmas, refuse)
    np.testing.assert_array_equal(first, sample_dpmpp_2m(our_v_denoise, x, sigmas))


def test_schedule_of_stable_audio_open():
    sigmas = polyexponential_sigmas(100)
    assert sigmas.shape == (101,)
    assert sigmas.dtype == np.float64
    assert sigmas[0] == pytest.approx(500, rel=1e-12)
    assert sigmas[99] == pytest.approx(0.3, rel=1e-12)
    assert sigmas[100] == 0
    np.testing.assert_allclose(sigmas[:99] / sigmas[1:100], (500 / 0.3) ** (1 / 99), rtol=1e-12)


@pytest.mark.parametrize("rho", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_schedule_equals_k_diffusion(steps, rho):
    expected = k_diffusion("sampling").get_sigmas_polyexponential(steps, 0.3, 500.0, rho)  # computed in float32
    actual = polyexponential_sigmas(steps, 0.3, 500.0, rho)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_times_and_scalings_equal_k_diffusion():
    sigmas = polyexponential_sigmas(100)
    reference = k_diffusion("external").VDenoiser(None)
    expected_t = reference.sigma_to_t(torch.from_numpy(sigmas))
    np.testing.assert_allclose(sigma_to_t(sigmas), expected_t, rtol=1e-12)
    for ours, theirs in zip(v_scalings(sigmas), reference.get_scalings(torch.from_numpy(sigmas))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert sigma_to_t(500.0) == pytest.approx(0.99873, abs=5e-6)
    assert sigma_to_t(0.3) == pytest.approx(0.18555, abs=5e-6)
    assert len(np.unique(sigma_to_t(sigmas).astype(np.float32))) == 101
