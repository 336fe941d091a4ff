"""Search without training: the damage of single reductions, cheapest paths, racing on images."""
