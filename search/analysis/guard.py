"""What a cheaper model loses against the dense model of the same training, on the same images, in plain words."""

from __future__ import annotations

from .pareto import binomial_interval

MUCH = 2.0  # points of top-1: more than this, and more than chance explains, is a loss to warn of


def against_dense(correct: int, total: int, dense_top1: float, share: float) -> str:
    """A sentence on right answers of so many images beside the dense model's top-1 in percent on the same images.

    share: of the dense model's cost, 0 to 1. It begins with "warning:" where the loss is above `MUCH` points and the
    95 % interval lies below the dense model's top-1.
    """
    top1 = 100 * correct / total
    gap = dense_top1 - top1
    _, high = binomial_interval(correct, total)
    beside = f"the dense model of the same training reaches {dense_top1:.2f} % on the same images"
    less = f"for {1 - share:.0%} fewer MACs"
    if gap > MUCH and high < dense_top1:
        return (
            f"warning: {beside}, {gap:.2f} points more: that is much to lose {less}; ask for a larger --budget, retrain "
            "longer, or take a dense model of a smaller --img-size"
        )
    if gap > 0:
        return f"{beside}, {gap:.2f} points more; this one costs {share:.0%} of it"
    return f"{beside}: nothing is lost {less}"
