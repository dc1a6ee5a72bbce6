"""Documents -> cleaned text -> chunks, living in one SQLite file."""
