"""Environments of other packages, verifiers' and textarena's, played under those packages' own interpreter.

`main.py` and the files `of_PACKAGE.py` run there and import nothing of ours; the rest is our side.
"""
