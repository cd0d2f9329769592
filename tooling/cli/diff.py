"""`dit-trt diff`: a quantized bundle against FP32, step by step, PASS or FAIL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .common import UsageError, dit_command, note_unused, progress, say, tell, usage
from .completion import bundles, files

if TYPE_CHECKING:
    from ...engines.bundle import Bundle
    from ...exporters.checkpoint import Checkpoint
    from ...runtime.pipeline import Settings
    from ..diff import Difference

EPILOG = """\b
Examples:
  dit-trt diff                                the newest quantized bundle
  dit-trt diff BUNDLE --against OTHER         any two bundles of one model
  dit-trt diff --prompts mine.txt             on prompts of yours
  dit-trt diff --negative-prompt rain         as runs that have one
  dit-trt diff --simulate                     method's loss, or engine's?
  dit-trt diff --min-cosine 0.98 --json
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", required=False, shell_complete=bundles)
@click.option(
    "--against",
    metavar="BUNDLE",
    shell_complete=bundles,
    help="Reference bundle (default: FP32 of the same checkpoint).",
)
@click.option("--min-cosine", type=float, help="Bar for worst_step_cosine (default: 0.9; w4a8: 0.8).")
@click.option("--prompts", "file", metavar="FILE", shell_complete=files, help="Your own, one a line (default: ours).")
@click.option("--num-prompts", type=int, help="How many of them, the first (default: 4 of ours, all of yours).")
@click.option("--negative-prompt", metavar="TEXT", help="Of every prompt: what it should not sound like.")
@click.option("--steps", type=int, help="Sampling steps (default: the model's own, 100 or 8).")
@click.option("--cfg", type=float, help="Classifier-free guidance scale (default: the model's own, 7 or 1).")
@click.option(
    "--simulate",
    is_flag=True,
    help="Also simulate the recipe in torch: which loss is the method's, which the engine's.",
)
@dit_command
def command(
    bundle: str | None,
    against: str | None,
    min_cosine: float | None,
    file: str | None,
    num_prompts: int | None,
    negative_prompt: str | None,
    steps: int | None,
    cfg: float | None,
    simulate: bool,
) -> dict:
    """Compare a quantized bundle with FP32, step by step.

    Both engines get the same inputs, recorded from the FP32 trajectory; Polygraphy compares the velocities. Exit code
    1 when the worst step's mean cosine is under the bar.
    """
    from ...calib_data.reader import heldout_prompts, read_prompts
    from ...engines.bundle import find_bundle
    from ...engines.home import expanded, home
    from ...runtime.pipeline import Pipeline
    from ...runtime.settings import Settings, check_clips

    given = {"steps": steps, "cfg_scale": cfg}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with usage():
        check_clips((), Settings(**chosen), negative_prompt=negative_prompt)
    prompts = heldout_prompts() if file is None else read_prompts(expanded(file))
    if num_prompts is None:
        num_prompts = 4 if file is None else len(prompts)
    if not 1 <= num_prompts <= len(prompts):
        raise UsageError(f"--num-prompts {num_prompts} is outside 1..{len(prompts)}")
    if min_cosine is not None and not -1 <= min_cosine <= 1:
        raise UsageError(f"--min-cosine {min_cosine} is outside -1..1")
    if simulate and against is not None:
        raise UsageError("--simulate compares with FP32 of the same checkpoint; leave out --against")
    found = find_bundle(bundle, quantized=True)
    settings = Pipeline(found).settings(**chosen)
    steps = settings.steps
    note_unused(negative_prompt, settings)

    from ..diff import calls_a_step, compare
    from ..fidelity import deterministic_sampler

    if against is not None:
        reference = find_bundle(against).verify()
    else:
        from ..workflow import checkpoint_of, reference_backend, reference_bundle

        checkpoint = checkpoint_of(found)
        reference = reference_bundle(checkpoint, reference_backend(found.backend), say)
    if simulate:
        from ..engine_loss import calibration_of

        calibration_of(found, checkpoint)  # before the long part
    bar = _default_bar(found) if min_cosine is None else min_cosine
    folder = home() / "diff" / found.folder.name
    say(f"comparing {found.folder.name} with {reference.folder.name}")
    with progress("comparing", calls_a_step(found) * num_prompts * steps) as done:
        result = compare(found, reference, prompts[:num_prompts], settings, folder, bar, done, negative_prompt)
    _print(result, deterministic_sampler(settings))
    by_polygraphy = result.trt_runner_worst_step_cosine
    passed = result.worst_step_cosine >= bar and (by_polygraphy is None or by_polygraphy >= bar)
    verdict = "PASS" if passed else "FAIL"
    tell(f"{verdict}: worst_step_cosine {result.worst_step_cosine:.4f} (step {result.worst_step}), bar {bar:g}")
    if by_polygraphy is not None:
        tell(f"the same plan in Polygraphy's TrtRunner, without our runtime: worst step {by_polygraphy:.4f}")
    elif result.trt_runner_says is not None:
        tell(f"Polygraphy's TrtRunner does not run here, so our runtime alone was compared: {result.trt_runner_says}")
    tell("the worst step of the first prompt again, with Polygraphy and the package onnxruntime alone:")
    for line in result.polygraphy_commands:
        tell("  " + line)
    error = float(result.relative_error.mean())
    simulated = {}
    if simulate:
        simulated = _simulated(found, reference, checkpoint, prompts[:num_prompts], settings, negative_prompt, error)
    return {
        **simulated,
        **({"trt_runner_worst_step_cosine": by_polygraphy} if found.backend == "tensorrt" else {}),
        "passed": passed,
        "worst_step_cosine": result.worst_step_cosine,
        "worst_step": result.worst_step,
        "mean_step_cosine": float(result.cosine.mean()),
        "mean_relative_error": float(result.relative_error.mean()),
        "final_latent_snr_db": float(result.snr_db.mean()),
        "min_cosine": bar,
        "prompts": prompts[:num_prompts],
        "negative_prompt": negative_prompt,
        "bundle": str(found.folder),
        "reference": str(reference.folder),
    }


