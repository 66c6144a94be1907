"""Applications that export the table, each in the way that its framework documents.

Rule: only the framework differs: the database, SQLAlchemy, and the text of a row, but
for spaces in JSON and how a date is written, are the same.
"""
