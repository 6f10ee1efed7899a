"""Pictures of the examples: one style, and what writes them."""

from __future__ import annotations

INK, PALE, COLOURS = "#2b2b33", "#d3d7e0", ("#1f6fb4", "#d1495b", "#3a9172", "#e0a030")
STYLE = {
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def colours_of(classes: int):
    """A colour map of matplotlib's for that many classes."""
    import matplotlib

    return matplotlib.colormaps["tab20" if classes > 10 else "Set2"].resampled(classes)


def save_picture(args, draw, size):
    """Calls ``draw(figure)`` with a figure of matplotlib, ``size`` inches wide and high, and saves what it drew."""
    try:
        import matplotlib
    except ImportError:
        print("\nno picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(args.out, format="png", dpi=110)
    print(f"\npicture: {args.out}")
