"""The same small application in each framework, written like in its manual.

If a framework has a helper for a question, a second view uses it, with the suffix
``_helped``. The first view is missing if the framework needs the helper.
"""
