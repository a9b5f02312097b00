"""Features of photos: one vector each, tokens of two layers with CLS, and their principal components as a picture.

python examples/features.py [MODEL]

Without access to the Hugging Face Hub, MODEL is untrained:facebook/dinov3-vits16-pretrain-lvd1689m: random weights.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import nopad

PHOTOS = sorted(str(path) for path in (Path(__file__).parent / "images").glob("*.jpg"))[:4]


def main(model: str = "facebook/dinov3-vits16-pretrain-lvd1689m", folder: str = ".") -> None:
    """Print what comes out and its shape, and write a picture for each photo."""
    encoder = nopad.load(model, size="native", max_patches=1024)  # photos as they are, scaled down where they are large

    vectors = torch.nn.functional.normalize(encoder.embed(PHOTOS), dim=1)  # any number of files
    print("cosines to the first photo:", [round(cosine, 3) for cosine in (vectors @ vectors[0]).tolist()])

    pack = encoder.pack(PHOTOS)
    with torch.inference_mode():
        features = encoder.features(pack, layers=[-4, -1])
    print(pack)

    colours = nopad.maps.pca([of_photo.tokens[-1, 0] for of_photo in features])  # one basis for all photos
    for index, photo in enumerate(PHOTOS):
        print(
            Path(photo).name, "tokens", tuple(features[index].tokens.shape), "of the pixels", pack.boxes[index].tolist()
        )
        picture = nopad.maps.overlay(Image.open(photo), colours[index], pack.boxes[index])
        picture.save(Path(folder) / f"{Path(photo).stem}-components.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
