"""Kills, signals, threads, forks and resources that run out, at random or at every place there is.

``pytest tests/soak --soak`` (``make soak``) runs the long form; without, each part runs in a small one.
"""