def _simulated(
    bundle: Bundle,
    reference: Bundle,
    checkpoint: Checkpoint,
    prompts: list[str],
    settings: Settings,
    negative_prompt: str | None,
    engine_error: float,
) -> dict[str, float]:
    from ..engine_loss import engine_loss

    with progress("simulating", 3 * len(prompts) * settings.steps) as done:
        loss = engine_loss(bundle, reference, checkpoint, prompts, settings, done, negative_prompt)
    worst, method, engine = loss.method_cosine.mean(axis=0).min(), loss.method_error.mean(), loss.engine_error.mean()
    tell(f"simulated: worst_step_cosine {worst:.4f}, mean relative error {method:.4f}, which is the method's own")
    tell(f"the engine's is {engine_error:.4f}: {engine_error - method:+.4f} is its own loss")
    tell(f"(the two differ by {engine:.4f}: integers on rounding edges fall either way, and guidance amplifies that)")
    return {
        "simulated_worst_step_cosine": float(worst),
        "simulated_mean_relative_error": float(method),
        "engine_to_simulation_mean_relative_error": float(engine),
    }


def _default_bar(bundle: Bundle) -> float:
    """By the recipe's bits; a bundle with any 4-bit Linear has the bar of 4 bits."""
    from ..diff import MIN_COSINE

    four = any(layer["bits"] == "w4a8" for layer in bundle.manifest["layers"])
    return MIN_COSINE["w4a8" if four else bundle.manifest["recipe"]["bits"]]


def _print(result: Difference, sampler: str) -> None:
    from ..fidelity import IDENTICAL_DB

    tell("worst steps   mean cosine   min cosine   relative error")
    means = result.cosine.mean(axis=0)
    for step in means.argsort()[:5]:
        tell(
            f"{step:11d}   {means[step]:11.4f}   {result.cosine[:, step].min():10.4f}"
            f"   {result.relative_error[:, step].mean():14.4f}"
        )
    cosine, error = result.cosine, result.relative_error
    tell(f"all steps     {cosine.mean():11.4f}   {cosine.min():10.4f}   {error.mean():14.4f}")
    snr = result.snr_db.mean()
    apart = "identical" if snr >= IDENTICAL_DB else f"{snr:.1f} dB SNR (own rollouts, which diverge)"
    tell(f"final latents with {sampler}: {apart}")
