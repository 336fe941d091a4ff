"""What scores say: the frontier, layers, trust in the scores, finalists, latency budgets."""
