"""The report's pictures as PNG files, for papers, issues and chats."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from launch.report.page import flops_at
from launch.runs.records import RunData
from train.files.durable import replacing


def write_figures(runs: list[RunData], names: list[str], folder: Path) -> list[Path]:
    """loss.png and balance.png over all runs; heatmap.png and k_histogram.png of the first run's
    last line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    written = []

    # A reader never sees half a picture.
    def save(name: str, figure: Figure) -> None:
        FigureCanvasAgg(figure)
        with replacing(folder / name) as scratch:
            figure.savefig(scratch, format="png", dpi=144)
        written.append(folder / name)

    def plain(text: str) -> str:
        return text.replace("$", r"\$")

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_tokens, by_flops = figure.subplots(1, 2, sharey=True)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        for key, style, what in (
            ("train/loss", "-", "training"),
            ("eval/val_loss", "o--", "held-out"),
        ):
            if key in run.curves:
                curve = run.curves[key]
                label = what if len(runs) == 1 else f"{plain(name)} {what}"
                by_tokens.plot(
                    curve.tokens, curve.values, style, color=f"C{number}", markersize=4, label=label
                )
                by_flops.plot(
                    flops_at(run.flops, curve.tokens),
                    curve.values,
                    style,
                    color=f"C{number}",
                    markersize=4,
                )
    by_tokens.set(xlabel="tokens", ylabel="loss (nats per token)")
    by_flops.set(xlabel="training FLOPs")
    if by_tokens.lines:
        by_tokens.legend(frameon=False)
        save("loss.png", figure)

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run, name in zip(runs, names, strict=True):
        if "moe/max_vio" in run.curves:
            axes.plot(
                run.curves["moe/max_vio"].step, run.curves["moe/max_vio"].values, label=plain(name)
            )
    axes.set(xlabel="step", ylabel="MaxVio, mean of layers")
    if axes.lines:
        axes.legend(frameon=False)
        save("balance.png", figure)

    run = runs[0]
    if run.frames is None:
        return written
    step = int(run.frames.step[-1])
    figure = Figure(
        figsize=(8, float(np.clip(1.6 + 0.16 * len(run.moe_layers), 2.4, 10))), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(
        run.frames.load[-1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest"
    )
    axes.set(xlabel="expert", ylabel="layer", title=f"load over the mean, step {step}")
    shown = range(0, len(run.moe_layers), -(-len(run.moe_layers) // 24))
    axes.set_yticks(list(shown), [str(run.moe_layers[i]) for i in shown])
    figure.colorbar(image, extend="max")
    save("heatmap.png", figure)
    if run.frames.k_histogram is not None:
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        tokens = run.frames.k_histogram[-1].sum(0)
        axes.bar(np.arange(len(tokens)), tokens / max(1.0, float(tokens.sum())))
        axes.set(
            xlabel="experts per token", ylabel="share of tokens", title=f"all layers, step {step}"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        save("k_histogram.png", figure)
    return written
