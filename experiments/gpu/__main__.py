"""`python -m experiments.gpu`."""

from __future__ import annotations

import sys

from experiments import gpu, sweep

if __name__ == "__main__":
    arguments = [one for one in sys.argv[1:] if one != "--small"]
    gpu.main(sweep.parse(gpu.Small if "--small" in sys.argv else gpu.Config, gpu.__doc__, arguments))
