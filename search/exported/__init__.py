"""Architectures as models: exported, retrained, evaluated, used for predictions."""
