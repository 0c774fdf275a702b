"""``triflash bench``: speed and memory of triflash and its peers on named workloads, after their results were judged.

``options`` reads the command line, ``workloads`` names the problems, ``packed`` draws the lengths of packed sequences, and ``sweeps`` are
sets of problems with ``bars``. ``providers`` are who computes them (``entry``: how they are called; ``compiling``, ``flexible``: the
compiled ones; ``simpler``: what some leave out), ``contest`` hands each its tensors, ``gate`` (``gate_packed`` of packed sequences) judges
results by the rule in ``tolerance`` against ``exact`` scores. ``timing`` and ``memory`` measure, ``breakdown`` takes a step's host time
apart, ``flops`` counts, ``machine`` says on what, ``record`` keeps every sample, ``report`` and ``plots`` show them, ``compare`` holds two
runs against each other, ``measure`` does one workload and ``run`` strings it together.
``gate`` (with ``exact``, ``formula`` and ``tolerance``) and ``timing`` know nothing of the rest and serve others too.
"""
