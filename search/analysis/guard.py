"""What a cheaper model loses against the dense model of the same training, on the same images, in plain words."""

from __future__ import annotations

MUCH = 2.0  # points: more than this, and more than chance explains, is a loss to warn of


def against_dense(score: float, high: float, dense: float, share: float) -> str:
    """A sentence on a score, with the high end of its 95 % interval, beside the dense model's on the same images.

    share: of the dense model's cost, 0 to 1. It begins with "warning:" where the loss is above `MUCH` points and the
    interval lies below the dense model's score.
    """
    gap = dense - score
    beside = f"the dense model of the same training reaches {dense:.2f} % on the same images"
    less = f"for {1 - share:.0%} fewer MACs"
    if gap > MUCH and high < dense:
        return (
            f"warning: {beside}, {gap:.2f} points more: that is much to lose {less}; ask for a larger --budget, retrain "
            "longer, or take a dense model of a smaller --img-size"
        )
    if gap > 0:
        return f"{beside}, {gap:.2f} points more; this one costs {share:.0%} of it"
    return f"{beside}: nothing is lost {less}"
