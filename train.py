"""Train VLoRA on the embedded digits, or whatever a config says: `python train.py [--config FILE] [key=value …]`."""

import sys

from vlora_jax.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
