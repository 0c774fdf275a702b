"""Real Triton for this folder: its kernels are compiled for GPUs that are not here, which the interpreter cannot do."""

import os

os.environ["TRITON_INTERPRET"] = "0"
