"""Transforms that bound an update; their public names are those of `clipjax`."""
