"""What everything stands on.

Errors, sizes as text, JSON files, pytrees, figures of plain data. Imports nothing of ours.
"""
