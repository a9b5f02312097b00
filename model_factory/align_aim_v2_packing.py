"""Align packed AIMv2 with transformers' model: `python model_factory/align_aim_v2_packing.py --ckpt CKPT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_factory.alignment import main

if __name__ == "__main__":
    sys.exit(main("Align packed AIMv2 with the original.", "apple/aimv2-large-patch14-224"))
