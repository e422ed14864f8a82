"""The kit behind `python -m clipjax train` and the notebooks (extra `train`).

Nothing here is needed to use the library: it is what a small, complete training looks
like.  Import the modules by name, as in `from clipjax.examples import data, train`.
"""
