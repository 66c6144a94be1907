"""Applications that export the table, each in the way that its framework documents.

Only the framework differs. The database, SQLAlchemy and the text of a row are the same,
except for spaces in JSON and the format of dates.
"""
