"""Align packed DINOv2 with transformers' model: `python model_factory/align_dinov2_packing.py --ckpt CKPT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_factory.alignment import main

if __name__ == "__main__":
    sys.exit(main("Align packed DINOv2 with the original.", "facebook/dinov2-large"))
