"""Architectures taken home: exported, retrained, evaluated, and asked for predictions."""
