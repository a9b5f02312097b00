"""LLaVA's vision tower replaced by a packed encoder: features of its layer, and state dicts in both directions."""

import torch
import vlm_checkpoints
from tiny_encoders import pack_of

import nopad


def features_of(model, images):
    """LLaVA's own, of one image at a time: projected tokens of the last layer but one, without CLS."""
    features = [model.model.get_image_features(pixel_values=image[None]) for image in images]
    return torch.cat([each.pooler_output[0] for each in features])


def test_a_packed_encoder_is_llavas_vision_tower(tmp_path):
    model = vlm_checkpoints.save(tmp_path, "llava")
    encoder = nopad.load(tmp_path)
    images = list(torch.randn(3, 3, 20, 20))
    pack = pack_of(encoder, images)

    def projected():
        tokens = encoder.encode(pack, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        return model.model.multi_modal_projector(tokens)

    assert model.config.vision_feature_layer == -2
    torch.testing.assert_close(projected(), features_of(model, images), rtol=1e-4, atol=1e-5)

    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    projected().square().mean().backward()
    optimizer.step()
    tower = model.model.vision_tower
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.load_state_dict(encoder.state_dict())  # strictly
    torch.testing.assert_close(projected(), features_of(model, images), rtol=1e-4, atol=1e-5)
    encoder.load_state_dict(before)
    tower.load_state_dict(before)
    torch.testing.assert_close(projected(), features_of(model, images), rtol=1e-4, atol=1e-5)
