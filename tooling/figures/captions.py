"""What a reader is told of each figure: what is seen, in numbers, and how it was computed."""

from __future__ import annotations

from .analysis import Analysis
from .draw import SURFACE


def captions(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """Title and caption by figure name (see draw_all), in the report's order."""
    linear = analysis.linear
    when = f"step {analysis.step}" if linear.graph == "step" else "once a prompt"
    return {
        "activations": (f"The input of {linear.name}, {when}", _activations(analysis)),
        "ranges": (f"Input ranges over the sampling steps, block {linear.block}", _ranges(analysis)),
        "smoothing": (f"Smoothing {linear.name}", _smoothing(analysis)),
        "layer-errors": ("What quantizing does to each Linear, by step", _layer_errors(analysis)),
        "velocity": ("What all of it does to the velocity, by step", _velocity(analysis)),
    }


def _activations(analysis: Analysis) -> str:
    found, (tokens, channels) = analysis.outliers, analysis.input.shape[1:]
    wide, deep = (-(-size // most) for size, most in zip((tokens, channels), SURFACE))
    binned = f" (a point is the largest of {wide} x {deep})" if max(wide, deep) > 1 else ""
    return (
        f"|X| over {tokens} tokens and {channels} channels{binned}, the prompt's half of the guidance pair, read "
        f"from the FP32 graph while it sampled this prompt. Channel {found.top} reaches {found.absmax:.3g}, "
        f"{found.standing_out:.1f} times the median channel's largest; it is above half of that in "
        f"{found.lasting:.0%} of the tokens. The loudest channel holds {found.top_share:.1%} of the sum of X², the "
        f"loudest {found.for_half} hold half of it."
    )


def _ranges(analysis: Analysis) -> str:
    own = analysis.spreads[analysis.linear.name]
    return (
        "From the calibration table: at each step, for each channel, the largest |X| over tokens, prompts and both "
        "guidance halves. The band goes from the quietest channel to the loudest; the dashed line is the median "
        f"channel. Of {analysis.linear.kind} the loudest is at {own.high[0]:.3g} in the first step and at "
        f"{own.high[-1]:.3g} in the last. cross_attn.to_kv runs once a prompt and has no steps. A table that ships "
        "with a model has one value for every two steps."
    )


def _smoothing(analysis: Analysis) -> str:
    ratios, recipe = analysis.smoothing.ratios(), analysis.recipe
    which = "as this bundle has it"
    if recipe.groups or recipe.requantizes:
        which = "of its first group of steps" if recipe.groups else "of its stored weights: it changes with the step"
    found = (
        f"Largest over median channel: activations {ratios['x_before']:.2f} before and {ratios['x_after']:.2f} after, "
        f"weights {ratios['w_before']:.2f} before and {ratios['w_after']:.2f} after."
    )
    return (
        "Largest magnitude of every input channel, over all steps of the calibration: |X| and |X| / s on the "
        f"left, |W| and s |W| on the right, with s (eq. 3-5) {which}. "
        + (found if analysis.is_smoothed else "This bundle does not smooth this Linear: the lines lie on each other.")
    )


def _layer_errors(analysis: Analysis) -> str:
    name, mean, _ = analysis.worst()[0]
    return (
        f"A row is a Linear (blocks from top to bottom in each group), a column one of {len(analysis.steps)} "
        "sampled steps. Each quantized Linear is simulated on the input that FP32 has there, and its output "
        f"compared with FP32's: ||y' - y|| / ||y||. Worst on average: {name}, {mean:.2%}. No error reaches the next "
        "row here, and a Linear whose output matters little may have a large one."
    )


def _velocity(analysis: Analysis) -> str:
    worst = int(analysis.cosine.argmin())
    return (
        "The bundle's engine on the inputs of FP32's trajectory; its guided velocity compared with FP32's, for "
        f"this prompt and seed alone: cosine, and ||v' - v|| / ||v||. Worst: step {worst}, cosine "
        f"{analysis.cosine[worst]:.4f}; mean error {analysis.relative_error.mean():.2%}. dit-trt diff takes several "
        "prompts."
    )
