"""Passes bound to a signature: what a forward or a backward pass allocates, copies and launches, worked out once and repeated with new
addresses. ``ops.py`` calls it; it asks ``plan/`` what to run and ``launch/`` how.
"""
