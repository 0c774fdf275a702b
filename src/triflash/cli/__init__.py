"""Applications: demo, bench, tune, explain and env on the command line. Called by ``__main__``; they may use anything public."""
