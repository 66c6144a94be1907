"""The same questions of tgstream, TurboGears alone, Flask, Django and Starlette.

    python -m tests.comparison

Rule: a framework is asked in the best form that its own manual has. Where it knows a
helper, both are asked, with and without.
"""
