"""Transforms that make parameters sparse; their public names are those of `clipjax`."""
