"""What the alignment scripts share: all but the default checkpoint."""

from __future__ import annotations

from pathlib import Path

from nopad.align.command import add_align_options, report_alignment
from nopad.command_options import WRONG_USE
from nopad.terminal import ArgumentParser, print_error

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "images"


def main(description: str, default_checkpoint: str) -> int:
    """Align one checkpoint by the specification's options; 0 passed, 1 failed, 2 wrong use."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--ckpt", default=default_checkpoint, help=f"checkpoint (default: {default_checkpoint})")
    parser.add_argument("--batch_size", type=int, default=2, help="images of the batched case (default: 2)")
    parser.add_argument("--image_size", type=int, help="side in pixels of that case, and of the photos")
    parser.add_argument("--use_real_images", action="store_true", help="compare on photos instead of noise")
    parser.add_argument("--image_dir", type=Path, help=f"the photos (default: {EXAMPLES.name} of this repository)")
    add_align_options(parser)
    options = parser.parse_args()
    options.json, options.report = False, None
    if options.image_dir and not options.use_real_images:
        parser.error("--image_dir: give --use_real_images with it")
    try:
        return report_alignment(
            options,
            checkpoint=options.ckpt,
            images=(options.image_dir or EXAMPLES) if options.use_real_images else None,
            noise=not options.use_real_images,
            batch_size=options.batch_size,
            image_size=options.image_size,
        )
    except (ValueError, OSError, ImportError) as error:
        print_error(f"{parser.prog}: {error}")
        return WRONG_USE
