"""``triflash demo``: train a small transformer with a learned relative-position bias, twice, and compare.

``options`` reads the command line, ``text`` finds the English, ``model`` is the transformer, ``train`` runs one training in a process of
its own, ``report`` makes the table, the picture and the JSON, and ``run`` strings them together. A user of the public functions only.
"""
