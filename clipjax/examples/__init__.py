"""The kit behind `python -m clipjax train` and the notebooks (extra `train`).

The library does not need it: it shows what a small, complete training looks like.
Import the modules by name, as in `from clipjax.examples import data, train`.
"""
