"""A finished run ready to be shown: in a terminal, as a figure, as a page."""
