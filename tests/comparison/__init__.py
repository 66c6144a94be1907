"""Compare tgstream, TurboGears alone, Flask, Django and Starlette.

    python -m tests.comparison

Each framework is used in the best way that its own manual shows. If a framework has a
helper for a question, the answer has the results without and with the helper.
"""
