"""``triflash tune``: measures the tile configurations of the portable kernels on this GPU and writes the best to a file.

``options`` reads the command line into cases, ``cases`` says what a case launches, ``candidates`` lists configurations and compiles them in
worker processes, ``measure`` judges and times them on the GPU, ``choose`` decides, ``report`` shows it, and ``run`` strings it together.
Plans read the file only if the user points to it: see ``plan/overlay.py``.
"""
