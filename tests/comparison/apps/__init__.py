"""The same small application in each framework, written as its manual writes.

Where a framework has a helper for what is asked, there is a second view with the name
of the first and ``_helped`` behind. The first is missing where only the second can be.
"""
