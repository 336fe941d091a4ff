"""Heads that timm's ViTs do not have."""
