"""Align packed DINOv3 with transformers' model: `python model_factory/align_dinov3_packing.py --ckpt CKPT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_factory.alignment import main

if __name__ == "__main__":
    sys.exit(main("Align packed DINOv3 with the original.", "facebook/dinov3-vitl16-pretrain-lvd1689m"))
