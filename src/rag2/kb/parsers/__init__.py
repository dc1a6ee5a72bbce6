"""Readers of formats that need a library or can attack one; they run in the jail only."""
